"""Token F1 and exact match on hand-worked cases."""

from __future__ import annotations

import pytest

from nvmm.evaluation.squad import Punctuation, normalize, squad_exact_match, squad_f1


@pytest.mark.parametrize(
    ("prediction", "answers", "f1"),
    [
        ("The cat sat.", ["a cat"], 2 / 3),  # {cat, sat} and {cat}: P 1/2, R 1
        ("cat cat dog", ["cat cat cat"], 2 / 3),  # two in common: P 2/3, R 2/3
        ("dog", ["cat", "Dog!", "the dog ran"], 1.0),  # the best of three
        ("dog ran home", ["cat", "the dog ran"], 0.8),  # P 2/3, R 1
        ("dog", ["cat"], 0.0),
        ("", ["the"], 1.0),  # neither has a word
        ("the", ["cat"], 0.0),
        ("cat", [], 0.0),
    ],
)
def test_the_f1_of_words(prediction: str, answers: list[str], f1: float) -> None:
    assert squad_f1(prediction=prediction, answers=answers) == pytest.approx(f1, abs=1e-12)


def test_punctuation_is_removed_or_becomes_a_space() -> None:
    assert normalize("An  A.B. don't-the 1,000") == "ab dontthe 1000"
    assert normalize("An  A.B. don't-the 1,000", "spaced") == "b don t 1 000"
    kinds: tuple[Punctuation, ...] = ("removed", "spaced")
    scores = [squad_f1(kind, prediction="1,000", answers=["1 000"]) for kind in kinds]
    assert scores == [0.0, 1.0]


def test_the_exact_match() -> None:
    assert squad_exact_match(prediction="The  Cat!", answers=["dog", "cat"]) == 1.0
    assert squad_exact_match(prediction="cats", answers=["dog", "cat"]) == 0.0
    assert squad_exact_match("spaced", prediction="a-b", answers=["b"]) == 1.0
    assert squad_exact_match(prediction="cat", answers=[]) == 0.0
