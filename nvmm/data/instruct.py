"""Chat and VQA samples: members of a shard -> `Sample`.

The member `json` holds one of

- `{"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}`
  (LLaVA's form; `messages` with `role` and `content` is read alike), or
- `{"question": ..., "answer": ...}` or `{"question": ..., "answers": [...]}`,

and the pictures are members `png`, `jpg`, `jpeg` or `webp`, numbered (`0.png`, `1.jpg`, ...) when
there are several. A sample without pictures is text only.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nvmm.batch import ATTENDED, IMAGE, Sample, SampleMedia
from nvmm.data.chat import (
    ATTENDED_CHOICES,
    IMAGE_MARKER,
    ChatTemplate,
    ImageLayout,
    ImageTags,
    Rendered,
    Turn,
    is_attended,
    render,
)
from nvmm.data.images import MAX_PIXELS, Tiles, choose_grid, decode_image, tile_image
from nvmm.data.tokenizer import Tokenizer

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TILE_LADDER = (12, 8, 6, 4, 2, 1)
"""Tile limits tried one after another until a sample fits (Megatron-LM's ladder)."""


class InstructBuilder:
    """Builds a training example, or a prompt, from the members of one sample.

    template, tags: see `nvmm.data.chat`.
    tokens_per_tile: placeholders a tile occupies, after the model's downsampling.
    min_tiles, max_tiles: limits of the grid; the thumbnail comes on top. 1 and 1: a plain resize.
    max_pixels: larger pictures are refused before they are decompressed.
    attended: which tiles stay outside the sequence for cross-attention to read: none (NVLM-D),
        regular (all but the thumbnail; their tags go in front of their keys: NVLM-H) or all (their
        tags stand in the text: NVLM-X).
    sequence_length: an over-long sample gets fewer tiles (12, 8, 6, 4, 2, 1), then loses text at
        its end; media are never cut. Attended tiles cost no places: text goes first.
    """

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
        attended: str = "none",
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        if tokens_per_tile < 1 or tile_size < 1:
            raise ValueError(
                f"tokens_per_tile={tokens_per_tile}, tile_size={tile_size}: both must be at least 1"
            )
        if not 1 <= min_tiles <= max_tiles:
            raise ValueError(f"min_tiles={min_tiles}, max_tiles={max_tiles}: need 1 <= min <= max")
        if attended not in ATTENDED_CHOICES:
            raise ValueError(
                f"attended={attended} is unknown; use one of {', '.join(ATTENDED_CHOICES)}"
            )
        if attended != "none" and tags.form != "megatron":
            raise ValueError(
                f"tags.form={tags.form} with attended={attended}: a tag that is tokenised together"
                " with its neighbours has no tokens of its own; use megatron"
            )
        template.check(tokenizer)
        self.template = template
        self.tags = tags
        self.tokens_per_tile = tokens_per_tile
        self.tile_size = tile_size
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.max_pixels = max_pixels
        self.attended = attended
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """One training example.

        members: extension -> bytes, and `__url__`, `__key__` (shard and key, as webdataset has).
        Raises ValueError naming both for damaged members, a wrong number of image markers, a
        placeholder written in the text, no supervised token, and media that cannot fit.
        """
        return self._build(members, prompt=False)

    def prompt(self, members: Mapping[str, Any]) -> Sample:
        """The sample up to where its last assistant turn begins; nothing is supervised."""
        return self._build(members, prompt=True)

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """The accepted answers to `prompt(members)`; empty where the sample brings none."""
        source = _source(members)
        record = _record(members, source)
        if "question" in record:
            return _answers(record, source)
        turns = self._turns(record, 0, source)
        return [turns[-1].text] if turns[-1].role == "assistant" else []

    def _build(self, members: Mapping[str, Any], *, prompt: bool) -> Sample:
        source = _source(members)
        pictures = self._pictures(members, source)
        turns = self._turns(_record(members, source), len(pictures), source)
        if prompt and turns[-1].role == "assistant":
            turns = turns[:-1]
        rendered, limit = self._fit(turns, pictures, source, prompt)
        if not prompt and not any(rendered.weights):
            raise ValueError(f"{source}: no supervised token; a sample needs an assistant turn")
        tiles = [
            tile_image(
                picture,
                min_tiles=min(self.min_tiles, limit),
                max_tiles=limit,
                tile_size=self.tile_size,
                use_thumbnail=self.use_thumbnail,
            )
            for picture in pictures
        ]
        placeholder = self.tokenizer.image_id
        found = rendered.tokens.count(placeholder)
        expected = self.tokens_per_tile * len(rendered.positions)
        if found != expected:
            raise ValueError(
                f"{source}: {found} placeholders {self.tokenizer.image_token}, but the tiles need "
                f"{expected}; the text must not contain the placeholder itself"
            )
        weights = [0.0] * len(rendered.weights) if prompt else rendered.weights
        return Sample(
            tokens=torch.tensor(rendered.tokens),
            loss_mask=torch.tensor(weights),
            media=self._media(tiles, rendered),
            sample_id=0,
            source=source,
        )

    def _media(self, images: Sequence[Tiles], rendered: Rendered) -> dict[str, SampleMedia]:
        """The tiles by the way they take: placed in the sequence, or attended."""
        if not images:
            return {}
        values = torch.cat([cut.values for cut in images])
        tiles = torch.cat([cut.tiles for cut in images])
        counts = torch.tensor([len(cut.tiles) for cut in images])
        items = torch.repeat_interleave(torch.arange(len(images)), counts)
        outside = torch.tensor([is_attended(tile, self.attended) for tile in tiles.tolist()])

        def chosen(which: Tensor, **fields: Any) -> SampleMedia:
            return SampleMedia(
                values=values[which],
                items=items[which],
                tiles=tiles[which],
                tokens_per_item=self.tokens_per_tile,
                **fields,
            )

        media = {}
        if not outside.all():
            media[IMAGE] = chosen(
                ~outside,
                positions=torch.tensor(rendered.positions),
                placeholder_id=self.tokenizer.image_id,
            )
        if outside.any():
            tags = [torch.tensor(tile.tag_ids, dtype=torch.int64) for tile in rendered.attended]
            media[ATTENDED] = chosen(
                outside,
                positions=torch.tensor([tile.start for tile in rendered.attended]),
                placeholder_id=-1,
                ends=torch.tensor([tile.stop for tile in rendered.attended]),
                tag_ids=torch.nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=-1),
            )
        return media

    def _fit(
        self, turns: Sequence[Turn], pictures: Sequence[Image.Image], source: str, prompt: bool
    ) -> tuple[Rendered, int]:
        """Render with as many tiles as fit; returns the rendering and the tile limit used."""
        ladder = [self.max_tiles, *(limit for limit in TILE_LADDER if limit < self.max_tiles)]
        for limit in ladder if pictures else ladder[:1]:
            layouts = [
                ImageLayout.of(
                    choose_grid(
                        picture.width,
                        picture.height,
                        min_tiles=min(self.min_tiles, limit),
                        max_tiles=limit,
                        tile_size=self.tile_size,
                    ),
                    use_thumbnail=self.use_thumbnail,
                )
                for picture in pictures
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
            if len(rendered.tokens) <= self.sequence_length:
                return rendered, limit
            if self.attended != "none" and not prompt and self._may_be_cut(rendered):
                break  # fewer tiles would save next to nothing
        needed, length = len(rendered.tokens), self.sequence_length
        if prompt or not self._may_be_cut(rendered):
            raise ValueError(
                f"{source}: needs {needed} tokens with one tile an image, and cutting text at "
                f"data.sequence_length={length} would cut "
                f"{'the prompt' if prompt else 'an image or every answer'}"
            )
        cut = dataclasses.replace(
            rendered, tokens=rendered.tokens[:length], weights=rendered.weights[:length]
        )
        return cut, limit

    def _may_be_cut(self, rendered: Rendered) -> bool:
        """Whether all media and some answer stand within the sequence length."""
        ends = [start + self.tokens_per_tile for start in rendered.positions[-1:]]
        ends += [tile.stop for tile in rendered.attended]
        length = self.sequence_length
        return max(ends, default=0) <= length and any(rendered.weights[:length])

    def _pictures(self, members: Mapping[str, Any], source: str) -> list[Image.Image]:
        found: list[tuple[int, str]] = []
        for extension in members:
            number, _, kind = extension.rpartition(".")
            if kind in EXTENSIONS and (not number or number.isdecimal()):
                found.append((int(number) if number else -1, extension))
        found.sort()
        numbers = [number for number, _ in found]
        if len(set(numbers)) != len(numbers):
            names = ", ".join(extension for _, extension in found)
            raise ValueError(f"{source}: order of pictures {names} is ambiguous; number them")
        return [
            decode_image(members[name], source=f"{source}.{name}", max_pixels=self.max_pixels)
            for _, name in found
        ]

    def _turns(self, record: dict[str, Any], num_images: int, source: str) -> list[Turn]:
        if "question" in record:
            question = _text(record["question"], "question", source)
            if IMAGE_MARKER not in question:
                question = f"{IMAGE_MARKER}\n" * num_images + question
            answers = _answers(record, source)
            turns = [Turn("user", question)]
            if answers:
                turns.append(Turn("assistant", Counter(answers).most_common(1)[0][0]))
            return turns
        messages = record.get("conversations", record.get("messages"))
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{source}: json needs conversations, messages or question")
        turns = []
        for message in messages:
            if not isinstance(message, dict):
                raise ValueError(f"{source}: a turn must be an object, got {message!r}")
            name = message.get("from", message.get("role"))
            if name not in ROLES:
                raise ValueError(
                    f"{source}: role {name!r} is unknown; use one of {', '.join(ROLES)}"
                )
            text = _text(message.get("value", message.get("content")), "turn", source)
            turns.append(Turn(ROLES[name], text))
        return turns


def _source(members: Mapping[str, Any]) -> str:
    return f"{members.get('__url__', '')}:{members.get('__key__', '')}"


def _record(members: Mapping[str, Any], source: str) -> dict[str, Any]:
    if "json" not in members:
        raise ValueError(f"{source}: no member json, only {', '.join(sorted(members))}")
    try:
        record = json.loads(members["json"])
    except ValueError as error:
        raise ValueError(f"{source}: member json is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{source}: member json must be an object, got {type(record).__name__}")
    return record


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{source}: {name} must be text, got {value!r}")
    return value


def _answers(record: Mapping[str, Any], source: str) -> list[str]:
    answers = record.get("answers", record.get("answer"))
    if answers is None:
        return []
    if not isinstance(answers, list):
        answers = [answers]
    return [_text(answer, "answer", source) for answer in answers]
