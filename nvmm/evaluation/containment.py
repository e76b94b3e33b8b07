"""Containment: OCRBench.

Liu et al. 2023, "OCRBench" (arXiv:2305.07895): an answer counts when it occurs in the model's
text. The benchmark's score out of 1000 is the sum over its 1000 questions.
"""

from __future__ import annotations

from collections.abc import Sequence


def containment(
    handwritten_math: bool = False, *, prediction: str, answers: Sequence[str]
) -> float:
    """Return 1.0 if any answer occurs in the prediction, else 0.0.

    Case and line breaks are ignored. `handwritten_math` is OCRBench's rule for HME100K: all spaces
    are dropped and case counts, since answers are LaTeX. A blank answer matches only a blank
    prediction.
    """
    guess = _tidy(prediction, handwritten_math)
    for answer in answers:
        truth = _tidy(answer, handwritten_math)
        if (truth and truth in guess) or truth == guess:
            return 1.0
    return 0.0


def _tidy(text: str, handwritten_math: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if handwritten_math else text.lower()
