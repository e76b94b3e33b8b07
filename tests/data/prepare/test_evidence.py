"""Unanswerable questions and ranking pairs by 4-gram recall, worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from nvmm.data.prepare.evidence import Bounds, pairs, questions, read_documents, unanswerable
from tests.data.prepare.reading import written

# Three chunks of eight words. The answer's grams: "the wren sings at", "wren sings at dawn".
SINGS = "the wren sings at dawn in the hedge"
HALF = "today the wren sings at noon by roads"
CROW = "a crow eats what it finds near roads"
ANSWER = "The wren sings at dawn."
BOUNDS = Bounds(words=8)


def asked(document: str, evidence: Any = None, answer: str = ANSWER) -> Any:
    turn = {"role": "assistant", "content": answer}
    if evidence is not None:
        turn["evidence"] = evidence
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    dialogue = {
        "_id": "d",
        "document_id": "birds",
        "messages": [*before, {"role": "user", "content": "Who sings?"}, turn],
    }
    made = list(questions([dialogue], {"birds": document}))
    return [one for one in made if one.messages[-1]["content"] == "Who sings?"]


def made(document: str, by: Any, evidence: Any = None) -> tuple[list[Any], list[str]]:
    lost: list[str] = []
    return list(unanswerable(asked(document, evidence), by, BOUNDS, lost.append)), lost


def test_chunks_of_high_recall_are_dropped_and_the_rest_must_be_low() -> None:
    # Recalls are 1 and 0: the first goes, the second stays.
    [record], lost = made(f"{SINGS} {CROW}", "recall")
    assert lost == []
    assert record["contexts"] == [CROW]
    assert record["answerable"] is False
    assert "answers" not in record
    assert record["messages"][-1] == {"role": "assistant", "content": ""}
    assert [turn["content"] for turn in record["messages"][:-1]] == ["Hi", "Hello", "Who sings?"]
    # Recalls are 1, 1/2 and 0. A half is not high, so that it stays, and it is not low.
    assert made(f"{SINGS} {HALF} {CROW}", "recall") == (
        [],
        ["d/1: a chunk that is left has a 4-gram recall of 0.1 or more"],
    )
    assert made(f"{CROW} {CROW}", "recall")[1] == ["d/1: no chunk has more 4-gram recall than 0.5"]
    assert made(SINGS, "recall")[1] == ["d/1: nothing is left of the document"]


def test_marked_spans_are_deleted_wherever_they_stand() -> None:
    [record], _ = made(f"{SINGS}. {CROW}. {SINGS}!", "spans", ["the wren sings", "the hedge"])
    assert record["contexts"] == [f" at dawn in . {CROW}.  at dawn in !"]
    assert record["answerable"] is False
    [record], _ = made(SINGS, "spans", ["the wren sings", "sings at dawn"])
    assert record["contexts"] == [" in the hedge"], "spans overlap"
    assert made(CROW, "spans", "wren")[1] == ["d/1: the evidence 'wren' is not in the document"]
    assert made(CROW, "spans")[1] == ["d/1: no evidence is marked"]
    assert made(CROW, "spans", CROW)[1] == ["d/1: nothing is left of the document"]
    assert made(CROW, "spans", "") == ([], []), "nobody answers this turn anyway"


def test_pairs_are_high_or_low_and_keep_earlier_turns() -> None:
    document = f"{SINGS} {HALF} {CROW} {CROW}"
    found = list(pairs(asked(document), BOUNDS))
    assert [(one["passages"], one["relevant"]) for one in found] == [
        ([SINGS], [0]),
        ([CROW], []),
        ([CROW], []),
    ]
    assert found[0]["question"] == "Who sings?"
    assert [turn["content"] for turn in found[0]["messages"]] == ["Hi", "Hello"]
    assert len(list(pairs(asked(document), BOUNDS, negatives=1))) == 2
    assert list(pairs(asked(f"{HALF} {CROW}"), BOUNDS)) == []


def test_bounds_are_exclusive() -> None:
    # The answer has ten 4-grams; chunks of nine words hold six, five, one and none of them.
    answer = " ".join(f"w{n}" for n in range(13))
    six, five, one = (" ".join(answer.split()[: n + 3]) for n in (6, 5, 1))
    none = " ".join("x" * 9)
    document = f"{six} {five} x {one} x x x x x {none}"
    found = list(pairs(asked(document, answer=answer), Bounds(words=9)))
    assert [(pair["passages"], pair["relevant"]) for pair in found] == [([six], [0]), ([none], [])]
    with pytest.raises(ValueError, match=r"low=0.6, high=0.5: need 0 <= low <= high <= 1"):
        Bounds(low=0.6)


def test_a_count_is_drawn_by_the_seed() -> None:
    many = [
        {
            "_id": f"d{n}",
            "document_id": "birds",
            "messages": [
                {"role": "user", "content": f"Q{n}"},
                {"role": "assistant", "content": ANSWER},
            ],
        }
        for n in range(20)
    ]
    documents = read_documents([{"_id": "birds", "text": f"{SINGS} {CROW}"}])

    def drawn(seed: int) -> list[str]:
        found = unanswerable(
            questions(many, documents), "recall", BOUNDS, [].append, count=6, seed=seed
        )
        return [record["messages"][0]["content"] for record in found]

    assert drawn(0) == drawn(0)
    assert len(set(drawn(0))) == 6
    assert drawn(0) != drawn(1)
    with pytest.raises(ValueError, match="count=21: only 20 questions"):
        list(unanswerable(questions(many, documents), "recall", BOUNDS, [].append, count=21))
    with pytest.raises(ValueError, match=r"dialogue 1 \(d0\) needs an _id and the document_id"):
        list(questions(many, {}))


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        {"role": "user", "content": "Who sings?"},
        {"role": "assistant", "content": ANSWER, "evidence": "the wren"},
    ]
    dialogue = {"_id": "d", "document_id": "birds", "messages": messages}
    (tmp_path / "d.jsonl").write_text(json.dumps(dialogue))
    (tmp_path / "docs.jsonl").write_text(json.dumps({"_id": "birds", "text": f"{SINGS} {CROW}"}))

    def run(*arguments: Any, after: Any = ()) -> list[dict[str, Any]]:
        files = ("--from", tmp_path / "d.jsonl", "--documents", tmp_path / "docs.jsonl")
        options = (
            *arguments,
            *files,
            "--words",
            8,
            "--to",
            tmp_path,
            "--name",
            "x",
            "--replace",
            *after,
        )
        monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, options)])
        shard.main()
        return written(tmp_path, "x")

    assert run("unanswerable", "--by", "recall")[0]["contexts"] == [CROW]
    [deleted] = run("unanswerable", "--by", "spans", "--count", 1)
    assert deleted["contexts"] == [f" sings at dawn in the hedge {CROW}"]
    assert [pair["relevant"] for pair in run("pairs")] == [[0], []]
    chatqa = {"document": f"{SINGS} {CROW}", "messages": messages[:1], "answers": [ANSWER]}
    (tmp_path / "d.jsonl").write_text(json.dumps(chatqa))
    options = ("--documents", "")
    assert [pair["passages"] for pair in run("pairs", after=options)] == [[SINGS], [CROW]]
    assert run("unanswerable", "--by", "recall", after=options)[0]["contexts"] == [CROW]
    (tmp_path / "d.jsonl").write_text(json.dumps({**chatqa, "document": ""}))
    with pytest.raises(ValueError, match="record 1 has no document"):
        run("pairs", after=options)
    bad = json.dumps({**chatqa, "answers": []})
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(chatqa)}\n{bad}\n")
    with pytest.raises(ValueError, match="record 2: answers must be texts"):
        run("pairs", after=options)
