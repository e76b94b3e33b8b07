"""Chunks, 4-gram recall, positives and same-document negatives, worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm.batch import NEGATIVE
from nvmm.commands import shard
from nvmm.data.collate import collate
from nvmm.data.prepare.dialogues import (
    Rules,
    chunk_words,
    cut_documents,
    four_gram_recall,
    questions,
    records,
)
from nvmm.data.prepare.retrieval_sets import read_corpus, read_qrels, read_queries
from nvmm.data.samples.dialogue import Dialogue
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from nvmm.data.shards.dataset import Dataset
from nvmm.objectives.contrastive import Contrastive
from tests.objectives.test_contrastive import losses

DOCUMENT = {
    "_id": "birds",
    "title": "Birds",
    # Three chunks of eight words.
    "text": "the wren sings at dawn in the hedge\n"
    "a crow eats what it finds near roads "
    "the wren sings at dawn in the hedge",
}
TURNS = [
    {"role": "user", "content": "Who sings?"},
    {"role": "assistant", "content": "The wren sings at dawn."},
    {"role": "user", "content": "And crows?"},
    {"role": "assistant", "content": "They eat.", "evidence": "a crow eats what it finds"},
    {"role": "user", "content": "Thanks"},
]
RULES = Rules(words=8)


def asked(*dialogues: dict[str, Any], rules: Rules = RULES, lost: list[str] | None = None) -> Any:
    chunks = cut_documents([DOCUMENT], rules.words)
    found = questions(dialogues, chunks, rules, (lost if lost is not None else []).append)
    return list(found)


def test_chunks_keep_their_white_space_and_differ_by_a_word() -> None:
    assert chunk_words("a b\n c  d e ", 2) == ["a", "b\n c", "d e"]
    assert chunk_words("a b c d", 2) == ["a b", "c d"]
    assert chunk_words(" a b ", 300) == ["a b"]
    assert chunk_words(" \n", 2) == []
    words = " ".join(map(str, range(1000)))
    assert [len(part.split()) for part in chunk_words(words, 300)] == [250] * 4
    assert " ".join(chunk_words(words, 300)) == words


def test_four_gram_recall_by_hand() -> None:
    # the wren sings at | wren sings at dawn | sings at dawn now: two of three are there.
    answer = "The wren sings at dawn, now."
    assert four_gram_recall(answer, DOCUMENT["text"]) == pytest.approx(2 / 3)
    assert four_gram_recall("Wren sings", "the wren sings") == 1.0
    assert four_gram_recall("sings wren", "the wren sings") == 0.0
    assert four_gram_recall("?", "?") == 0.0
    # Repeated grams count once.
    assert four_gram_recall("a b c d a b c d", "a b c d") == pytest.approx(1 / 4)


def test_positives_answers_and_same_document_negatives() -> None:
    [first, second] = asked({"_id": "d", "document_id": "birds", "messages": TURNS})
    assert [first.positive, second.positive] == [0, 1], "the first of equal chunks is the positive"
    assert first.messages == [{"role": "user", "content": "Who sings?"}]
    assert [turn["content"] for turn in second.messages] == [t["content"] for t in TURNS[:3]]
    one, two = records([first, second], "set", RULES)
    assert one["positive"] == "Birds the wren sings at dawn in the hedge"
    assert one["positive_ids"] == ["set/birds#0", "set/birds#2"]
    assert one["negative_ids"] == ["set/birds#1"], "a chunk that answers too is no negative"
    assert two["positive_id"] == "set/birds#1"
    assert two["negative_ids"] == ["set/birds#0", "set/birds#2"]
    assert two["negatives"] == ["Birds the wren sings at dawn in the hedge"] * 2


def test_a_question_without_a_chunk_is_left_out_and_named() -> None:
    lost: list[str] = []
    turns = [TURNS[0], {"role": "agent", "content": "I do not know that at all."}]
    assert asked({"_id": "d", "document_id": "birds", "messages": turns}, lost=lost) == []
    assert lost == ["d/0: no chunk of birds has more 4-gram recall than 0.0"]
    # One of two 4-grams is there: a half is not more than a half.
    half = [TURNS[0], {"role": "agent", "content": "The wren sings at noon."}]
    found = {"_id": "d", "document_id": "birds", "messages": half}
    assert len(asked(found, rules=Rules(words=8, min_recall=0.49))) == 1
    assert asked(found, rules=Rules(words=8, min_recall=0.5), lost=lost) == []
    assert len(lost) == 2


@pytest.mark.parametrize(
    ("dialogue", "says"),
    [
        ({"_id": "d", "document_id": "x", "messages": TURNS}, r"dialogue 1 \(d\) needs .*: x"),
        ({"document_id": "birds", "messages": TURNS}, r"dialogue 1 \(None\) needs an _id"),
        ({"_id": "d", "document_id": "birds"}, r"dialogue 1 \(d\): a dialogue must be a list"),
        (
            {
                "_id": "d",
                "document_id": "birds",
                "messages": [TURNS[0], {**TURNS[1], "evidence": 1}],
            },
            "evidence of turn 2 must be text",
        ),
    ],
)
def test_bad_dialogues_are_named(dialogue: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        asked(dialogue)


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([{"_id": "a", "text": ""}], "document 1 needs an _id and a text"),
        ([{"_id": "a", "text": "b"}] * 2, "document 2 has the _id a of another"),
        ([{"_id": "a", "text": "b", "title": 3}], "title must be text"),
    ],
)
def test_bad_documents_are_named(documents: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cut_documents(documents, 8)


def test_rules_out_of_range_are_named() -> None:
    for changes in ({"words": 0}, {"answer_recall": 1.5}, {"min_recall": -0.1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Rules(**changes)


def test_the_command_writes_shards_and_an_evaluation_of_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogue = {"_id": "d", "document_id": "birds", "messages": TURNS}
    for name, line in (("documents", DOCUMENT), ("dialogues", dialogue)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ["dialogues", "--from", tmp_path / "dialogues.jsonl", "--to", tmp_path / "shards"]
    arguments += ["--documents", tmp_path / "documents.jsonl", "--words", 8, "--set-name", "set"]
    arguments += ["--beir", tmp_path / "beir", "--split", "dev", "--agent-word", "A"]
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
    shard.main()
    assert "2 samples in 1 shards" in capsys.readouterr().out
    # 1. The folder in BEIR's layout.
    corpus = read_corpus(tmp_path / "beir")
    assert list(corpus) == ["birds#0", "birds#1", "birds#2"]
    assert corpus["birds#1"] == "Birds a crow eats what it finds near roads"
    queries = read_queries(tmp_path / "beir")
    last = "user: Who sings?\nA: The wren sings at dawn.\nuser: And crows?"
    assert queries == {"d/0": "user: Who sings?", "d/1": last}
    qrels = read_qrels(tmp_path / "beir", "dev")
    assert qrels == {"d/0": {"birds#0": 1, "birds#2": 1}, "d/1": {"birds#1": 1}}
    # 2. The shards, as a builder reads them, and what the loss makes of their ids.
    build = _builder(tmp_path / "tokenizer")
    samples = list(Dataset(f"{tmp_path}/shards/train-*.tar", build=build))
    assert [len(sample.texts) for sample in samples] == [3, 4]
    batch = collate(samples, pad_id=0)
    assert batch.extras["role"].tolist() == [0, 1, NEGATIVE, 0, 1, NEGATIVE, NEGATIVE]
    objective = Contrastive(temperature=1.0, cross_rank_negatives=False, normalize=False)
    negatives = objective.per_query(_one_hot(len(batch.extras["role"])), [batch])[:, 2]
    # Of the second sample's documents the first query has the crow's, which both samples hold;
    # its own answers, the two wrens, are masked there.
    assert negatives.tolist() == [2.0, 2.0 + 1.0]
    unmasked = Contrastive(
        temperature=1.0, cross_rank_negatives=False, mask_false_negatives=False
    ).per_query(_one_hot(7), [batch])[:, 2]
    assert unmasked.tolist() == [4.0, 4.0]
    assert losses(objective, batch, _one_hot(7))[0] > 0


def _one_hot(count: int) -> Any:
    import torch

    return torch.eye(count)


def _builder(folder: Path) -> RetrievalBuilder:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    train_byte_level_bpe(
        folder, ["a"], vocab_size=259, special_tokens=[*special.values()], **special
    )
    tokenizer = Tokenizer(str(folder), image_token="<s>", end_of_turn="</s>")
    options: dict[str, Any] = {"num_negatives": 4, "in_batch_negatives": True}
    return RetrievalBuilder(**options, dialogue=Dialogue(), tokenizer=tokenizer, sequence_length=64)
