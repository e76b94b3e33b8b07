import pytest

from nvmm.evaluation.anls import anls, levenshtein


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_levenshtein(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Invoice", ["invoice"], 1.0),
        (" the  end ", ["the end"], 1.0),
        ("invoise", ["invoice"], 6 / 7),
        ("invoise", ["total", "invoice"], 6 / 7),
        ("ab", ["abcd"], 0.5),  # exactly the threshold counts
        ("ab", ["abcde"], 0.0),  # 0.4
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("a", [], 0.0),
    ],
)
def test_anls(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction=prediction, answers=answers) == pytest.approx(expected)


def test_threshold() -> None:
    assert anls(prediction="ab", answers=["abcde"], threshold=0.4) == pytest.approx(0.4)
    assert anls(prediction="invoise", answers=["invoice"], threshold=0.9) == 0.0
