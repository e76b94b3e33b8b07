"""CIDEr-D against values worked out by hand from its definition."""

from __future__ import annotations

import math

import pytest

from nvmm.evaluation.cider import CiderD, words

CORPUS = [["a cat"], ["a dog"]]
"""The weight of "a" is log(2 / 2) = 0, that of "cat", "dog", "a cat" and unseen n-grams log 2."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man, riding a Horse.", ["a", "man", "riding", "a", "horse"]),
        ("it's the dogs' don't can't", ["it", "'s", "the", "dogs", "do", "n't", "ca", "n't"]),
        ("a black-and-white photo - of 1,000 (or 2.5) things!?", [
            "a", "black-and-white", "photo", "of", "1,000", "or", "2.5", "things",
        ]),
        ("She\N{RIGHT SINGLE QUOTATION MARK}ll say \"hi\" ...", ["she", "'ll", "say", "hi"]),
        ("", []),
    ],
)  # fmt: skip
def test_words_are_the_treebank_s_without_punctuation(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # n = 1 and n = 2 are 1 each, of n = 3 and n = 4 there are none.
        ("A cat.", ["a cat"], 10 * (1 + 1) / 4),
        # "cat" twice, of weight L: min(2L, L) L / (2L L) = 1/2; "cat cat" is in no reference.
        ("cat cat", ["a cat"], 10 * (1 / 2) / 4),
        # Three times "cat", "a cat" three times and "cat a" twice; six words for two.
        (
            "a cat a cat a cat",
            ["a cat"],
            10 * math.exp(-(4**2) / (2 * 6**2)) * (1 / 3 + 1 / math.sqrt(3**2 + 2**2)) / 4,
        ),
        # "a" weighs nothing.
        ("a", ["a cat"], 0.0),
        ("a dog", ["a cat"], 0.0),
        ("", ["a cat"], 0.0),
        # The mean over references.
        ("a cat", ["a cat", "a dog"], (5.0 + 0.0) / 2),
    ],
)
def test_equals_the_definition(prediction: str, answers: list[str], expected: float) -> None:
    metric = CiderD().prepared(CORPUS)
    assert metric(prediction=prediction, answers=answers) == pytest.approx(expected, abs=1e-12)


def test_an_n_gram_counts_once_an_image() -> None:
    """In how many images' references it is, not in how many references."""
    metric = CiderD(order=1).prepared([["cat", "cat", "a cat"], ["dog"], ["bird"], ["cat"]])
    assert metric.having[("cat",)] == 2
    # cat: log 4/2, red: log 4/1 (unseen). cos = (log 2)^2 / (log 2 * sqrt(log 2^2 + log 4^2)).
    found = metric(prediction="red cat", answers=["cat"])
    assert found == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(5), abs=1e-12)


def test_a_longer_sigma_forgives_length_and_an_order_stops() -> None:
    one, two = (
        CiderD(order=1, sigma=s).prepared(CORPUS)(prediction="a cat a a a", answers=["a cat"])
        for s in (1.0, 100.0)
    )
    assert one == pytest.approx(10 * math.exp(-9 / 2)) and two > 9.9
    with pytest.raises(ValueError, match=r"metric\.order=0 must be at least 1"):
        CiderD(order=0)
    with pytest.raises(ValueError, match="use `prepared`"):
        CiderD()(prediction="a", answers=["a"])


def test_one_question_gives_no_weights() -> None:
    with pytest.raises(ValueError, match="there are 1: it needs two at least"):
        CiderD().prepared([["a cat", "the cat"]])
