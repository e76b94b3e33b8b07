"""Benchmarks of text whose questions come from files in a layout of their own, or are generated.

They are answered, scored, written and continued as those in shards are (`Questions`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nvmm.batch import Sample, Text
from nvmm.data.prepare.records import read_lines
from nvmm.data.samples.record import members_of, plain_question
from nvmm.evaluation.benchmark import (
    Benchmark,
    Example,
    Metric,
    Prediction,
    Questions,
    Result,
    Settings,
    Skipped,
    counted,
    summarize,
    table,
)
from nvmm.evaluation.exact_match import exact_match

if TYPE_CHECKING:
    from nvmm.data.samples.builder import Builder
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

_SHOWN = 2000
"""Characters of a question that predictions.jsonl keeps, its end: the rest is a long document."""


@dataclass(frozen=True)
class Item:
    """One question.

    source: file and record, for messages. key: the record's own name. kind: the group that it is
    reported under. answers: the accepted ones. metric: of its answer. max_new_tokens: of it.
    text: what a user says; where it is empty, `record` is asked, a conversation with contexts.
    plain: ask the text itself, without the template of conversations.
    prefill: the beginning of the answer, which the model goes on with.
    middle: leave out the middle of a text that is too long.
    """

    source: str
    key: str
    kind: str
    answers: list[str]
    metric: Metric
    max_new_tokens: int
    text: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    prefill: str = ""
    middle: bool = False


class Items(Protocol):
    """The questions of a benchmark, made when they are asked."""

    def __len__(self) -> int: ...

    def item(self, number: int) -> Item:
        """Return a question. Raises ValueError where there is none in its record."""
        ...

    @property
    def fingerprint(self) -> Any:
        """What tells these questions from others, as JSON."""
        ...


@dataclass(frozen=True)
class Listed:
    """Questions made of records, each by `make`; `make` raises ValueError for a bad record.

    records: (source, key, record).
    """

    records: Sequence[tuple[str, str, Mapping[str, Any]]]
    make: Callable[[str, str, Mapping[str, Any]], Item]

    def __len__(self) -> int:
        return len(self.records)

    def item(self, number: int) -> Item:
        """Return a question."""
        return self.make(*self.records[number])

    @property
    def fingerprint(self) -> list[Any]:
        """The number and the digest of the records."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(record, sort_keys=True).encode())
        return [len(self.records), digest.hexdigest()]


class TextBenchmark(Benchmark):
    """A benchmark of `Items`; a subclass is a dataclass and writes `where` and `items`."""

    name: str
    builder: Mapping[str, Any]

    @property
    @abstractmethod
    def where(self) -> str:
        """The key that names the questions, and its value."""

    @abstractmethod
    def items(self, model: Restored) -> Items:
        """Return the questions. Raises ValueError for files that are missing or not as they say."""

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return the scores of all answers, at least one; called on every rank.

        folder: that of the results, where rank 0 may write more.
        """
        summary = summarize(predictions)
        kinds = {kind: group["score"] for kind, group in summary["kinds"].items()}
        scores = {f"{self.name}_score": {"overall": summary["score"], **kinds}}
        return Result(summary, scores, table(summary, self.name))

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Answer the questions and score the answers; ranks share the questions."""
        model.require_answers()
        if not hasattr(model.builder, "asking"):
            raise ValueError(
                f"{model.path}: its data.train.build is {type(model.builder).__name__}, which asks"
                " no conversations"
            )
        asked = _Asked(self.name, self.where, exact_match, owner=self, folder=journal.folder)
        return asked.run(model, settings, journal)


@dataclass(frozen=True, kw_only=True)
class _Asked(Questions):
    """The items as questions; the items' own metrics score them."""

    owner: TextBenchmark
    folder: Path

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return self.owner.where

    def data(self, model: Restored) -> Any:
        """Return the items."""
        return _Members(self.owner.items(model))

    def ask(self, members: Mapping[str, Any], builder: Builder) -> Example:
        """Return an item as a question."""
        item: Item = members["item"]()
        sample, asked = prompt(item, builder)
        return Example(
            sample, asked[-_SHOWN:], item.answers, item.kind, item.metric, item.max_new_tokens
        )

    def result(
        self,
        model: Restored,
        dataset: Any,
        predictions: list[Prediction],
        skipped: list[Skipped],
        settings: Settings,
    ) -> Result:
        """Return the owner's scores, and what has none."""
        found = self.owner.result(predictions, self.folder)
        return replace(found, summary=found.summary | counted(skipped))


@dataclass(frozen=True)
class _Members:
    """Items as members of samples; a bad one is found where it is asked, and named."""

    items: Items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> Any:
        """What tells these items from others."""
        return self.items.fingerprint

    def members(self, number: int) -> dict[str, Any]:
        """Return the way to an item."""
        make = partial(self.items.item, number)
        return {"__url__": "question", "__key__": str(number), "item": make}


def prompt(item: Item, builder: Any) -> tuple[Sample, str]:
    """Return an item's prompt and the text of its question.

    Raises BadSample for a prompt that leaves no room for the answer.
    """
    ahead = builder.tokenizer.encode(item.prefill) if item.prefill else []
    reserve = item.max_new_tokens + len(ahead)
    asking = builder.asking(reserve=min(reserve, builder.sequence_length - 1))
    if item.record:
        members = members_of(item.record, item.source)
        sample, asked = asking.prompt(members), asking.question(members)
    else:
        text = item.text
        if item.middle:
            text = without_middle(text, lambda t: count(t, builder, item.plain), asking)
        sample, asked = _sample(text, asking, item), text
    if ahead:
        tokens = torch.cat([sample.text.tokens, torch.tensor(ahead)])
        sample = replace(sample, texts=(Text(tokens, torch.zeros(len(tokens))),))
    if len(sample.text.tokens) + item.max_new_tokens > builder.sequence_length:
        raise ValueError(
            f"{item.source}: a prompt of {len(sample.text.tokens)} tokens and an answer of"
            f" {item.max_new_tokens} are more than sequence_length={builder.sequence_length}"
        )
    return replace(sample, source=item.source), asked


def count(text: str, builder: Any, plain: bool = False) -> int:
    """Return the tokens of a prompt with a user's text, however long it is."""
    if plain:
        return len(_plain(text, builder))
    wide = copy.copy(builder)
    wide.sequence_length = 2**31
    return int(wide.prompt(plain_question(text, [], "question")).num_tokens)


def without_middle(text: str, count: Callable[[str], int], builder: Any) -> str:
    """Return a text whose prompt has at most `builder.sequence_length` tokens.

    Of a longer one the first and the last tokens stay, half and half, as LongBench and
    InfiniteBench cut; each half is decoded by itself.
    """
    tokens = count(text)
    limit = builder.sequence_length
    ids = builder.tokenizer.encode(text) if tokens > limit else []
    room = len(ids)
    cut = text
    while tokens > limit:
        # Decoded and encoded again, a text may have other tokens: what is too much goes.
        room -= tokens - limit
        if room < 2:
            raise ValueError(f"sequence_length={limit} leaves no room for a question")
        halves = ids[: room // 2], ids[-(room // 2) :]
        cut = "".join(builder.tokenizer.decode(half) for half in halves)
        tokens = count(cut)
    return cut


def _sample(text: str, builder: Any, item: Item) -> Sample:
    if not item.plain:
        return builder.prompt(plain_question(text, [], item.source))
    tokens = torch.tensor(_plain(text, builder))
    return Sample((Text(tokens, torch.zeros(len(tokens))),), source=item.source)


def _plain(text: str, builder: Any) -> list[int]:
    """Return the tokens of a text without a template, behind the BOS that the template has."""
    words = builder.tokenizer
    first = [words.bos_id] if getattr(builder.template, "bos", False) else []
    return [*first, *words.encode(text)]


def task_records(
    folder: str,
    only: Sequence[str] | None,
    prompts: Mapping[str, str],
    max_new_tokens: Mapping[str, int],
    metrics: Mapping[str, Any],
    suffix: str = "",
) -> list[tuple[str, str, dict[str, Any]]]:
    """Return source, task and record of each question of a folder's TASK.jsonl, task by task.

    only: tasks to read; None: all of `prompts`. suffix: behind a task's name in its file's name.
    Raises ValueError for a task that lacks a prompt, a length or a metric, and for bad files.
    """
    tasks = list(prompts) if only is None else list(only)
    for task in tasks:
        if task not in metrics or task not in prompts or task not in max_new_tokens:
            raise ValueError(
                f"benchmark.only: {task} is no task with a prompt, max_new_tokens and a metric;"
                f" use some of {', '.join(metrics)}"
            )
    records = []
    for task in tasks:
        path = Path(folder).expanduser() / f"{task}{suffix}.jsonl"
        read = read_records(path, "benchmark.folder")
        records += [(f"{path}:{number}", task, record) for number, record in enumerate(read)]
    return records


def read_records(path: str | Path, key: str) -> list[dict[str, Any]]:
    """Return the objects of a .json list or a .jsonl file.

    Raises ValueError, naming `key` of the config, for a file that cannot be read or has none.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix == ".json":
            records = json.loads(file.read_text(encoding="utf-8-sig"))
        else:
            records = list(read_lines(file))
    except OSError as error:
        raise ValueError(f"{key}: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{key}: {file} is no JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{key}: {file} must have a list of records")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{key}: {file}: record {number} is no object")
    return records
