"""Refusals and the accuracy on unanswerable questions, by hand."""

from __future__ import annotations

import pytest

from nvmm.evaluation.refusals import (
    REFUSALS,
    UNANSWERABLE,
    refuses,
    replaced,
    unanswerable_accuracy,
)
from nvmm.evaluation.squad import squad_f1


def test_phrases_make_a_refusal() -> None:
    assert refuses(UNANSWERABLE) and refuses("The text DOES NOT mention it.")
    assert refuses("There is no such year.") and not refuses("Nobody knows.")
    assert refuses("Nobody knows.", ["Nobody Knows"])
    assert len(set(REFUSALS)) == len(REFUSALS) and all(p == p.lower() for p in REFUSALS)


def test_a_refusal_becomes_the_sentence_before_f1() -> None:
    gold = [UNANSWERABLE]
    said = "I am unable to answer that."
    assert squad_f1(prediction=said, answers=gold) < 0.5
    assert squad_f1(prediction=replaced(said), answers=gold) == 1.0
    assert replaced("In 1932.") == "In 1932."
    assert replaced("No idea.", ["no idea"], by="Sorry.") == "Sorry."


def test_the_accuracy_is_the_mean_of_both_kinds() -> None:
    answers = [
        (UNANSWERABLE, False),
        ("In 1932.", False),
        ("I cannot find it.", False),
        ("It is not provided.", False),
        ("In 1932.", True),
        ("I don't know.", True),
    ]
    accuracy = unanswerable_accuracy(answers)
    assert accuracy == {"unanswerable": 3 / 4, "answerable": 1 / 2, "both": 5 / 8}
    with pytest.raises(ValueError, match="there are no unanswerable questions"):
        unanswerable_accuracy([("In 1932.", True)])
    with pytest.raises(ValueError, match="there are no answerable questions"):
        unanswerable_accuracy([("In 1932.", False)])
