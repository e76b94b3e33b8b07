"""Members of a shard become a `Sample`: images are tiled, turns rendered, and both made to fit.

A form reads the turns from a sample (`nvmm.data.samples.forms`), under the names that `fields`
gives (`nvmm.data.samples.record`). The builder then goes four steps: the turns and the images'
sizes are an `Example`; the most tiles that fit are looked for, rendering the turns with each limit;
the images are cut to that many tiles; tiles and tokens are put together as a `Text`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from nvmm.batch import ATTENDED_IMAGE, IMAGE, MediaKind, Sample, Text
from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.chat import (
    CONTEXT,
    DOCUMENT,
    IMAGE_MARKER,
    Attended,
    ImageTags,
    Template,
    Turn,
    render,
)
from nvmm.data.samples.decode import IMAGES, Limits
from nvmm.data.samples.forms import Chat, Document, Example, Form
from nvmm.data.samples.images import (
    MAX_PIXELS,
    ImageLayout,
    ImageOrSize,
    Tiles,
    choose_grid,
    square,
    tile_image,
)
from nvmm.data.samples.record import PLAIN, Fields, Record, check_fields
from nvmm.data.samples.rendered import Rendered, without_late_images
from nvmm.data.samples.shots import Shots, few_shot, unanswered
from nvmm.data.samples.tile_media import tile_media
from nvmm.data.samples.tokenizer import Tokenizer

TILE_LADDER = (12, 8, 6, 4, 2, 1)
"""The tile limits that are tried in turn until a sample fits (Megatron-LM's ladder)."""
Supervise = Literal["all", "last"]


class InstructBuilder(Builder):
    """A builder of training examples and prompts from the members of one sample.

    template, tags: see `nvmm.data.samples.chat`.
    tokens_per_tile: placeholders of a tile, after the model's downsampling.
    min_tiles, max_tiles: limits of the grid; the thumbnail comes on top. 1 and 1: a plain resize.
    max_pixels: larger images are refused before they are decompressed.
    attended: tiles that stay outside the sequence for cross-attention to read: none (NVLM-D),
        regular (all but the thumbnail; their tags go in front of their keys: NVLM-H) or all (their
        tags stand in the text: NVLM-X).
    form: reads the turns of a sample; null: Chat().
    fields, unread: see `Builder`.
    pad: colour [R, G, B] that fills an image up to a square before it is cut; null: nothing does.
    drop_images: cut an over-long sample at the first image that does not fit whole, and leave it
        and those behind it out, counted as `dropped` (VILA). false: a conversation that cannot
        keep its images is a bad sample, and a document ends before the first that does not fit.
    sequence_length: an over-long sample gets fewer tiles (12, 8, 6, 4, 2, 1), then loses text at
        its end; no image is ever cut in two. Attended tiles take no positions, so text is cut
        first. Where the answer rests on contexts, they lose their end, and the turns are never cut.
    supervise: the answers that are trained: all, or the last one alone, as ChatQA is.

    names: fields that are read beside the form's.
    end: text behind a conversation and not behind a prompt; a parameter of the builders of reward
        models, which read the score there.
    """

    names: ClassVar[tuple[str, ...]] = ()
    only_last = False
    end: str = ""
    pad: tuple[int, int, int] | None = None
    drop_images: bool = False

    def __init__(
        self,
        template: Template,
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
        supervise: Supervise = "all",
        pad: Sequence[int] | None = None,
        drop_images: bool = False,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("supervise", supervise, Supervise)
        if tokens_per_tile < 1 or tile_size < 1:
            raise ValueError(
                f"tokens_per_tile={tokens_per_tile}, tile_size={tile_size}: both must be at least 1"
            )
        if not 1 <= min_tiles <= max_tiles:
            raise ValueError(f"min_tiles={min_tiles}, max_tiles={max_tiles}: need 1 <= min <= max")
        require("attended", attended, Attended)
        if attended != "none" and tags.form != "megatron":
            raise ValueError(
                f"tags.form={tags.form} with attended={attended}: a tag that is tokenised together"
                " with its neighbours has no tokens of its own; use megatron"
            )
        if drop_images and attended != "none":
            raise ValueError(
                f"drop_images=true with attended={attended}: attended tiles take no positions, so"
                " that none has to be left out; use drop_images=false"
            )
        template = template.bound(tokenizer)
        super().__init__(
            fields,
            Limits(max_pixels=max_pixels),
            unread,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
        )
        self.template = template
        self.tags = tags
        self.tokens_per_tile = tokens_per_tile
        self.tile_size = tile_size
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.attended = attended
        self.form = form or Chat()
        check_fields(self.fields, (*self.form.names, *self.names), unread)
        # These are part of the digest of token counts only where they are set.
        if template.joins(tokenizer):
            # Token counts that were kept when turns were tokenised apart are of other ids.
            self.joined = True
        if supervise == "last":  # As with `joined`: other digests stay as they were.
            self.only_last = True
        if pad is not None:
            self.pad = _colour(pad)
        if drop_images:
            self.drop_images = True

    def reads(self, member: str) -> bool:
        """Return whether it is the record's, one that `fields` names, or else a picture."""
        if not super().reads(member):
            return False
        pictures = "image" not in self.fields and member.rpartition(".")[2] in IMAGES
        return pictures or member in self.named()

    @property
    def media(self) -> frozenset[MediaKind]:
        """The placements that the tiles of images have."""
        kinds = {"none": [IMAGE], "regular": [IMAGE, ATTENDED_IMAGE], "all": [ATTENDED_IMAGE]}
        return frozenset(kinds[self.attended])

    @property
    def stop_ids(self) -> list[int]:
        """The template's end of an answer, and the tokenizer's ends of a turn and of a text."""
        return list(dict.fromkeys([self.template.end_token(self.tokenizer)[1], *super().stop_ids]))

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training example.

        members: extension -> bytes, and `__url__`, `__key__` (shard and key, as webdataset has).

        Raises BadSample naming both for damaged members, a wrong number of image markers, a
        placeholder written in the text, no supervised token, and media that cannot fit.
        """
        return self._build(members, prompt=False)

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample up to where its last assistant turn begins, without supervision.

        A question (members with `__plain__`) is a user's turn, or the beginning of a document,
        whatever the form of training reads.

        suffix: text behind the last turn of a user; BadSample where that is not the last one.
        """
        return self._build(members, prompt=True, suffix=suffix)

    def asking(self, form: Form | None = None, reserve: int = 0) -> InstructBuilder:
        """Return a builder for the prompts of records under our own names of fields
        (`record.members_of`).

        form: reads them; None: the one of training. reserve: tokens that a prompt leaves free for
        its answer: its contexts are cut, or it is a BadSample.

        Raises ValueError where nothing would be left.
        """
        if not 0 <= reserve < self.sequence_length:
            raise ValueError(
                f"{reserve} tokens for an answer, and data.sequence_length={self.sequence_length}"
            )
        other = copy.copy(self)
        other.form = form or self.form
        other.fields, other.unread = {}, ()
        other.sequence_length = self.sequence_length - reserve
        return other

    def answer_tokens(self, text: str) -> list[int]:
        """Return the tokens of an answer's beginning as they follow a prompt.

        A space that the model writes first is of them: ` True` behind `Assistant:`.
        """
        ahead = self.template.lead(self.tokenizer)[1]
        return self.tokenizer.encode_pieces([ahead + text], continued=True)[0]

    def few_shot(
        self,
        members: Mapping[str, Any],
        shots: Sequence[Mapping[str, Any]],
        *,
        suffix: str = "",
        layout: Shots = "turns",
        separator: str = "\n",
        answer_separator: str = " ",
    ) -> Sample:
        """Return a sample's prompt behind solved examples, whose images stand in their places.

        shots: members of samples that each have an answer. suffix: text behind every question.
        separator: between the examples of a document; answer_separator: between a question and its
        answer there.

        Raises BadSample naming the sample that is no question with an answer.
        """
        source, asked = self._example(members, Record.images)
        solved = [self._example(shot, Record.images) for shot in shots]
        example = few_shot(
            (source, asked), solved, suffix, layout, separator, answer_separator=answer_separator
        )
        return self._sample(example, source, prompt=True)

    def conversation(self, turns: Sequence[Turn], source: str, *, prompt: bool = False) -> Sample:
        """Return a whole conversation without pictures, as a reward model scores it.

        prompt: up to where the next answer begins, as a model is asked for it.

        Raises BadSample where it is longer than `sequence_length`: cut, it would be another one.
        """
        rendered = self._render(turns, [], self.max_tiles, source, prompt)
        if len(rendered.tokens) > self.sequence_length:
            raise BadSample(
                source,
                f"a text of {len(rendered.tokens)} tokens, and data.sequence_length="
                f"{self.sequence_length}",
            )
        return Sample((self._text(rendered, [], source),), source=source)

    def question(self, members: Mapping[str, Any]) -> str:
        """Return the text of the last turn of a user, or the document, without image markers."""
        turns = self._example(members, Record.sizes)[1].turns
        asked = [turn.text for turn in turns if turn.role in ("user", DOCUMENT)]
        return asked[-1].replace(IMAGE_MARKER, "").strip() if asked else ""

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """Return the accepted answers to `prompt(members)`; empty where the sample has none."""
        return self._example(members, Record.sizes)[1].accepted

    def measure(self, members: Mapping[str, Any]) -> tuple[int, int]:
        """Return tokens and tiles of the training example, from text and the images' headers."""
        source, example = self._example(members, Record.sizes)
        rendered, _ = self._fit_example(example, source, prompt=False)
        return len(rendered.tokens), len(rendered.positions) + len(rendered.attended)

    def _example(
        self, members: Mapping[str, Any], read: Callable[[Record], Sequence[ImageOrSize]]
    ) -> tuple[str, Example]:
        """Return source and example; `read` gives the images, or their sizes."""
        record = self.record(members)
        if PLAIN in members:
            example = Chat()(record, read(record))
            if isinstance(self.form, Document):
                turns = [Turn(DOCUMENT, example.turns[0].text)]
                example = replace(example, turns=turns)
            return record.source, example
        example = self.form(record, read(record))
        if example.turns[0].role == DOCUMENT and not self.drop_images:
            example = self._cut(example, record.source)
        elif self.only_last:
            earlier = [replace(turn, trained=False) for turn in example.turns[:-1]]
            example = replace(example, turns=[*earlier, example.turns[-1]])
        return record.source, example

    def _build(self, members: Mapping[str, Any], *, prompt: bool, suffix: str = "") -> Sample:
        source, example = self._example(members, Record.images)
        # A prompt ends before the last answer.
        turns = unanswered(example.turns) if prompt else example.turns
        if suffix:
            if not turns or turns[-1].role != "user":
                raise BadSample(source, f"no user's turn to put {suffix!r} behind")
            turns = [*turns[:-1], replace(turns[-1], text=turns[-1].text + suffix)]
        return self._sample(replace(example, turns=turns), source, prompt)

    def _sample(self, example: Example, source: str, prompt: bool) -> Sample:
        """Return the sample of an example whose images are decoded."""
        # The images are cut under the limit that the turns were rendered with.
        rendered, limit = self._fit_example(example, source, prompt)
        if (
            not prompt
            and not any(rendered.weights[1:])
            and len(rendered.tiles) < len(example.images)
        ):
            raise BadSample(
                source,
                f"no supervised token before the image that does not fit in data.sequence_length="
                f"{self.sequence_length}",
            )
        if not prompt and not any(rendered.weights):
            where = " at its end" if self.only_last else ""
            raise BadSample(source, f"no supervised token; a sample needs an assistant turn{where}")
        weights = [0.0] * len(rendered.weights) if prompt else rendered.weights
        kept = example.images[: len(rendered.tiles)]
        text = self._text(replace(rendered, weights=weights), self._tiles(kept, limit), source)
        return Sample((text,), source=source, dropped=len(example.images) - len(kept))

    def _tiles(self, images: Sequence[ImageOrSize], limit: int) -> list[Tiles]:
        """Cut the images under the limit that a text was rendered with, to the tiles it has."""
        return [
            tile_image(
                image,
                min_tiles=min(self.min_tiles, limit),
                max_tiles=limit,
                tile_size=self.tile_size,
                use_thumbnail=self.use_thumbnail,
                pad=self.pad,
            )
            for image in images
            if isinstance(image, Image.Image)
        ]

    def _text(self, rendered: Rendered, tiles: Sequence[Tiles], source: str) -> Text:
        """Return a rendered text with its tiles.

        Raises BadSample for a placeholder that the text itself contains: it would take a tile's
        feature.
        """
        count = rendered.tokens.count(self.tokenizer.image_id)
        expected = self.tokens_per_tile * len(rendered.positions)
        if count != expected:
            raise BadSample(
                source,
                f"{count} placeholders {self.tokenizer.image_token}, but the tiles need "
                f"{expected}; the text must not contain the placeholder itself",
            )
        return Text(
            torch.tensor(rendered.tokens),
            torch.tensor(rendered.weights),
            tile_media(
                tiles,
                rendered,
                self.attended,
                tokens_per_tile=self.tokens_per_tile,
                placeholder_id=self.tokenizer.image_id,
            ),
        )

    def _fit_example(self, example: Example, source: str, prompt: bool) -> tuple[Rendered, int]:
        """Render with as many tiles, and then as much of the contexts, as fit; see `_fit`.

        Raises BadSample for turns that must not be cut and are too long, and where no context would
        be left.
        """
        contexts, length = example.contexts, self.sequence_length
        if not example.whole:
            return self._fit(example.turns, example.images, source, prompt)
        rendered, limit = self._tiled(_resting(example), example.images, source, prompt)
        while len(rendered.tokens) > length and contexts is not None and contexts.may_cut:
            contexts = contexts.shortened(len(rendered.tokens) - length, self.tokenizer)
            if contexts is not None:
                turns = _resting(replace(example, contexts=contexts))
                rendered = self._render(turns, example.images, limit, source, prompt)
        if len(rendered.tokens) <= length:
            return rendered, limit
        lost = " and lose every context" if example.contexts is not None else ""
        raise BadSample(
            source,
            f"needs {len(rendered.tokens)} tokens, and data.sequence_length={length} would cut its"
            f" turns{lost}",
        )

    def _fit(
        self, turns: Sequence[Turn], images: Sequence[ImageOrSize], source: str, prompt: bool
    ) -> tuple[Rendered, int]:
        """Render with as many tiles as fit; return the rendering and the tile limit used.

        Raises BadSample when not even one tile an image, and text cut at its end, fit.
        """
        # 1. Try fewer and fewer tiles.
        for limit in self._limits(images):
            rendered = self._render(turns, images, limit, source, prompt)
            if len(rendered.tokens) <= self.sequence_length:
                return rendered, limit
            if self.attended != "none" and not prompt and self._may_be_cut(rendered):
                break  # Attended tiles take no positions: fewer would save next to nothing.
        # 2. Cut text at the end, as long as all media and some answer stay.
        needed, length = len(rendered.tokens), self.sequence_length
        if self.drop_images and not prompt:
            return without_late_images(rendered, self.tokens_per_tile, length), limit
        if prompt or not self._may_be_cut(rendered):
            raise BadSample(
                source,
                f"needs {needed} tokens with one tile an image, and cutting text at "
                f"data.sequence_length={length} would cut "
                f"{'the prompt' if prompt else 'an image or every answer'}",
            )
        return self._cut_end(rendered), limit

    def _tiled(
        self, turns: Sequence[Turn], images: Sequence[ImageOrSize], source: str, prompt: bool
    ) -> tuple[Rendered, int]:
        """Render with as many tiles as fit, or else with the fewest, which are too long still;
        return the rendering and the tile limit used."""
        for limit in self._limits(images):
            rendered = self._render(turns, images, limit, source, prompt)
            if len(rendered.tokens) <= self.sequence_length:
                break
        return rendered, limit

    def _limits(self, images: Sequence[ImageOrSize]) -> list[int]:
        """Return the tile limits to try; a sample without images has nothing to give up."""
        ladder = [self.max_tiles, *(limit for limit in TILE_LADDER if limit < self.max_tiles)]
        return ladder if images else ladder[:1]

    def _may_be_cut(self, rendered: Rendered) -> bool:
        """Return whether all media and some answer stand within the sequence length."""
        length = self.sequence_length - len(self.end_ids)
        return max(self._ends(rendered), default=0) <= length and any(rendered.weights[:length])

    def _cut_end(self, rendered: Rendered) -> Rendered:
        """Cut the end of a text in front of `end`, to the sequence length."""
        stop = len(rendered.tokens) - len(self.end_ids)
        start = min(stop, self.sequence_length - len(self.end_ids))
        return replace(
            rendered,
            tokens=[*rendered.tokens[:start], *rendered.tokens[stop:]],
            weights=[*rendered.weights[:start], *rendered.weights[stop:]],
        )

    def _ends(self, rendered: Rendered) -> list[int]:
        """Return the ends of every tile's placeholders in the sequence, or of its tag."""
        placed = [start + self.tokens_per_tile for start in rendered.positions]
        return placed + [tile.stop for tile in rendered.attended]

    def _render(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageOrSize],
        limit: int,
        source: str,
        prompt: bool = False,
    ) -> Rendered:
        """Render the turns with at most `limit` tiles an image, at any length."""
        layouts = [
            ImageLayout.of(
                choose_grid(
                    *((image.width, image.height) if self.pad is None else square(image)),
                    min_tiles=min(self.min_tiles, limit),
                    max_tiles=limit,
                    tile_size=self.tile_size,
                ),
                use_thumbnail=self.use_thumbnail,
            )
            for image in images
        ]
        rendered = render(
            turns,
            layouts,
            tokenizer=self.tokenizer,
            template=self.template,
            tags=self.tags,
            tile_size=self.tile_size,
            tokens_per_tile=self.tokens_per_tile,
            attended=self.attended,
            generation_prompt=prompt,
            source=source,
        )
        end = [] if prompt else self.end_ids
        return replace(
            rendered,
            tokens=[*rendered.tokens, *end],
            weights=[*rendered.weights, *[0.0] * len(end)],
        )

    @property
    def end_ids(self) -> list[int]:
        """The tokens of `end`."""
        return self.tokenizer.encode_pieces([self.end], continued=True)[0] if self.end else []

    def _cut(self, example: Example, source: str) -> Example:
        """Cut a document behind the last image that fits, with one tile an image."""
        document, images = example.turns[0], example.images
        if not images:
            return example
        rendered = self._render([document], images, 1, source)
        num_fitting = sum(end <= self.sequence_length for end in self._ends(rendered))
        text = IMAGE_MARKER.join(document.text.split(IMAGE_MARKER)[: num_fitting + 1])
        return replace(example, turns=[Turn(DOCUMENT, text)], images=images[:num_fitting])


def _resting(example: Example) -> list[Turn]:
    """Return the turns with that of the contexts behind the system's."""
    if example.contexts is None:
        return example.turns
    start = sum(turn.role == "system" for turn in example.turns[:1])
    block = Turn(CONTEXT, example.contexts.text)
    return [*example.turns[:start], block, *example.turns[start:]]


def _colour(values: Sequence[int]) -> tuple[int, int, int]:
    """Return a colour of three bytes. Raises ValueError for anything else."""
    listed = list(values) if isinstance(values, Sequence) else [values]
    if len(listed) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in listed):
        raise ValueError(f"pad={values} must be three numbers of 0..255: red, green, blue")
    red, green, blue = listed
    return red, green, blue
