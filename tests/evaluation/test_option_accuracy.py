"""Which option an answer names."""

from __future__ import annotations

import pytest

from nvmm.evaluation.option_accuracy import OptionAccuracy, named

OPTIONS = ["Dog", "dog bark", "cat", "a car's horn"]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("dog", 0),
        ("Dog bark.", 1),
        ("dog, and a cat", 0),
        ("dog bark and cat", 1),
        ("I hear a cat!", 2),
        ("it is the dog bark", 1),
        ("A car's horn", 3),
        ("this is a dog or a cat", None),
        ("caterpillar", None),
        ("", None),
    ],
)
def test_the_option_that_a_text_names(text: str, option: int | None) -> None:
    assert named(text, OPTIONS) == option


def test_an_option_within_a_word_of_another_is_one_of_its_own() -> None:
    assert named("I hear a man and a woman", ["man", "woman"]) is None
    assert named("I hear a woman", ["man", "woman"]) == 1


def test_an_answer_is_right_where_it_names_an_accepted_option() -> None:
    metric = OptionAccuracy().among(OPTIONS, ["Cat", "dog"])
    assert metric(prediction="a cat", answers=["Cat", "dog"]) == 1.0
    assert metric(prediction="dog bark", answers=["Cat", "dog"]) == 0.0
    assert metric(prediction="a cow", answers=["cow"]) == 0.0
    with pytest.raises(ValueError, match="the answer 'cow' is none of the options"):
        OptionAccuracy().among(OPTIONS, ["cow"])
    for options in (["a dog", "A dog."], ["dog", "..."]):
        with pytest.raises(ValueError, match="must be different words"):
            OptionAccuracy().among(options, [])
