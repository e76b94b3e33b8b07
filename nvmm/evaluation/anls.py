"""Average normalised Levenshtein similarity: DocVQA, InfographicVQA, ST-VQA.

Biten et al. 2019, "Scene Text Visual Question Answering", section 4.1 (arXiv:1905.13648); details
as the evaluation script of the Robust Reading Competition (rrc.cvc.uab.es, task DocVQA) has them.
"""

from __future__ import annotations

from collections.abc import Sequence


def anls(threshold: float = 0.5, *, prediction: str, answers: Sequence[str]) -> float:
    """Return the best similarity of the prediction to any answer, 0 if it is below the threshold.

    similarity = 1 - edit distance / longer length, on lower-case text with white space tidied. A
    similarity of exactly `threshold` counts, as in the competition's script (the paper's formula
    has it 0). The benchmark's ANLS is the mean over questions.
    """
    if not answers:
        return 0.0
    guess, *truths = (" ".join(text.lower().split()) for text in (prediction, *answers))
    best = 0.0
    for truth in truths:
        longest = max(len(guess), len(truth))
        similarity = 1.0 - levenshtein(guess, truth) / longest if longest else 1.0
        best = max(best, similarity)
    return best if best >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and substitutions from `a` to `b`."""
    if len(a) < len(b):
        a, b = b, a
    above = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (char != other)))
        above = row
    return above[-1]
