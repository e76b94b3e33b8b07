"""Samples of reward models that learn attributes: one conversation, and labels of its last answer.

The record holds

- `prompt` and `response` (HelpSteer2): the prompt is a text or a list of messages, the response a
  text. Turns before the last one stand in a text prompt behind `<extra_id_1>Assistant` and
  `<extra_id_1>User`, each on a line of its own. `system` is the system's text, where there is one.
- Or a conversation (`messages`, `conversations`), whose last turn is the assistant's.
- A number under the name of each attribute; null, NaN, -100 or no such key: no label.

The text's extra `attributes` is float32 [attributes], NaN where there is no label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from nvmm.batch import Sample, Text
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import Attended, ChatTemplate, ImageTags, Turn
from nvmm.data.samples.forms import Example, asked, check_beside, turns_of
from nvmm.data.samples.images import MAX_PIXELS, ImageOrSize
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.pairs import MOST
from nvmm.data.samples.record import PLAIN, Fields, Record
from nvmm.data.samples.rendered import Rendered
from nvmm.data.samples.tokenizer import Tokenizer

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
"""Begins a turn in a text prompt of HelpSteer2 (nvidia/HelpSteer2's card; unverified)."""
_UNLABELLED = -100
"""NeMo-Aligner's mark of a label that is not there."""


class RewardBuilder(InstructBuilder):
    """A builder of conversations whose last answer is labelled. Only that answer is supervised.

    The model's score is read at a text's last token: that of the template, or of `end`. So a text
    is never cut: with pictures it gets fewer tiles, and one that is longer still is a bad sample.

    attributes: names of the model's outputs, in their order, under which records have the labels.
    end: text behind the conversation, special tokens as a rule (Nemotron-4-340B-Reward:
        `<extra_id_2>`); "" for none.
    The others are as `InstructBuilder`'s; a form is not given.
    """

    extras = frozenset({"attributes"})
    names: ClassVar[tuple[str, ...]] = ("prompt", "response", "system")

    def __init__(
        self,
        template: ChatTemplate,
        tags: ImageTags,
        tokens_per_tile: int,
        attributes: Sequence[str],
        end: str = "",
        tile_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 6,
        use_thumbnail: bool = True,
        max_pixels: int = MAX_PIXELS,
        attended: Attended = "none",
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        pad: Sequence[int] | None = None,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        if isinstance(attributes, str) or not attributes or len({*attributes}) < len(attributes):
            raise ValueError(
                f"build.attributes={attributes} must list different names, at least one"
            )
        super().__init__(
            template,
            tags,
            tokens_per_tile,
            tile_size,
            min_tiles,
            max_tiles,
            use_thumbnail,
            max_pixels,
            attended,
            fields=fields,
            unread=unread,
            pad=pad,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
        )
        self.attributes = tuple(attributes)
        self.end = end

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training example.

        Raises BadSample naming shard and key for a record without a label, with a label that is no
        number, without an answer at its end, and for a text that is too long.
        """
        sample = self.scored(members)
        labels = sample.text.extras["attributes"]
        if bool(labels.isnan().all()):
            raise BadSample(sample.source, f"no label among {', '.join(self.attributes)}")
        return sample

    def scored(self, members: Mapping[str, Any]) -> Sample:
        """Return the sample to score, with or without labels."""
        source, example = self._example(members, Record.images)
        text = self._sample(example, source, prompt=False).text
        labels = self._labels(self.record(members))
        return Sample((replace(text, extras={"attributes": labels}),), source=source)

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Raise ValueError: a reward model answers nothing."""
        raise ValueError("a reward model makes no prompts: it scores answers")

    def blank(self, sample_id: int) -> Sample:
        """Return the sample that stands for a missing one; its negative id and its labels keep it
        out of the loss."""
        extras = {"attributes": torch.full((len(self.attributes),), math.nan)}
        text = Text(torch.tensor([self.tokenizer.pad_id]), torch.zeros(1), extras=extras)
        return Sample((text,), sample_id, "blank")

    def _example(
        self, members: Mapping[str, Any], read: Callable[[Record], Sequence[ImageOrSize]]
    ) -> tuple[str, Example]:
        record = self.record(members)
        if PLAIN in members or record.get("response") is None:
            source, example = super()._example(members, read)
        else:
            check_beside(record, ["system"])
            images = read(record)
            turns = [*_prompt(record, len(images)), Turn("assistant", record.text("response"))]
            source, example = record.source, Example(turns, images, [])
        if example.turns[-1].role != "assistant":
            raise BadSample(source, "the last turn is not the assistant's: nothing is scored")
        earlier = [replace(turn, trained=False) for turn in example.turns[:-1]]
        last = replace(example.turns[-1], trained=True)
        return source, replace(example, turns=[*earlier, last])

    def _fit(
        self, turns: Sequence[Turn], images: Sequence[ImageOrSize], source: str, prompt: bool
    ) -> tuple[Rendered, int]:
        """Render with as many tiles as fit; BadSample where not even one an image does."""
        rendered, limit = self._tiled(turns, images, source, prompt)
        if len(rendered.tokens) > self.sequence_length:
            raise BadSample(
                source,
                f"a text of {len(rendered.tokens)} tokens, and data.sequence_length="
                f"{self.sequence_length}: cut, it would be scored at another token",
            )
        return rendered, limit

    def _labels(self, record: Record) -> torch.Tensor:
        return torch.tensor([_label(record, name) for name in self.attributes])


def _label(record: Record, name: str) -> float:
    value = record.get(name)
    if value is None or value == _UNLABELLED or value != value:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
        raise record.bad(f"{name} must be a number of at most {MOST:g} in size, got {value!r}")
    return float(value)


def _prompt(record: Record, num_images: int) -> list[Turn]:
    """Return the turns of a prompt, which must end with a user's."""
    value = record.get("prompt")
    if value is None:
        raise record.missing("prompt")
    if isinstance(value, str):
        first, *rest = _TURN.split(record.checked_text("prompt", value))
        turns = asked(first, None, num_images)
        for role, text in zip(rest[::2], rest[1::2], strict=True):
            turns.append(Turn(role.lower(), text))
        if any("<extra_id_1>" in turn.text for turn in turns):
            raise record.bad("<extra_id_1> in the prompt is not in front of User or Assistant")
    else:
        turns = turns_of(record, value)
    system = record.get("system")
    if system is not None:
        if turns[0].role == "system":
            raise record.bad("it has a system text, and its messages have one too")
        turns = [Turn("system", record.checked_text("system", system)), *turns]
    if turns[-1].role != "user":
        raise record.bad("the prompt must end with a user's turn")
    return turns
