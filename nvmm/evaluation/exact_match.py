"""Exact match: the quickstart's metric, and that of most closed-form benchmarks."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(ignore_case: bool = False, *, prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the answers, else 0.0.

    White space around both is dropped and each run of it inside counts as one space.
    """
    return float(_tidy(prediction, ignore_case) in {_tidy(a, ignore_case) for a in answers})


def _tidy(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
