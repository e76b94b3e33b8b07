"""Tasks like RULER's: several needles with keys, and chains of variables.

Hsieh et al. 2024, "RULER" (arXiv:2404.06654). Sentences, questions and the metric (the share of the
answers that occur) are RULER's. Ours differ in keys, which are made of syllables instead of a list
of words, in variable tracking without a worked example, and in exact lengths. The originals come
with `benchmark=lm_eval` (niah_multikey_1 ..., ruler_vt).
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nvmm.evaluation.benchmark import Prediction, Result, Settings, summarize, table
from nvmm.evaluation.haystack import (
    Haystack,
    check_lengths,
    exactly,
    hidden,
    recall,
    refuse_max_new_tokens,
)
from nvmm.evaluation.items import Item, Items, Listed, TextBenchmark

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class RulerTask(Protocol):
    """A kind of question."""

    def question(
        self, draw: Random, length: int, text: Haystack | None, builder: Any
    ) -> tuple[str, list[str]]:
        """Return a question whose prompt has `length` tokens, and its answers.

        draw: all of the question's chance. text: the haystack, where the benchmark has one.
        """
        ...


@dataclass(frozen=True)
class MultiKey:
    """Numbers with keys, of which some keys' numbers are asked for (niah_multikey, multivalue ...).

    num_keys: keys in the text. num_values: numbers of each key that is asked for.
    num_queries: keys that are asked for.
    haystack: around them; `text` of files, `noise`, or `needles`: further keys (niah_multikey_2).
    """

    num_keys: int = 4
    num_values: int = 1
    num_queries: int = 1
    haystack: Literal["text", "noise", "needles"] = "text"

    def __post_init__(self) -> None:
        if not 0 < self.num_queries <= self.num_keys or self.num_values < 1:
            raise ValueError(
                f"num_queries={self.num_queries} must be from 1 to num_keys={self.num_keys}, and"
                f" num_values={self.num_values} at least 1"
            )

    def question(
        self, draw: Random, length: int, text: Haystack | None, builder: Any
    ) -> tuple[str, list[str]]:
        """Return a question and its answers, the numbers of the keys that are asked for."""
        if self.haystack == "text" and text is None:
            raise ValueError("haystack=text needs benchmark.haystack, text files")
        names = _words(draw, self.num_keys)
        numbers = iter(_distinct(draw, self.num_keys * self.num_values))
        values = {
            name: [str(next(numbers)) for _ in range(self.num_values if asked else 1)]
            for name, asked in zip(names, _first(self.num_queries, names), strict=True)
        }
        needles = [_needle(name, value) for name, some in values.items() for value in some]
        places = [draw.random() for _ in needles]
        start = draw.randrange(len(text)) if text is not None else 0
        others = draw.randrange(2**32)
        asked = names[: self.num_queries]
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        answers = [value for name in asked for value in values[name]]
        plural = len(answers) > 1

        def written(size: int, filler: str) -> str:
            if self.haystack == "text" and text is not None:
                hay = text.part(start, size).rstrip()
            else:
                hay = "\n".join(self._lines(size, set(names), others))
            hay = hidden(hay + filler, list(zip(places, needles, strict=True)))
            return _MULTIKEY[plural].format(context=hay, query=query)

        most = None if self.haystack == "text" else max(2, length // 4)
        return exactly(length, written, builder, most), answers

    def _lines(self, size: int, taken: set[str], seed: int) -> list[str]:
        """Return so many sentences around the needles."""
        if self.haystack == "noise":
            return [NOISE] * size
        draw = Random(seed)
        lines: list[str] = []
        while len(lines) < size:
            [name] = _words(draw, 1)
            number = draw.randrange(1_000_000, 10_000_000)
            if name not in taken:
                lines.append(_needle(name, str(number)))
        return lines


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in noise; the variables of one chain are asked for by their value.

    num_chains: chains, of which the first is asked for. num_hops: assignments behind its first.
    """

    num_chains: int = 1
    num_hops: int = 4

    def __post_init__(self) -> None:
        if self.num_chains < 1 or self.num_hops < 0:
            raise ValueError("num_chains must be at least 1, and num_hops at least 0")

    def question(
        self, draw: Random, length: int, text: Haystack | None, builder: Any
    ) -> tuple[str, list[str]]:
        """Return a question and its answers, the names of the chain's variables."""
        names: dict[str, None] = {}
        while len(names) < self.num_chains * (self.num_hops + 1):
            names["".join(draw.choices(string.ascii_uppercase, k=5))] = None
        numbers = _distinct(draw, self.num_chains, 10_000, 100_000)
        size = self.num_hops + 1
        chains = [list(names)[start : start + size] for start in range(0, len(names), size)]
        lines = []
        for chain, number in zip(chains, numbers, strict=True):
            values = [str(number), *(f"VAR {name}" for name in chain[:-1])]
            said = [f"VAR {name} = {value}" for name, value in zip(chain, values, strict=True)]
            lines.append(list(zip(sorted(draw.random() for _ in said), said, strict=True)))
        # A chain is in its order; chains are mixed.
        placed = sorted((line for chain in lines for line in chain), key=lambda line: line[0])

        def written(size: int, filler: str) -> str:
            hay, done = [], 0
            for number in range(size + 1):
                while done < len(placed) and placed[done][0] * (size + 1) < number + 1:
                    hay.append(placed[done][1])
                    done += 1
                if number < size:
                    hay.append(NOISE)
            context = "\n".join(hay) + filler
            return _TRACKING.format(context=context, query=numbers[0])

        return exactly(length, written, builder, max(2, length // 4)), chains[0]


@dataclass(frozen=True)
class Ruler(TextBenchmark):
    """Generated tasks at several lengths; the score of each is the mean share of its answers.

    Args:
        tasks: name -> `MultiKey` or `VariableTracking`.
        lengths: tokens of prompt and answer together; the prompt has exactly
            `length - max_new_tokens`.
        samples: questions of each task at each length.
        haystack: text files, for the tasks that use text.
        seed: a question depends on seed, task, length and its number alone.
        max_new_tokens: tokens of the longest answer (RULER's: 128, variable tracking 30).
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    tasks: Mapping[str, RulerTask]
    lengths: Sequence[int]
    samples: int = 100
    haystack: Sequence[str] = ()
    seed: int = 0
    max_new_tokens: int = 128
    name: str = "ruler"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths or self.samples < 1:
            raise ValueError("benchmark needs tasks, lengths and samples of 1 at least")

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.tasks={list(self.tasks)}"

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Ask; `max_new_tokens` is the benchmark's, as lengths depend on it."""
        refuse_max_new_tokens(settings)
        return super().run(model, settings, journal)

    def items(self, model: Restored) -> Items:
        """Return the questions of all tasks, task by task and length by length."""
        check_lengths(self.lengths, model)
        text = Haystack(self.haystack, model.builder) if self.haystack else None

        def make(source: str, key: str, about: Mapping[str, Any]) -> Item:
            draw = Random(f"{self.seed}/{source}/{key}")
            asked, answers = self.tasks[about["task"]].question(
                draw, about["length"] - self.max_new_tokens, text, model.builder
            )
            kind = f"{about['task']}/{about['length']}"
            return Item(
                f"{source}, {key}", key, kind, answers, recall, self.max_new_tokens, text=asked
            )

        digest = hashlib.sha256(text.text.encode() if text else b"").hexdigest()
        records = []
        for name, task in self.tasks.items():
            about = {"task": name, "options": repr(task), "haystack": digest}
            records += [
                (f"{name}, length {length}", str(number), {**about, "length": length})
                for length in self.lengths
                for number in range(self.samples)
            ]
        return Listed(records, make)

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return the score of each task at each length, and each length's mean over tasks."""
        summary = summarize(predictions)
        cells = {kind: group["score"] for kind, group in summary["kinds"].items()}
        lengths = {}
        for length in self.lengths:
            some = [v for kind, v in cells.items() if kind.rpartition("/")[2] == str(length)]
            if some:
                lengths[str(length)] = sum(some) / len(some)
        scores = {f"{self.name}_recall": {"overall": summary["score"], **cells}}
        return Result(summary | {"lengths": lengths}, scores, table(summary, self.name))


_MULTIKEY = {
    False: (
        "A special magic number is hidden within the following text. Make sure to memorize it. I"
        " will quiz you about the number afterwards.\n{context}\nWhat is the special magic number"
        " for {query} mentioned in the provided text?"
    ),
    True: (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic"
        " numbers for {query} mentioned in the provided text?"
    ),
}
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _first(count: int, names: Sequence[str]) -> list[bool]:
    return [number < count for number in range(len(names))]


def _words(draw: Random, count: int) -> list[str]:
    """Return so many different words of three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(3))] = None
    return list(words)


def _distinct(
    draw: Random, count: int, first: int = 1_000_000, last: int = 10_000_000
) -> list[int]:
    """Return so many different numbers, by default of seven digits."""
    return draw.sample(range(first, last), count)
