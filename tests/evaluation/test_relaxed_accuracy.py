import pytest

from nvmm.evaluation.relaxed_accuracy import relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("100", ["100"], 1.0),
        ("105", ["100"], 1.0),
        ("105.1", ["100"], 0.0),
        ("95", ["100"], 1.0),
        ("94.9", ["100"], 0.0),
        ("-1.04", ["-1"], 1.0),
        ("1.04", ["-1"], 0.0),
        ("12%", ["0.12"], 1.0),
        ("12%", ["12"], 0.0),
        ("12.5%", ["12%"], 1.0),
        ("0", ["0"], 1.0),
        ("0.0", ["0"], 0.0),  # 0 is compared as text
        ("0.001", ["0"], 0.0),
        ("1,000", ["1000"], 0.0),  # a separator makes it text, as in pix2struct
        ("1,000", ["1,000"], 1.0),
        ("Blue ", ["blue"], 1.0),
        ("blues", ["blue"], 0.0),
        ("3", ["three", "3.1"], 1.0),
        ("nan", ["5"], 0.0),
        ("inf", ["5"], 0.0),
        ("", ["5"], 0.0),
        ("5", [], 0.0),
    ],
)
def test_relaxed_accuracy(prediction: str, answers: list[str], expected: float) -> None:
    assert relaxed_accuracy(prediction=prediction, answers=answers) == expected


def test_tolerance() -> None:
    assert relaxed_accuracy(prediction="109", answers=["100"], tolerance=0.1) == 1.0
    assert relaxed_accuracy(prediction="101", answers=["100"], tolerance=0.0) == 0.0
