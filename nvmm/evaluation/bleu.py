"""BLEU of a corpus (Papineni et al. 2002), with captions' words as CIDEr-D has them.

    exp(min(0, 1 - r / c)) * (p_1 * ... * p_N)^(1 / N)

p_n is the share of the candidates' n-grams that their references have, each counted at most as
often as in one reference; c is the length of all candidates, r that of the references, of which
each candidate's nearest in length counts (the shorter of two). There is no smoothing: a corpus
without a common 4-gram has BLEU-4 of 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nvmm.evaluation.cider import ngrams, words


@dataclass(frozen=True)
class Bleu:
    """BLEU-N. `of_corpus` is the metric; one answer is a corpus of itself.

    order: N, the longest n-grams.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"metric.order={self.order} must be at least 1")

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float:
        """Return the BLEU of one answer."""
        return self.of_corpus([(prediction, answers)])

    def of_corpus(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> float:
        """Return BLEU in [0, 1] of (prediction, references) of all questions."""
        hits, totals = [0] * self.order, [0] * self.order
        candidate_length = reference_length = 0
        for prediction, references in pairs:
            length = len(words(prediction))
            lengths = [len(words(reference)) for reference in references]
            candidate_length += length
            reference_length += min(lengths, key=lambda other: (abs(other - length), other))
            known = [ngrams(reference, self.order) for reference in references]
            for n, counts in enumerate(ngrams(prediction, self.order)):
                most: Counter[tuple[str, ...]] = Counter()
                for reference in known:
                    most |= reference[n]
                hits[n] += (counts & most).total()
                totals[n] += counts.total()
        if not all(hits):
            return 0.0
        logs = [math.log(hit / total) for hit, total in zip(hits, totals, strict=True)]
        brevity = min(0.0, 1 - reference_length / candidate_length)
        return math.exp(brevity + sum(logs) / self.order)
