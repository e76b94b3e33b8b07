import pytest

from nvmm.evaluation.vqa_accuracy import normalize, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red Car", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("ten an the a", "10"),
        ("eleven", "eleven"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),  # grouped digits: every mark becomes nothing
        ("left/right", "left right"),
        ("left, right", "left right"),
        ("t-shirt", "t shirt"),
        ("what?", "what"),
        ("red & blue", "red & blue"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("shell", "shell"),
        ("  ", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


def people(**counts: int) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cat": 10}, 1.0),
        ({"cat": 4, "dog": 6}, 1.0),
        # Left out once each: 3 people see 2 others, 7 see 3: (3 * 2/3 + 7) / 10.
        ({"cat": 3, "dog": 7}, 0.9),
        ({"cat": 2, "dog": 8}, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ({"cat": 1, "dog": 9}, 0.3),
        ({"dog": 10}, 0.0),
    ],
)
def test_ten_people(counts: dict[str, int], expected: float) -> None:
    assert vqa_accuracy(prediction="Cat.", answers=people(**counts)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["cat"], 1.0),
        (["dog"], 0.0),
        (["cat", "dog"], 0.5),
        (["cat", "cat"], 1.0),
        (["cat", "cat", "dog"], (0.5 + 0.5 + 1.0) / 3),
        (["cat", "cat", "cat", "dog"], (3 * 2 / 3 + 1.0) / 4),
        ([], 0.0),
    ],
)
def test_fewer_people(answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction="cat", answers=answers) == pytest.approx(expected)


def test_the_official_script_compares_unanimous_answers_as_they_are() -> None:
    unanimous, split = ["yes"] * 10, ["yes"] * 9 + ["no"]
    for answers, expected in ((unanimous, 0.0), (split, 1.0)):
        found = vqa_accuracy(prediction="Yes.", answers=answers, normalize_unanimous=False)
        assert found == expected
    assert vqa_accuracy(prediction="yes\n", answers=unanimous, normalize_unanimous=False) == 1.0
