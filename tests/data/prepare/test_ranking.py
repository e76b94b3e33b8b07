"""RankRAG's retrieval data from DPR's and MS MARCO's layouts, worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from nvmm.data.prepare.ranking import (
    answering,
    has_answer,
    ms_marco,
    ms_marco_triples,
    pairs,
    read_dpr,
    relevance,
)
from tests.data.prepare.reading import written

GOLD = {"title": "Wren", "text": "The wren sings."}
HARD = [{"title": "", "text": f"A crow, {n}."} for n in range(3)]
FOR_RETRIEVERS = {
    "question": "Who sings?",
    "answers": ["wren", "the bird"],
    "positive_ctxs": [GOLD],
    "hard_negative_ctxs": [*HARD, {"text": "Wrens, and a Wren."}],
    "negative_ctxs": [{"text": "never read"}],
}
FOR_READERS = {"question": "Who sings?", "answers": ["wren"], "ctxs": [*HARD, GOLD, "last"]}


def ranked(*items: dict[str, Any], lost: list[str] | None = None) -> Any:
    return read_dpr(items, (lost if lost is not None else []).append)


def test_an_answer_is_its_words_in_a_row() -> None:
    assert has_answer("The WREN, a bird.", ["Wren a"])
    assert not has_answer("The wrens", ["wren"])
    assert not has_answer("a b", ["a c", ""])
    assert has_answer("na\u00efve", ["nai\u0308ve"])


def test_five_passages_gold_first_then_the_ranking() -> None:
    [made] = answering(ranked(FOR_RETRIEVERS), 4, [].append)
    assert made["contexts"] == ["Wren\nThe wren sings.", "A crow, 0.", "A crow, 1.", "A crow, 2."]
    assert made["messages"][-1] == {"role": "assistant", "content": "wren"}
    assert made["answers"] == ["wren", "the bird"]
    [made] = relevance(ranked(FOR_RETRIEVERS), 5, [].append)
    assert made["passages"][4] == "Wrens, and a Wren."
    assert made["relevant"] == [0, 4], "relevant is what holds an answer, not what is gold"
    [made] = answering(ranked(FOR_READERS), 5, [].append)
    assert made["contexts"] == [
        "Wren\nThe wren sings.",
        *(f"A crow, {n}." for n in range(3)),
        "last",
    ]


def test_questions_without_gold_or_enough_passages_are_left_out() -> None:
    lost: list[str] = []
    without = {**FOR_READERS, "ctxs": HARD}
    assert list(answering(ranked(without, FOR_READERS, lost=lost), 6, lost.append)) == []
    assert lost == ["question 1: no passage is gold", "'Who sings?' has 5 passages, expected 6"]
    elsewhere = {**FOR_RETRIEVERS, "answers": ["starling"]}
    assert list(relevance(ranked(elsewhere), 3, lost.append)) == []
    assert lost[-1] == "no passage of 'Who sings?' holds an answer"
    with pytest.raises(ValueError, match=r"'Who sings\?': answers must be texts"):
        list(answering(ranked({**FOR_RETRIEVERS, "answers": []}), 2, lost.append))
    with pytest.raises(ValueError, match="question 2 has none of positive_ctxs, ctxs, contexts"):
        list(ranked(FOR_READERS, {"question": "?", "answers": []}))
    with pytest.raises(ValueError, match="passages=1 must be at least 2"):
        list(answering(ranked(FOR_READERS), 1, [].append))


def test_pairs_have_one_passage_and_no_false_negative() -> None:
    made = list(pairs(ranked(FOR_RETRIEVERS), 9))
    assert [(one["passages"], one["relevant"]) for one in made] == [
        (["Wren\nThe wren sings."], [0]),
        *((([f"A crow, {n}."]), []) for n in range(3)),
    ]
    assert len(list(pairs(ranked(FOR_RETRIEVERS), 1))) == 2


def test_ms_marco_by_ids_and_by_texts(tmp_path: Path) -> None:
    def write(name: str, *rows: str) -> Path:
        (tmp_path / name).write_text("".join(f"{row}\n" for row in rows))
        return tmp_path / name

    collection = write("c", *(f'{n}\tpassage "{n}' for n in range(6)))
    queries = write("q", "7\twho?", "8\tunjudged")
    qrels = write("r", "7\t0\t2\t1", "7\t0\t3\t0")
    made = list(ms_marco(collection, queries, qrels, {"7": ["2", "3", "5"], "8": ["1"]}, 1))
    assert [(one["question"], one["passages"], one["relevant"]) for one in made] == [
        ("who?", ['passage "2'], [0]),
        ("who?", ['passage "3'], []),
    ]
    with pytest.raises(ValueError, match=r"1 ids .*\['99'\]"):
        list(ms_marco(collection, queries, qrels, {"7": ["99"]}, 1))
    triples = list(ms_marco_triples(write("t", "who?\tgood\tbad")))
    assert [(one["passages"], one["relevant"]) for one in triples] == [
        (["good"], [0]),
        (["bad"], []),
    ]
    # Byte order marks, Windows' line ends, quotes and long passages are no trouble.
    long = f'"{"x " * 100_000}'
    (tmp_path / "w").write_bytes(f"\ufeffq?\t{long}\tb\r\nr?\tc\rd\te\r\n".encode())
    pairs_ = list(ms_marco_triples(tmp_path / "w"))
    assert [one["question"] for one in pairs_] == ["q?", "q?", "r?", "r?"]
    assert [one["passages"][0] for one in pairs_] == [long, "b", "c\rd", "e"]
    with pytest.raises(ValueError, match=r"t:1: 2 columns, expected 3"):
        list(ms_marco_triples(write("t", "who?\tgood")))


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.json").write_text(json.dumps([FOR_RETRIEVERS]))
    (tmp_path / "t.tsv").write_text("who?\tgood\tbad\n")

    def run(*arguments: Any) -> list[dict[str, Any]]:
        options = (*arguments, "--to", tmp_path, "--name", "x", "--replace")
        monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, options)])
        shard.main()
        return written(tmp_path, "x")

    dpr = ("dpr", "--from", tmp_path / "d.json", "--to-train")
    assert len(run(*dpr, "answer", "--num-passages", 3)[0]["contexts"]) == 3
    assert run(*dpr, "relevance")[0]["relevant"] == [0, 4]
    assert [one["relevant"] for one in run(*dpr, "pairs", "--num-negatives", 2)] == [[0], [], []]
    assert len(run("msmarco", "--triples", tmp_path / "t.tsv")) == 2
    with pytest.raises(ValueError, match="give --triples alone, or"):
        run("msmarco", "--triples", tmp_path / "t.tsv", "--qrels", "x")
