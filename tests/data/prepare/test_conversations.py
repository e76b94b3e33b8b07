"""Public layouts of conversations and questions over documents, as their files have them."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from nvmm.data.prepare.conversations import chatqa, chatrag, plain, squad, tatqa
from nvmm.data.prepare.records import read_objects
from tests.data.prepare.reading import written

ASKED = [{"role": "user", "content": "Who sings?"}]
TURNS = [*ASKED, {"role": "assistant", "content": "A wren."}, {"role": "user", "content": "When?"}]


def test_chatqa_training_data() -> None:
    items = [
        {"document": "The wren sings at dawn.", "messages": TURNS, "answers": ["At dawn."]},
        {"document": "", "messages": ASKED, "answers": ["A wren.", "The wren."]},
    ]
    with_document, without = chatqa(items)
    assert with_document == {
        "messages": [*TURNS, {"role": "assistant", "content": "At dawn."}],
        "contexts": ["The wren sings at dawn."],
    }
    assert without == {
        "messages": [*ASKED, {"role": "assistant", "content": "A wren."}],
        "answers": ["A wren.", "The wren."],
    }
    with pytest.raises(ValueError, match="record 2: messages must end with a turn of the user"):
        list(chatqa([items[0], {**items[0], "messages": TURNS[:2]}]))
    with pytest.raises(ValueError, match="record 1: answers must be texts"):
        list(chatqa([{**items[0], "answers": []}]))
    with pytest.raises(ValueError, match="record 1: turn 1: role 'bird' must be one of system"):
        list(chatqa([{**items[0], "messages": [{"role": "bird", "content": "?"}]}]))


@pytest.mark.parametrize(
    ("make", "item", "why"),
    [
        (chatqa, {"document": ["a"], "messages": ASKED, "answers": "b"}, "document must be a text"),
        (chatqa, {"messages": None, "answers": "b"}, "messages must end with a turn of the user"),
        (chatqa, {"messages": ASKED, "answers": [7]}, "answers must be texts"),
        (partial(chatrag, num_contexts=1), {"ctxs": [{"title": "t"}]}, "a passage needs a text"),
        (
            partial(chatrag, num_contexts=1),
            {"ctxs": ["c"], "messages": ASKED, "answers": [["a"]]},
            "an answer must be a text or a number",
        ),
        (
            partial(tatqa, part="others"),
            {"table": {"table": [["h"]]}, "paragraphs": [], "questions": ["q"]},
            "a question must be an object",
        ),
        (
            partial(tatqa, part="others"),
            {
                "table": {"table": [["h", "i"], ["1"]]},
                "paragraphs": [],
                "questions": [{"question": "?", "answer": "1"}],
            },
            "row 0 of a table has 1 cells, its header 2",
        ),
    ],
)
def test_odd_records_are_named(make: Any, item: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"record 1: {why}"):
        list(make([item]))


@pytest.mark.parametrize("passage", ["{text}", "{title} {text} {number}", "{text", "{title}{0}"])
def test_a_passage_has_title_and_text(passage: str) -> None:
    with pytest.raises(ValueError, match=r"must have \{title\} and \{text\}, and no"):
        list(chatrag([], 1, passage=passage))


def test_odd_files_of_squad_are_named(tmp_path: Path) -> None:
    """Among them the answers as Hugging Face's tables have them, which are another layout."""
    question = {"id": "q", "question": "?", "answers": {"text": ["a"], "answer_start": [0]}}
    (tmp_path / "s.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [question]}]}]})
    )
    with pytest.raises(ValueError, match="record q: answers must be a list of objects"):
        list(squad(tmp_path / "s.json"))
    (tmp_path / "s.json").write_text('{"data": [{"paragraphs": [{"context": "c", "qas": ["q"]}]}]}')
    with pytest.raises(ValueError, match=r"s.json is no SQuAD file"):
        list(squad(tmp_path / "s.json"))


def test_chatrag_bench() -> None:
    ctxs = [{"title": "Birds", "text": f"text {n}"} for n in range(9)] + [{"text": "bare"}]
    item = {
        "messages": ASKED,
        "ctxs": ctxs,
        "ground_truth_ctx": {"ctx": "gold", "index": 3},
        "answers": ["add(1, 2)"],
        "exe_answer": 3.0,
        "document": "all",
    }
    [made] = chatrag([item], 2)
    assert made["contexts"] == ["title: Birds, source: text 0", "title: Birds, source: text 1"]
    assert made["answers"] == ["add(1, 2)", "3.0"]
    assert made["messages"][-1] == {"role": "assistant", "content": "add(1, 2)"}
    [made] = chatrag([item], 10, passage="{title}: {text}")
    assert [made["contexts"][0], made["contexts"][-1]] == ["Birds: text 0", "bare"]
    [made] = chatrag([item], 5, gold=True)
    assert made["contexts"] == ["gold"]
    [made] = chatrag([{"messages": ASKED, "document": "all", "answers": None, "answer": "one"}], 5)
    assert made["contexts"] == ["all"]
    assert made["messages"][-1]["content"] == "one"
    with pytest.raises(ValueError, match="record 1: has no ground_truth_ctx"):
        list(chatrag([{"messages": ASKED, "answer": "one"}], 5, gold=True))
    with pytest.raises(ValueError, match="record 1: has no ctxs and no document"):
        list(chatrag([{"messages": ASKED, "answer": "one"}], 5))


def test_squad_1_and_2(tmp_path: Path) -> None:
    question = {"id": "q0", "question": "Who?", "answers": [{"text": "a"}, {"text": "a"}]}
    impossible = {"id": "q1", "question": "Why?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": "a wren", "qas": [question, impossible]}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"version": "2", "data": [{"paragraphs": paragraphs}]}))
    answered, not_answered = squad(path)
    assert answered["messages"][-1]["content"] == "a"
    assert "answers" not in answered and "answerable" not in answered
    assert not_answered["answerable"] is False
    assert not_answered["contexts"] == ["a wren"]
    assert not_answered["messages"][-1] == {"role": "assistant", "content": ""}
    question["answers"] = []
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    with pytest.raises(ValueError, match=r"record q0: answers must be texts"):
        list(squad(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"s.json is no SQuAD file"):
        list(squad(path))


def test_tatqa_has_its_table_and_two_parts() -> None:
    item = {
        "table": {"table": [["", "2019"], ["Sales", "12"]]},
        "paragraphs": [{"order": 2, "text": "second"}, {"order": 1, "text": "first"}],
        "questions": [
            {"question": "Sum?", "answer": 3, "derivation": "1 + 2", "answer_type": "arithmetic"},
            {"question": "Which?", "answer": ["a", "b"], "answer_type": "multi-span"},
        ],
    }
    [arithmetic], [other] = tatqa([item], "arithmetic"), tatqa([item], "others")
    table = {"header": ["", "2019"], "rows": [["Sales", "12"]]}
    assert arithmetic["contexts"] == other["contexts"] == [table, "first", "second"]
    assert arithmetic["messages"][-1]["content"] == "1 + 2"
    assert other["messages"][-1]["content"] == "a, b"
    with pytest.raises(ValueError, match="record 1: is none of TAT-QA"):
        list(tatqa([{}], "others"))


def test_plain_chats_lose_what_nobody_answers() -> None:
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    told: list[str] = []
    [made] = plain([{"conversations": [*shared, {"from": "human", "value": "?"}]}], told.append)
    assert [turn["role"] for turn in made["messages"]] == ["user", "assistant"]
    assert told == ["the 1 turns behind 'Hello'"]
    with pytest.raises(ValueError, match="record 1: has no answer"):
        list(plain([{"messages": ASKED}], told.append))


def test_objects_come_one_by_one(tmp_path: Path) -> None:
    items = [{"a": "x,]}" * n, "n": [n, 0.5, {"b": None}]} for n in range(5)]
    path = tmp_path / "a.json"
    for text in (json.dumps(items), json.dumps(items, indent=2), "\ufeff" + json.dumps(items)):
        path.write_text(text, encoding="utf-8")
        assert list(read_objects(path)) == items
    path.write_text(" [ ] ")
    assert list(read_objects(path)) == []
    for text, why in (
        ('[{"a": 1}', "at object 2: parse error: premature EOF"),
        ('[{"a": 1}, 2]', "at object 2: a list must hold objects, found 2"),
        ('[{"a": 1}, {"b"]', "at object 2: parse error: object key and value"),
        ('[{"a": 1}] []', "at object 2: parse error: trailing garbage"),
        ('{"a": 1}', "at object 1: it must be a JSON list"),
        ("", "at object 1: parse error: premature EOF"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"a.json: {why}"):
            list(read_objects(path))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
    shard.main()


def test_commands_write_what_a_dataset_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.json").write_text(
        json.dumps([{"document": f"d{n}", "messages": ASKED, "answers": ["a"]} for n in range(5)])
    )
    write = ("chatqa", "--from", tmp_path / "t.json", "--to", tmp_path, "--samples-per-shard", 2)
    command(monkeypatch, *write)
    assert "3 shards" in capsys.readouterr().out
    assert [record["contexts"] for record in written(tmp_path)] == [[f"d{n}"] for n in range(5)]
    with pytest.raises(ValueError, match=r"3 shards .*--replace"):
        command(monkeypatch, *write)
    command(monkeypatch, *write, "--replace", "--samples-per-shard", 5)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-00000.tar"]
    items = json.loads((tmp_path / "t.json").read_text())
    items[1]["answers"], items[2]["messages"] = [], None
    (tmp_path / "t.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match="record 2: answers must be texts"):
        command(monkeypatch, *write, "--replace")
    command(monkeypatch, *write, "--replace", "--on-bad", "skip")
    assert [record["contexts"] for record in written(tmp_path)] == [["d0"], ["d3"], ["d4"]]
    said = capsys.readouterr().out
    assert "2 left out:\n  record 2: answers" in said and "record 3: messages must end" in said
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ValueError, match="there is no record to write"):
        command(monkeypatch, *write, "--name", "empty")
