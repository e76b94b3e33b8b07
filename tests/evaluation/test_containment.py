import pytest

from nvmm.evaluation.containment import containment


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The sign says STOP.", ["stop"], 1.0),
        ("The sign says\nno entry", ["says no"], 1.0),
        ("The sign says stp", ["stop", "halt"], 0.0),
        ("halt!", ["stop", "halt"], 1.0),
        ("anything", [""], 0.0),
        ("", [""], 1.0),
        ("a", [], 0.0),
    ],
)
def test_containment(prediction: str, answers: list[str], expected: float) -> None:
    assert containment(prediction=prediction, answers=answers) == expected


def test_handwritten_math_drops_spaces_and_keeps_case() -> None:
    answers = [r"\frac { X } { 2 }"]
    assert containment(prediction=r"= \frac{X}{2}", answers=answers, handwritten_math=True) == 1.0
    assert containment(prediction=r"\frac{x}{2}", answers=answers, handwritten_math=True) == 0.0
    assert containment(prediction=r"= \frac{X}{2}", answers=answers) == 0.0
