"""In-context learning: a question behind solved examples of the training split, with their media.

The examples are drawn, or they are the question's neighbours that another program has found, as
job=few_shot finds those of sounds: retrieval-augmented generation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from nvmm.config.choices import require
from nvmm.data.samples.clip_words import Interleaved
from nvmm.data.samples.record import is_picture, is_sound
from nvmm.evaluation.benchmark import Example, Questions

if TYPE_CHECKING:
    from nvmm.batch import Sample
    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.shots import Shots
    from nvmm.inference.restore import Restored

Order = Literal["nearest_last", "shuffled"]
_DRAWN = 64
"""Examples that are drawn for a question; of them the first that can be read are shown."""
_FILE = "neighbours.jsonl"


@dataclass(frozen=True, kw_only=True)
class FewShot(Questions):
    """`Questions`, each behind `shots` examples with their images or sounds and their answers.

    VILA's paper has 0 and 4 shots and does not say how they were chosen. Here a question's key and
    the seed choose them from the training split, the same for every model; those of 4 shots are the
    first of 8. An example is passed over that has no accepted answer, cannot be read, or has a
    picture or sound of the question.

    Args:
        shots: examples before a question.
        train: file patterns of the training split's shards, which the examples are of.
        neighbours: an output of job=few_shot, whose neighbours of each question, the nearest
            first, are taken in place of a draw. Its neighbours.jsonl has lines of `id` and
            `neighbours`, samples as SHARD:KEY, and `interleaved`: similar or random.
        order: of neighbours: shuffled by the seed, as Audio Flamingo is trained, or the nearest one
            before the question.
        seed: of the choice, and of the order.
        layout: turns of a chat, or one document as a pretrained model reads it; of pictures.
        separator: between the blocks of a document. answer_separator: between a question and its
            answer there.
    """

    shots: int
    train: str | Sequence[str]
    neighbours: str | None = None
    order: Order = "shuffled"
    seed: int = 0
    layout: Shots = "turns"
    separator: str = "\n"
    answer_separator: str = " "

    def __post_init__(self) -> None:
        super().__post_init__()
        require("benchmark.order", self.order, Order)
        if not 0 <= self.shots <= _DRAWN:
            raise ValueError(f"benchmark.shots={self.shots} must be in 0..{_DRAWN}")
        if self.neighbours is None and self.order != "shuffled":
            raise ValueError(f"benchmark.order={self.order} is of benchmark.neighbours; give both")

    def data(self, model: Restored) -> Any:
        """Return the questions; ValueError where examples would be drawn from among them."""
        questions = super().data(model)
        examples = self._examples(model.builder)
        both = {*questions.shards} & {*examples.shards}
        if both:
            raise ValueError(
                f"benchmark.train={self.train} has {min(both)}, which the questions are of"
            )
        return _Asked(questions, [examples.fingerprint, self._found[0]])

    def ask(self, members: Mapping[str, Any], builder: Builder) -> Example:
        """Return the question in one sample's members, behind its examples."""
        plain = super().ask(members, builder)
        how, chosen = self._chosen(members, builder)
        prompt = self._prompt(members, chosen, how, builder)
        return Example(
            prompt, plain.question, plain.answers, plain.kind, plain.metric, options=plain.options
        )

    def _prompt(
        self,
        members: Mapping[str, Any],
        chosen: Sequence[Mapping[str, Any]],
        how: Interleaved,
        builder: Builder,
    ) -> Sample:
        """Return the prompt with its examples, as the builder writes them."""
        from nvmm.data.samples.instruct import InstructBuilder
        from nvmm.data.samples.listening import SoundBuilder

        suffix = f"\n{self.suffix}" if self.suffix else ""
        if isinstance(builder, SoundBuilder):
            if (self.layout, self.separator, self.answer_separator) != ("turns", "\n", " "):
                raise ValueError(
                    "benchmark.layout, separator and answer_separator do nothing with sounds, which"
                    " stand as the builder's template says"
                )
            return builder.few_shot(members, chosen, suffix=suffix, interleaved=how)
        if not isinstance(builder, InstructBuilder):
            raise ValueError(f"{type(builder).__name__} puts no examples before a question")
        return builder.few_shot(
            members,
            chosen,
            suffix=suffix,
            layout=self.layout,
            separator=self.separator,
            answer_separator=self.answer_separator,
        )

    def _examples(self, builder: Builder) -> Any:
        return _dataset(tuple([self.train] if isinstance(self.train, str) else self.train), builder)

    @property
    def _found(self) -> tuple[str, Mapping[str, tuple[Interleaved, list[str]]]]:
        """A digest of the neighbours, and question -> how they were found, and they."""
        if self.neighbours is None:
            return "", {}
        path = Path(self.neighbours).expanduser() / _FILE
        if not path.is_file():
            raise ValueError(f"benchmark.neighbours={self.neighbours} has no {_FILE}")
        return _lines(path, path.stat().st_mtime_ns)

    def _chosen(
        self, asked: Mapping[str, Any], builder: Builder
    ) -> tuple[Interleaved, list[Mapping[str, Any]]]:
        """Return how the examples of a question were chosen, and they in their order.

        Raises ValueError where there are not enough.
        """
        if not self.shots:
            return "random", []
        dataset = self._examples(builder)
        # A text as seed is hashed with SHA-512: the same on every machine.
        draw = random.Random(f"{self.seed}/{asked['__key__']}")
        if self.neighbours is None:
            how: Interleaved = "random"
            numbers = draw.sample(range(len(dataset)), min(_DRAWN, len(dataset)))
            where = f"benchmark.train={self.train}"
        else:
            how, numbers = self._neighbours(asked, dataset)
            where = f"benchmark.neighbours={self.neighbours}"
        found = list(self._readable(asked, dataset, numbers, builder))
        if len(found) < self.shots:
            raise ValueError(f"{where} gives {len(found)} of {self.shots} examples")
        if self.neighbours is not None:
            found.reverse()
            if self.order == "shuffled":
                draw.shuffle(found)
        return how, found

    def _neighbours(self, asked: Mapping[str, Any], dataset: Any) -> tuple[Interleaved, list[int]]:
        """Return how the neighbours of a question were found, and their numbers, nearest first."""
        name = f"{Path(str(asked['__url__'])).name}:{asked['__key__']}"
        lines = self._found[1]
        if name not in lines:
            raise ValueError(f"benchmark.neighbours={self.neighbours} has none of {name}")
        how, names = lines[name]
        places = _places(dataset)
        if lost := [one for one in names if one not in places]:
            raise ValueError(
                f"benchmark.neighbours={self.neighbours}: {lost[0]} is not in"
                f" benchmark.train={self.train}"
            )
        return how, [places[one] for one in names]

    def _readable(
        self,
        asked: Mapping[str, Any],
        dataset: Any,
        numbers: Sequence[int],
        builder: Builder,
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the first samples that can be examples of a question, at most `shots`."""
        shown, count = _media(asked), 0
        for number in numbers:
            if count == self.shots:
                return
            members = dataset.members(number)
            try:
                answers = builder.references(members)
                builder.prompt(members)  # A picture may be damaged behind its header.
            except ValueError:
                continue
            if answers and not shown & _media(members):
                count += 1
                yield members


@dataclass(frozen=True)
class _Asked:
    """Questions, told from others by what their examples are too. more: as JSON."""

    dataset: Any
    more: list[Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def members(self, number: int) -> dict[str, Any]:
        """Return the members of a question."""
        found: dict[str, Any] = self.dataset.members(number)
        return found

    @property
    def fingerprint(self) -> list[Any]:
        """What tells these questions and examples from others."""
        return [*self.dataset.fingerprint, *self.more]


def _media(members: Mapping[str, Any]) -> set[bytes]:
    """Return the bytes of a sample's pictures and sounds."""
    return {value for name, value in members.items() if is_picture(name) or is_sound(name)}


@lru_cache(maxsize=4)
def _dataset(shards: tuple[str, ...], builder: Builder) -> Any:
    from nvmm.data.shards.dataset import Dataset

    return Dataset(list(shards), builder)


@lru_cache(maxsize=4)
def _places(dataset: Any) -> dict[str, int]:
    """Return SHARD:KEY -> number of every sample. Raises ValueError for two of one name."""
    shards = [Path(shard).name for shard in dataset.shards]
    of_samples = dataset.index.columns["shard"].tolist()
    names = [f"{shards[shard]}:{dataset.index.key(n)}" for n, shard in enumerate(of_samples)]
    places = {name: number for number, name in enumerate(names)}
    if len(places) < len(names):
        raise ValueError("two shards of benchmark.train have one name: rename one")
    return places


@lru_cache(maxsize=4)
def _lines(path: Path, written: int) -> tuple[str, dict[str, tuple[Interleaved, list[str]]]]:
    """Return a digest of the file, and question -> how its neighbours were found, and they.

    written: when the file was, so that another content is read anew.
    """
    found: dict[str, tuple[Interleaved, list[str]]] = {}
    content = path.read_bytes()
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            require("interleaved", line["interleaved"], Interleaved)
            names = [str(name) for name in line["neighbours"]]
            found[str(line["id"])] = cast("Interleaved", line["interleaved"]), names
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error!r})") from error
    return hashlib.sha256(content).hexdigest(), found
