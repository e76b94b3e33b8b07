"""Metrics of a whole corpus: those that need all accepted answers first, or all predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    RecursionError,
)
"""What odd bytes may make a builder raise. A read that may work later (OSError) is not here."""


def prepared(metric: Any, answers: Sequence[Sequence[str]]) -> Any:
    """Return a metric, made for the corpus of these answers where it is of one."""
    return metric.prepared(answers) if hasattr(metric, "prepared") else metric


def of_all(metric: Any, pairs: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Return a metric over (prediction, answers) of all questions: its own, else the mean."""
    if hasattr(metric, "of_corpus"):
        return float(metric.of_corpus(pairs))
    return sum(metric(prediction=text, answers=answers) for text, answers in pairs) / len(pairs)


def all_answers(dataset: Any, builder: Any) -> list[list[str]]:
    """Return the accepted answers to each question that has some."""
    found = []
    for number in range(len(dataset)):
        try:
            answers = builder.references(dataset.members(number))
        except FAULTS:
            continue  # It is named when it is asked.
        if answers:
            found.append(answers)
    return found
