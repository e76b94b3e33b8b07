"""Preference samples: the answers to one prompt as texts of one `Sample`, the chosen one first.

`nvmm.data.samples.pairs` lists the records that are read. Pictures are of the prompt, and both
texts have the same tiles of them. A text's extras are

- `chosen`: int64, 1 of the better or a desirable answer, else 0;
- `reward`: float32, the record's, NaN where it has none;
- `reference`: float32, only with the builder's `reference`: the log-probability that the reference
  gives to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from nvmm.batch import Sample, Text
from nvmm.config.choices import require
from nvmm.data.samples import pairs
from nvmm.data.samples import reference as reference_module
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import Attended, ChatTemplate, ImageTags
from nvmm.data.samples.forms import Example, Form
from nvmm.data.samples.images import MAX_PIXELS, ImageOrSize
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.pairs import Answer, Answers
from nvmm.data.samples.record import PLAIN, Fields, Record
from nvmm.data.samples.rendered import Rendered
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import builder_digest

TooLong = Literal["drop", "cut"]


class PreferenceBuilder(InstructBuilder):
    """A builder of samples of two texts, the prompt with the chosen and with the rejected answer,
    or of one text (KTO's unpaired records). Only the answers are supervised.

    Where texts are longer than `sequence_length`, both get as few tiles an image as it takes.

    too_long: what happens to a sample with a text that is longer still: "drop" it, or "cut" the end
        of its long answers; dropped too is a sample that a cut leaves without a part of a picture,
        without an answer, or with two equal ones. A dropped sample is a bad one: it takes its slot
        in the batch and no part in the loss.
    reference: folders of job=score's output over the same shards, by the checkpoint that training
        starts from and this builder; each text then has the extra `reference`.
    form: reads records that have no answers to prefer: questions to generate answers to.
    end: as `RewardBuilder`'s, for reward models that learn from pairs; a cut leaves it whole.
    sequence_length: longest text. A packed row has room for both texts of a sample, or the sample
        is a bad one.
    The others are as `InstructBuilder`'s.
    """

    extras = frozenset({"chosen", "reward"})
    names = pairs.NAMES
    compares = True

    def __init__(
        self,
        template: ChatTemplate,
        tags: ImageTags,
        tokens_per_tile: int,
        tile_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 6,
        use_thumbnail: bool = True,
        max_pixels: int = MAX_PIXELS,
        attended: Attended = "none",
        form: Form | None = None,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        too_long: TooLong = "drop",
        reference: str | Sequence[str] | None = None,
        end: str = "",
        pad: Sequence[int] | None = None,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("build.too_long", too_long, TooLong)
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
            form,
            fields,
            unread,
            pad=pad,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
        )
        self.too_long = too_long
        if end:  # An attribute that is always there would change the digest of scores.
            self.end = end
        self.reference: str | Sequence[str] | None = None
        if reference is not None:
            # Scores are of this builder's tokens and no others.
            if reference_module.read(reference).builder != builder_digest(self):
                raise ValueError(
                    f"build.reference={reference} was scored with another builder: build, tokenizer"
                    " and data.sequence_length must be those of the job"
                )
            self.reference = reference

    @property
    def most_texts(self) -> int:
        """The chosen and the rejected answer."""
        return 2

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return the sample of a pair, or of an unpaired answer.

        Raises BadSample naming shard and key for what `pairs.read` refuses, damaged members, a
        placeholder written in the text, and texts that are too long.
        """
        record = self.record(members)
        images = record.images()
        answers = pairs.read(record, len(images))
        rendered, limit = self._fit_all(answers, images, record.source)
        tiles = self._tiles(images, limit)
        texts = [
            _described(self._text(each, tiles, record.source), answer)
            for each, answer in zip(rendered, answers.answers, strict=True)
        ]
        if self.reference is not None:
            texts = self._referred(texts, record)
        return Sample(tuple(texts), source=record.source)

    def scored(self, members: Mapping[str, Any]) -> Sample:
        """Return the sample to score: the answers of a record, or a conversation that has none to
        prefer, and ends with an answer.

        Raises BadSample as for training; a conversation is not cut, which would be another one.
        """
        if pairs.is_preference(self.record(members)):
            return self(members)
        source, example = super()._example(members, Record.images)
        if example.turns[-1].role != "assistant":
            raise BadSample(source, "the last turn is not the assistant's: nothing is scored")
        rendered, limit = self._tiled(example.turns, example.images, source, prompt=False)
        if len(rendered.tokens) > self.sequence_length:
            raise BadSample(
                source,
                f"a text of {len(rendered.tokens)} tokens, and data.sequence_length="
                f"{self.sequence_length}",
            )
        text = self._text(rendered, self._tiles(example.images, limit), source)
        return Sample((_described(text, Answer([], True)),), source=source)

    def _referred(self, texts: list[Text], record: Record) -> list[Text]:
        """Return the texts with the reference's log-probabilities; BadSample where it has none."""
        assert self.reference is not None
        scored = reference_module.read(self.reference).rows.get(record.key, "no such key")
        if isinstance(scored, str):
            raise record.bad(f"build.reference has no scores of it: {scored}")
        tokens = [int((text.weights[1:] != 0).sum()) for text in texts]
        if tokens != [count for _, count in scored]:
            raise record.bad(
                f"build.reference has scores of {[count for _, count in scored]} tokens, its"
                f" answers have {tokens}: the record has changed"
            )
        return [
            replace(text, extras=text.extras | {"reference": torch.tensor(value)})
            for text, (value, _) in zip(texts, scored, strict=True)
        ]

    def measure(self, members: Mapping[str, Any]) -> tuple[int, int]:
        """Return tokens and tiles of the texts together, from the images' headers."""
        record = self.record(members)
        sizes = record.sizes()
        rendered, _ = self._fit_all(pairs.read(record, len(sizes)), sizes, record.source)
        tiles = sum(len(each.positions) + len(each.attended) for each in rendered)
        return sum(len(each.tokens) for each in rendered), tiles

    def blank(self, sample_id: int) -> Sample:
        """Return the sample that stands for a missing one; its negative id keeps it out of the
        loss."""
        extras = {"chosen": torch.tensor(0), "reward": torch.tensor(float("nan"))}
        if self.reference is not None:
            extras["reference"] = torch.tensor(0.0)
        text = Text(torch.tensor([self.tokenizer.pad_id]), torch.zeros(1), extras=extras)
        return Sample((text,), sample_id, "blank")

    def _example(
        self, members: Mapping[str, Any], read: Callable[[Record], Sequence[ImageOrSize]]
    ) -> tuple[str, Example]:
        """Return source and example of a prompt: of a pair, the turns that its answers follow."""
        record = self.record(members)
        if PLAIN in members or not pairs.is_preference(record):
            return super()._example(members, read)
        images = read(record)
        answers = pairs.read(record, len(images))
        good = [answer.turns for answer in answers.answers if answer.chosen]
        turns = [*answers.prompt, *(good[0][:1] if good else [])]
        return record.source, Example(turns, images, [good[0][0].text] if good else [])

    def _fit_all(
        self, answers: Answers, images: Sequence[ImageOrSize], source: str
    ) -> tuple[list[Rendered], int]:
        """Render the prompt with each answer, all with as many tiles as fit; return that limit.

        Raises BadSample for texts that are too long (see `too_long`), and where they are equal.
        """
        room = self.sequence_length
        for limit in self._limits(images):
            rendered = [
                self._render([*answers.prompt, *answer.turns], images, limit, source)
                for answer in answers.answers
            ]
            longest = max(len(each.tokens) for each in rendered)
            if longest <= room:
                break
            if self.attended != "none" and self.too_long == "cut":
                break  # Attended tiles take no positions: fewer would save next to nothing.
        if longest > room:
            what = f"a text of {longest} tokens, and data.sequence_length={room}"
            if self.too_long == "drop":
                raise BadSample(source, f"{what}; build.too_long=cut would cut the answer")
            if not all(map(self._may_be_cut, rendered)):
                raise BadSample(source, f"{what} would cut an image or the whole answer")
            rendered = [self._cut_end(each) for each in rendered]
        if not all(any(each.weights) for each in rendered):
            raise BadSample(source, "an answer has no supervised token")
        if len(rendered) > 1 and rendered[0].tokens == rendered[1].tokens:
            raise BadSample(source, "chosen and rejected are the same tokens")
        return rendered, limit


def _described(text: Text, answer: Answer) -> Text:
    """Return a text with the extras of its answer."""
    extras = {
        "chosen": torch.tensor(int(answer.chosen)),
        "reward": torch.tensor(answer.reward, dtype=torch.float32),
    }
    return replace(text, extras=extras)
