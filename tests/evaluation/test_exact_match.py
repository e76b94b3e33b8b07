import pytest

from nvmm.evaluation.exact_match import exact_match


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("314", ["314"], 1.0),
        (" 3 14\n", ["3  14"], 1.0),
        ("314", ["31", "314"], 1.0),
        ("31", ["314"], 0.0),
        ("Yes", ["yes"], 0.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a", [], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction=prediction, answers=answers) == expected


def test_case_can_be_ignored() -> None:
    assert exact_match(prediction="STRASSE", answers=["Straße"], ignore_case=True) == 1.0
