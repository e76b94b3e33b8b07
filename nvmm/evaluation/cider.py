"""CIDEr-D of captions (Vedantam et al. 2015, arXiv:1411.5726, section 4 and its CIDEr-D).

A caption is a vector of the counts of its n-grams, each times log(images / images whose references
have it). CIDEr-D of one caption is 10 times the mean, over references and n = 1..4, of

    sum over n-grams of min(candidate, reference) * reference / (|candidate| |reference|)

times exp(-(difference of lengths)^2 / (2 sigma^2)). The weights are of the references of all
questions of the benchmark: other questions beside it give a caption another score.

Words are those of the Penn Treebank's tokeniser as COCO's captions use it, in lower case: "n't" and
what an apostrophe begins are words of their own, hyphens and digit groups stay inside a word, and
punctuation is no word. It is written anew, without Java: rare punctuation may be split otherwise
than by the Stanford tokeniser.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CONTRACTED = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))\b")
_WORD = re.compile(r"n't|'(?:s|m|d|ll|re|ve)\b|\w+(?:[-.,:/&]\w+)*")
NGram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the words of a caption."""
    plain = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _WORD.findall(_CONTRACTED.sub(r" \1", plain))


def ngrams(text: str, order: int) -> list[Counter[NGram]]:
    """Return how often each n-gram stands in a caption, for n = 1..order."""
    split = words(text)
    return [
        Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))
        for n in range(1, order + 1)
    ]


@dataclass(frozen=True)
class CiderD:
    """The metric before it has seen the references of all questions.

    order: of the longest n-grams. sigma: words by which lengths may differ, of the Gaussian.
    """

    order: int = 4
    sigma: float = 6.0

    def __post_init__(self) -> None:
        if self.order < 1 or self.sigma <= 0:
            raise ValueError(
                f"metric.order={self.order} must be at least 1, metric.sigma={self.sigma} above 0"
            )

    def prepared(self, references: Sequence[Sequence[str]]) -> PreparedCiderD:
        """Return the metric of a corpus. references: of every question that is asked.

        Raises ValueError for less than two questions: every n-gram of one weighs log(1 / 1) = 0.
        """
        if len(references) < 2:
            raise ValueError(
                f"CIDEr-D weighs n-grams by the questions that have them, and there are"
                f" {len(references)}: it needs two at least"
            )
        having: Counter[NGram] = Counter()
        for captions in references:
            seen = {gram for text in captions for n in ngrams(text, self.order) for gram in n}
            having.update(seen)
        return PreparedCiderD(self.order, self.sigma, having, len(references))

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float:
        """Raise ValueError: an n-gram has no weight yet."""
        raise ValueError("CIDEr-D needs the references of all questions first: use `prepared`")


@dataclass(frozen=True)
class PreparedCiderD:
    """CIDEr-D in [0, 10] of a corpus of so many images. having: n-gram -> images that have it."""

    order: int
    sigma: float
    having: Mapping[NGram, int]
    num_images: int

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float:
        """Return the score of one caption against its references."""
        candidate, length = ngrams(prediction, self.order), len(words(prediction))
        total = 0.0
        for answer in answers:
            reference = ngrams(answer, self.order)
            penalty = math.exp(-((length - len(words(answer))) ** 2) / (2 * self.sigma**2))
            pairs = zip(candidate, reference, strict=True)
            total += penalty * sum(self._similarity(*pair) for pair in pairs)
        return 10.0 * total / (self.order * len(answers))

    def _similarity(self, candidate: Counter[NGram], reference: Counter[NGram]) -> float:
        first, second = self._weighted(candidate), self._weighted(reference)
        norm = math.hypot(*first.values()) * math.hypot(*second.values())
        clipped = sum(min(first.get(gram, 0.0), value) * value for gram, value in second.items())
        return clipped / norm if norm else 0.0

    def _weighted(self, counts: Counter[NGram]) -> dict[NGram, float]:
        images = math.log(self.num_images)
        return {
            gram: count * (images - math.log(max(1, self.having.get(gram, 0))))
            for gram, count in counts.items()
        }
