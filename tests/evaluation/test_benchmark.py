import json
from functools import partial
from typing import Any

import pytest

from nvmm.evaluation.benchmark import Prediction, Questions, summarize, table
from nvmm.evaluation.containment import containment
from nvmm.evaluation.exact_match import exact_match


def ask(benchmark: Questions, record: Any) -> tuple[Any, str, str]:
    members = {"__url__": "a.tar", "__key__": "7", "json": json.dumps(record).encode(), "png": b"x"}
    example = benchmark.ask(members)
    assert example.members["png"] == b"x"
    return json.loads(example.members["json"]), example.question, example.kind


def test_fields_suffix_and_kind() -> None:
    benchmark = Questions(
        "b", "*.tar", exact_match, suffix="Be brief.", question="q", answers="refs", kind="type"
    )
    record = {"q": "How many?", "refs": [2, "two"], "type": "count"}
    assert ask(benchmark, record) == (
        {"question": "How many?\nBe brief.", "answers": ["2", "two"]},
        "How many?",
        "count",
    )
    plain = Questions("b", "*.tar", exact_match)
    assert ask(plain, {"question": "Why?", "answer": "x"}) == (
        {"question": "Why?", "answers": ["x"]},
        "Why?",
        "all",
    )


def test_the_suffix_goes_to_the_last_user_turn() -> None:
    benchmark = Questions("b", "*.tar", exact_match, suffix="Be brief.")
    turns = [
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "1"},
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "2"},
    ]
    record, question, _ = ask(benchmark, {"conversations": turns})
    assert question == "Two?"
    assert [turn["value"] for turn in record["conversations"]] == [
        "One?",
        "1",
        "Two?\nBe brief.",
        "2",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"caption": "x"}, r"a\.tar:7: member json has no field question"),
        ([1], r"a\.tar:7: member json must be an object"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            r"a\.tar:7: the conversation has no",
        ),
    ],
)
def test_samples_without_a_question_are_named(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(Questions("b", "*.tar", exact_match), record)


def test_damaged_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"a\.tar:7: member json is missing or damaged"):
        Questions("b", "x", exact_match).ask({"__url__": "a.tar", "__key__": "7", "json": b"{"})


def test_a_kind_can_have_its_own_metric() -> None:
    math = partial(containment, handwritten_math=True)
    benchmark = Questions("b", "*.tar", containment, metric_by_kind={"math": math})
    assert benchmark.score("X^2", ["x ^ 2"], "math") == 0.0
    assert benchmark.score("X ^ 2", ["X^2"], "math") == 1.0
    assert benchmark.score("X^2", ["x^2"], "text") == 1.0


def test_summary_and_table() -> None:
    scores = [("read", 1.0), ("count", 0.5), ("read", 0.0), ("read", 1.0)]
    predictions = [
        Prediction(i, "", kind, "", [], "", score) for i, (kind, score) in enumerate(scores)
    ]
    summary = summarize(predictions)
    assert summary == {
        "score": 0.625,
        "num_samples": 4,
        "kinds": {
            "count": {"score": 0.5, "num_samples": 1},
            "read": {"score": pytest.approx(2 / 3), "num_samples": 3},
        },
    }
    lines = table(summary, "heldout").splitlines()
    assert [line.split() for line in lines] == [
        ["count", "0.5000", "1"],
        ["read", "0.6667", "3"],
        ["heldout", "0.6250", "4"],
    ]
    assert summarize([]) == {"score": 0.0, "num_samples": 0, "kinds": {}}
