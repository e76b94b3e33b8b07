"""The calculator and ConvFinQA's accuracy on hand-worked cases."""

from __future__ import annotations

import pytest

from nvmm.evaluation.arithmetic import calculate, convfinqa_accuracy, formulas


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("(1,200 - 1,000) / 1,000", 0.2),
        ("$10 + $2.50*2", 15.0),
        ("-(3 - 5) / 4", 0.5),
        ("12.5%", 0.125),
        ("(80 - 60) / 80 - 5%", 0.2),
        (".5 + 007", 7.5),
        ("6 × 7 − 2", 40.0),
        ("1,234,567", 1234567.0),
    ],
)
def test_a_formula_is_computed(formula: str, value: float) -> None:
    assert calculate(formula) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "formula",
    [
        *("2**9", "7 // 2", "5 % 3", "__import__('os').getcwd()", "a + 1", "(lambda: 1)()"),
        *("1 / 0", "1 / (2 - 2)", "(3", "5 3", "", "1e3 + 2", "1_0", "10j", "0x10", "[1][0]"),
        *("1 if 1 else 2", "1 < 2", "١ + ١", "9" * 400 + "*1", "(" * 300 + "1" + ")" * 300),
        "1+" * 600 + "1",
    ],
)
def test_anything_else_is_no_formula(formula: str) -> None:
    assert calculate(formula) is None


def test_formulas_are_found_in_a_text() -> None:
    text = "The change is (206,588 - 181,001) / 181,001, i.e. 14.1% since 2009. Also 3 * 2."
    assert formulas(text) == ["(206,588 - 181,001) / 181,001", "3 * 2"]
    assert formulas("It is 25, and in 2009 - so -") == []
    assert formulas("$10 million (2017) + $20 million (2018)") == ["$10   + $20"]


@pytest.mark.parametrize(
    ("prediction", "answers", "question", "official", "calculated"),
    [
        ("The number is 25587.", ["25587.0"], "", 1, 1),  # a whole number without .0
        ("It was 0.141.", ["0.14136"], "", 1, 1),  # rounded to 3 places
        ("It was 0.14.", ["0.14136"], "", 1, 1),  # to 2
        ("It rose by 14.1%.", ["0.14136"], "what percent", 1, 1),  # hundredths
        ("It rose by 14.1%.", ["0.14136"], "how much", 0, 0),
        ("a decrease of 10.5", ["-10.5"], "", 1, 1),
        ("206588 - 181001", ["25587.0", "206588 - 181001"], "", 1, 1),  # the formula itself
        ("(206,588 - 181,001) / 181,001", ["0.14136"], "", 0, 1),
        ("181001 / 206588", ["0.14136"], "", 0, 0),
        ("$10 million + $20 million", ["30.0"], "", 0, 1),
        ("I cannot say.", ["0.14136"], "", 0, 0),
        ("7", ["3.0"], "", 0, 0),
    ],
)
def test_convfinqa(
    prediction: str, answers: list[str], question: str, official: int, calculated: int
) -> None:
    score = convfinqa_accuracy(question, False, prediction=prediction, answers=answers)
    assert score == official
    assert convfinqa_accuracy(question, prediction=prediction, answers=answers) == calculated
