"""ROUGE on hand-worked cases: the packages are called with the roles and options that we mean."""

from __future__ import annotations

import pytest

from nvmm.evaluation.rouge import Kind, longbench_rouge, rouge


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("rouge1", 1.0),  # the same four words
        ("rouge2", 2 / 3),  # "a b" and "c d" of three pairs each
        ("rougeL", 0.5),  # "a b" or "c d" in order
        ("rougeLsum", 1.0),  # line by line
    ],
)
def test_the_kinds_differ(kind: Kind, score: float) -> None:
    lines = {"prediction": "c d\na b", "answers": ["a b\nc d"]}
    assert rouge(kind, **lines) == pytest.approx(score)


def test_f_is_of_the_best_answer() -> None:
    # P 3/3, R 3/4
    assert rouge(prediction="The cat sat", answers=["x", "the cat sat down"]) == pytest.approx(
        6 / 7
    )
    assert rouge(prediction="cats", answers=["cat"]) == 0.0
    assert rouge(stemmer=True, prediction="cats", answers=["cat"]) == 1.0
    assert rouge(prediction="", answers=["cat"]) == 0.0


def test_longbench_takes_the_other_package() -> None:
    # It keeps case and marks: "The" and "sat." are other words. P 1/3, R 1/4.
    score = longbench_rouge(prediction="The cat sat,", answers=["the cat sat down"])
    assert score == pytest.approx(2 / 7, abs=1e-6)
    assert longbench_rouge(prediction="a b", answers=["", "a b"]) == pytest.approx(1.0)
    assert longbench_rouge(prediction="", answers=["a b"]) == 0.0
