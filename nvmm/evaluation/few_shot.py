"""In-context learning: a question behind solved examples of the training split, images between."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nvmm.data.samples.record import is_picture
from nvmm.evaluation.benchmark import Example, Questions

if TYPE_CHECKING:
    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.shots import Shots
    from nvmm.inference.restore import Restored

_DRAWN = 64
"""Examples that are drawn for a question; of them the first that can be read are shown."""


@dataclass(frozen=True, kw_only=True)
class FewShot(Questions):
    """`Questions`, each behind `shots` examples with their images and answers.

    VILA's paper has 0 and 4 shots and does not say how they were chosen. Here a question's key and
    the seed choose them from the training split, the same for every model; those of 4 shots are the
    first of 8. An example is passed over that has no accepted answer, cannot be read, or has a
    picture of the question.

    Args:
        shots: examples before a question.
        train: file patterns of the training split's shards, which the examples are drawn from.
        seed: of the choice.
        layout: turns of a chat, or one document as a pretrained model reads it.
        separator: between the blocks of a document. answer_separator: between a question and its
            answer there.
    """

    shots: int
    train: str | Sequence[str]
    seed: int = 0
    layout: Shots = "turns"
    separator: str = "\n"
    answer_separator: str = " "

    def __post_init__(self) -> None:
        if not 0 <= self.shots <= _DRAWN:
            raise ValueError(f"benchmark.shots={self.shots} must be in 0..{_DRAWN}")

    def data(self, model: Restored) -> Any:
        """Return the questions; ValueError where examples would be drawn from among them."""
        questions = super().data(model)
        both = {*questions.shards} & {*self._examples(model.builder).shards}
        if both:
            raise ValueError(
                f"benchmark.train={self.train} has {min(both)}, which the questions are of"
            )
        return questions

    def ask(self, members: Mapping[str, Any], builder: Builder) -> Example:
        """Return the question in one sample's members, behind its examples."""
        from nvmm.data.samples.instruct import InstructBuilder

        plain = super().ask(members, builder)
        if not isinstance(builder, InstructBuilder):
            raise ValueError(f"{type(builder).__name__} puts no examples before a question")
        prompt = builder.few_shot(
            members,
            self._chosen(members, builder),
            suffix=f"\n{self.suffix}" if self.suffix else "",
            layout=self.layout,
            separator=self.separator,
            answer_separator=self.answer_separator,
        )
        return Example(prompt, plain.question, plain.answers, plain.kind)

    def _examples(self, builder: Builder) -> Any:
        return _dataset(tuple([self.train] if isinstance(self.train, str) else self.train), builder)

    def _chosen(self, asked: Mapping[str, Any], builder: Builder) -> list[Mapping[str, Any]]:
        """Return the examples of a question. Raises ValueError where there are not enough."""
        dataset = self._examples(builder)
        shown = _pictures(asked)
        # A text as seed is hashed with SHA-512: the same on every machine.
        draw = random.Random(f"{self.seed}/{asked['__key__']}")
        found: list[Mapping[str, Any]] = []
        for number in draw.sample(range(len(dataset)), min(_DRAWN, len(dataset))):
            if len(found) == self.shots:
                break
            members = dataset.members(number)
            try:
                answers = builder.references(members)
                builder.prompt(members)  # A picture may be damaged behind its header.
            except ValueError:
                continue
            if answers and not shown & _pictures(members):
                found.append(members)
        if len(found) < self.shots:
            raise ValueError(
                f"benchmark.train={self.train} gives {len(found)} of {self.shots} examples"
            )
        return found


def _pictures(members: Mapping[str, Any]) -> set[bytes]:
    """Return the bytes of a sample's pictures."""
    return {value for name, value in members.items() if is_picture(name)}


@lru_cache(maxsize=4)
def _dataset(shards: tuple[str, ...], builder: Builder) -> Any:
    from nvmm.data.shards.dataset import Dataset

    return Dataset(list(shards), builder)
