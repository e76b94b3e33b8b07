"""Relaxed accuracy: ChartQA and PlotQA.

Masry et al. 2022, "ChartQA", section 5.1 (arXiv:2203.10244), after Methani et al. 2020: a number
may be off by 5 %, anything else must match. Parsing follows pix2struct's metrics, which published
results use: "12%" is 0.12, thousands separators and units make a text of a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def relaxed_accuracy(tolerance: float = 0.05, *, prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction is right for any answer, else 0.0.

    Two numbers agree when |prediction - answer| <= tolerance * |answer|. An answer of 0, or a side
    that is no number, is compared as text, ignoring case and outer white space.
    """
    prediction = prediction.strip()
    guess = _number(prediction)
    for answer in (text.strip() for text in answers):
        truth = _number(answer)
        if guess is not None and truth:
            agree = abs(guess - truth) <= tolerance * abs(truth)
        else:
            agree = prediction.lower() == answer.lower()
        if agree:
            return 1.0
    return 0.0


def _number(text: str) -> float | None:
    """Return the finite number that a text is, else None; "12%" is 0.12."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
