"""Which choice a text names."""

from __future__ import annotations

import pytest

from nvmm.evaluation.choice_accuracy import choice_accuracy, chosen

CITIES = ["Rome", "Paris", "Paris, Texas", "the sea"]


@pytest.mark.parametrize(
    ("prediction", "number"),
    [
        ("B", 1),
        ("(c)", 2),
        ("b.", 1),
        ("B. Rome", 1),
        ("paris", 1),
        ("Paris, Texas, of course", 2),
        ("Paris, because", 1),
        ("Sea", 3),
        ("The answer is: C.", 2),
        ("I think that the answer is Rome", 0),
        ("Option D\n", 3),
        ("A city", None),
        ("E", None),
        ("Parisian", None),
        ("", None),
    ],
)
def test_a_choice_is_named(prediction: str, number: int | None) -> None:
    assert chosen(prediction, CITIES) == number


def test_the_accuracy() -> None:
    right = {"answers": ["B", "the sea"]}
    assert choice_accuracy(CITIES, prediction="Paris", **right) == 1.0
    assert choice_accuracy(CITIES, prediction="D", **right) == 1.0
    assert choice_accuracy(CITIES, prediction="A", **right) == 0.0
    assert choice_accuracy(CITIES, prediction="no idea", **right) == 0.0
    assert choice_accuracy(["True", "False"], prediction="False.", answers=["False"]) == 1.0
    with pytest.raises(ValueError, match="the answer 'Oslo' is none of the choices"):
        choice_accuracy(CITIES, prediction="A", answers=["Oslo"])
    with pytest.raises(ValueError, match="27 choices"):
        choice_accuracy([str(n) for n in range(27)], prediction="A", answers=["A"])
