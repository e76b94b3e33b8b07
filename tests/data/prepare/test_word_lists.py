"""Lists of words: every right answer follows, splits have no words in common, the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvmm.data.prepare import word_lists
from nvmm.data.prepare.word_lists import Amounts, Task, split_of, tasks
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from nvmm.evaluation.ifeval import Prompts
from nvmm.evaluation.instruction_following import follows

SMALL = Amounts(sft=30, preference=5, rpo=5, heldout=6)


def right(answer: str, task: Task) -> bool:
    return all(follows(answer, *rule) for rule in task.instructions)


def test_answers_follow_and_each_fault_is_noticed() -> None:
    for prompt, task in tasks("sft", 200, 1):
        assert right(task.answer, task), prompt
    words = ("river", "lemon", "zebra", "silver")
    task = Task(words, 3, "descending", "capital", "bullets")
    assert task.answer == "* ZEBRA\n* RIVER\n* LEMON"
    faults = (
        *("* ZEBRA\n* RIVER", "* ZEBRA\n* SILVER\n* RIVER", "* ZEBRA\n* RIVER\n* LEMON\n* LEMON"),
        *("* LEMON\n* RIVER\n* ZEBRA", "* zebra\n* river\n* lemon", "ZEBRA RIVER LEMON"),
    )
    assert not any(right(fault, task) for fault in faults)
    quoted = Task(words, 4, form="quoted")
    assert quoted.answer == '"river lemon zebra silver"' and right(
        '"Zebra lemon river silver"', quoted
    )
    assert not right("river lemon zebra silver", quoted)


def test_no_word_is_in_another_one_or_in_what_prompts_say() -> None:
    said = " ".join([*word_lists._SENTENCES.values(), "Take the first of these words"]).lower()
    for word in word_lists.WORDS:
        assert word not in said
        assert not any(word in other for other in word_lists.WORDS if other != word)


def test_splits_have_no_set_of_words_in_common() -> None:
    seen: dict[frozenset[str], str] = {}
    for split in word_lists.SHARES:
        prompts = set()
        for prompt, task in tasks(split, 300, 1):
            prompts.add(prompt)
            assert seen.setdefault(frozenset(task.words), split) == split
            assert split_of(task.words[::-1]) == split
        assert len(prompts) == 300


def test_the_files_are_read_and_written_once(tmp_path: Path) -> None:
    assert word_lists.build(tmp_path, SMALL) is True
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert word_lists.build(tmp_path, SMALL) is False
    (tmp_path / "complete.json").unlink()
    assert word_lists.build(tmp_path, SMALL) is True
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for split in ("preference", "rpo", "heldout"):
        assert len(Prompts(str(tmp_path / f"{split}.jsonl"))) == getattr(SMALL, split)
    dataset = Dataset(str(tmp_path / "sft/train-*.tar"), dict)
    turns = json.loads(dataset.members(0)["json"])["messages"]
    assert len(dataset) == 30 and [turn["role"] for turn in turns] == ["user", "assistant"]


def test_the_tokenizer_is_the_model_s_and_has_the_words(tmp_path: Path) -> None:
    """It depends on the seed alone, so that the model's vocabulary can be a number."""
    from nvmm.config.check import to_plain
    from nvmm.config.compose import composed

    word_lists.build(tmp_path, SMALL)
    tokenizer = Tokenizer(str(tmp_path / "tokenizer"))
    config = to_plain(composed("train", ["experiment=alignment_demo/sft"]))
    assert tokenizer.vocab_size == config["model"]["vocab_size"]
    for word in word_lists.WORDS:
        assert len(tokenizer.encode(f" {word}")) == len(tokenizer.encode(f" {word.upper()}")) == 1


@pytest.mark.parametrize("amount", [0, 1])
def test_amounts_are_exact(amount: int) -> None:
    assert len(list(tasks("heldout", amount, 3))) == amount
