"""Chat turns and images to tokens and a loss mask (NVLM sections 3.2, 4 and 5, figures 9 to 12).

The decoder sees an image as `<Image>`, then for every tile its tag and `tokens_per_tile`
placeholders, then `</Image>`. Placeholders are expanded here, before any mask is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nvmm.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import tile_indices
from nvmm.data.samples.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"
"""Stands in a turn's text for one image of the sample."""

DOCUMENT = "document"
"""Role of a turn that is a whole document: no roles are written and all of its text is trained."""

Variant = Literal["none", "1d", "2d_grid", "2d_bbox"]
TagForm = Literal["megatron", "hf"]
Style = Literal["chatml", "yi", "pretraining"]
Attended = Literal["none", "regular", "all"]
"""Which tiles cross-attention reads instead of the decoder: NVLM-D, -H (all but thumbnails), -X."""


@dataclass(frozen=True)
class ImageTags:
    """How the tiles of an image are announced in the text.

    variant: none, 1d (`<tile_3>`), 2d_grid (`<tile_x2_y0>`) or 2d_bbox (corners in pixels of the
        resized image, which is cols * tile_size wide).
    form: megatron tokenises every tag alone, as NVLM was trained; hf tokenises the text between
        placeholders as one string, so the first tag fuses with `<Image>`, as the published
        Transformers model and vLLM do.
    thumbnail_tag: tag of the thumbnail, and of the tile of a one-tile image.
    """

    variant: Variant = "1d"
    form: TagForm = "megatron"
    thumbnail_tag: str = "<tile_global_thumbnail>"
    image_start: str = "<Image>"
    image_end: str = "</Image>"

    def __post_init__(self) -> None:
        require("tags.variant", self.variant, Variant)
        require("tags.form", self.form, TagForm)

    def tag(self, tile: int, grid: tuple[int, int], tile_size: int) -> str:
        """Text before the placeholders of one tile; `tile` is 1..k row-major, 0 the thumbnail."""
        if self.variant == "none":
            return ""
        if tile == 0:
            return self.thumbnail_tag
        if self.variant == "1d":
            return f"<tile_{tile}>"
        row, col = divmod(tile - 1, grid[0])
        if self.variant == "2d_grid":
            return f"<tile_x{col}_y{row}>"
        left, top = col * tile_size, row * tile_size
        return f"<box>({left},{top}),({left + tile_size},{top + tile_size})</box>"


@dataclass(frozen=True)
class ChatTemplate:
    """How turns become text.

    style: chatml; yi (ChatML after one BOS token); pretraining (no roles: text, answer and the
        end token on lines of their own).
    system: system message of samples that bring none; None for no system turn.
    supervise_newline: also train the newline after an answer's end token, as Megatron-LM does.
    """

    style: Style = "chatml"
    system: str | None = None
    supervise_newline: bool = False
    turn_start: str = "<|im_start|>"

    def __post_init__(self) -> None:
        require("template.style", self.style, Style)
        if self.style == "pretraining" and self.supervise_newline:
            raise ValueError(
                "template.supervise_newline=true needs turns; use style chatml or yi, or false"
            )

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that lacks what the template needs."""
        if self.style != "pretraining" and tokenizer.token_id(self.turn_start) is None:
            raise ValueError(
                f"template.turn_start={self.turn_start} is not a token of {tokenizer.path}; name "
                "one that is, or list it in tokenizer.extra_tokens"
            )
        if self.style == "yi" and tokenizer.bos_id is None:
            raise ValueError(f"template.style=yi needs a BOS token, and {tokenizer.path} has none")


@dataclass(frozen=True)
class Turn:
    """One message; role is system, user or assistant, or the only turn's DOCUMENT."""

    role: str
    text: str


@dataclass(frozen=True)
class ImageLayout:
    """What an image occupies in the sequence.

    grid: (cols, rows).
    tiles: place of each tile, 1..k row-major and 0 for the thumbnail.
    """

    grid: tuple[int, int]
    tiles: Sequence[int]

    @staticmethod
    def of(grid: tuple[int, int], *, use_thumbnail: bool = True) -> ImageLayout:
        """The layout of an image cut to `grid`."""
        return ImageLayout(grid, tile_indices(grid, use_thumbnail=use_thumbnail))


@dataclass(frozen=True)
class AttendedTile:
    """A tile outside the sequence: its tag's tokens start .. stop - 1 of the text, or its `tag_ids`
    in front of its keys."""

    start: int
    stop: int
    tag_ids: Sequence[int] = ()


@dataclass
class Rendered:
    """Tokens, the weight of each token as a target, the first placeholder of every tile in the
    sequence, and the tiles outside of it, both in order."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    attended: list[AttendedTile] = field(default_factory=list)


class _Writer:
    """Collects text until a boundary forces tokenisation, so that pieces are tokenised as one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.out = Rendered()
        self.pending = ""

    def text(self, text: str) -> None:
        self.pending += text

    def flush(self) -> None:
        if self.pending:
            self.ids(self.tokenizer.encode(self.pending), 0.0)
            self.pending = ""

    def ids(self, ids: Sequence[int], weight: float) -> None:
        self.out.tokens.extend(ids)
        self.out.weights.extend([weight] * len(ids))

    def target(self, ids: Sequence[int]) -> None:
        self.flush()
        self.ids(ids, 1.0)

    def tile(self, tag: str, num_tokens: int, alone: bool) -> None:
        if alone:
            self.flush()
        self.text(tag)
        self.flush()
        self.out.positions.append(len(self.out.tokens))
        self.ids([self.tokenizer.image_id] * num_tokens, 0.0)

    def attended(self, tag: str, in_text: bool) -> None:
        """A tile outside the sequence; its tag stands in the text or in front of its keys."""
        self.flush()
        start = len(self.out.tokens)
        if in_text:
            self.text(tag)
            self.flush()
        ids = [] if in_text or not tag else self.tokenizer.encode(tag)
        self.out.attended.append(AttendedTile(start, len(self.out.tokens), ids))


def render(
    turns: Sequence[Turn],
    images: Sequence[ImageLayout],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tags: ImageTags,
    tile_size: int,
    tokens_per_tile: int,
    attended: Attended = "none",
    generation_prompt: bool = False,
    source: str = "",
) -> Rendered:
    """Turns -> tokens and weights; weight 1 on assistant text and its end token, 0 elsewhere.

    A document's text and its end-of-text token have weight 1.

    `<image>` in a turn is replaced by the next image's block. Tiles that `attended` names have no
    placeholders: with "all" the block is tags alone, with "regular" the thumbnail's. With
    `generation_prompt` the sequence ends where the next assistant turn's text begins. Raises
    BadSample naming `source` when markers and images differ in number, or a marker stands in an
    assistant turn.
    """
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        reason = f"the text has {markers} {IMAGE_MARKER} markers, the sample {len(images)} images"
        raise BadSample(source, reason)
    has_system = any(turn.role in ("system", DOCUMENT) for turn in turns)
    if template.system is not None and not has_system:
        turns = [Turn("system", template.system), *turns]
    out = _Writer(tokenizer)
    if template.style == "yi" and tokenizer.bos_id is not None:
        out.ids([tokenizer.bos_id], 0.0)
    has_roles = template.style != "pretraining"
    remaining = iter(images)
    for index, turn in enumerate(turns):
        if turn.role == DOCUMENT:
            for number, text in enumerate(turn.text.split(IMAGE_MARKER)):
                if number:
                    _write_image(out, next(remaining), tags, tile_size, tokens_per_tile, attended)
                out.target(tokenizer.encode(text))
            out.target([tokenizer.eos_id])
            continue
        if has_roles:
            out.text(f"{template.turn_start}{turn.role}\n")
        elif index:
            out.text("\n")
        if turn.role == "assistant":
            if IMAGE_MARKER in turn.text:
                raise BadSample(source, f"{IMAGE_MARKER} in an assistant turn")
            out.target([*tokenizer.encode(turn.text), tokenizer.end_of_turn_id])
            if template.supervise_newline:
                out.target(tokenizer.encode("\n"))
            elif has_roles:
                out.text("\n")
            continue
        before, *rest = turn.text.split(IMAGE_MARKER)
        out.text(before)
        for after in rest:
            _write_image(out, next(remaining), tags, tile_size, tokens_per_tile, attended)
            out.text(after)
        if has_roles:
            out.text(f"{tokenizer.end_of_turn}\n")
    if generation_prompt:
        out.text(f"{template.turn_start}assistant\n" if has_roles else "\n")
    out.flush()
    return out.out


def is_attended(tile: int, attended: Attended) -> bool:
    """Whether cross-attention reads this tile of an image (0: the thumbnail)."""
    return attended == "all" or (attended == "regular" and tile != 0)


def _write_image(
    out: _Writer,
    image: ImageLayout,
    tags: ImageTags,
    tile_size: int,
    tokens_per_tile: int,
    attended: Attended,
) -> None:
    out.text(tags.image_start)
    for tile in image.tiles:
        tag = tags.tag(tile, image.grid, tile_size)
        if is_attended(tile, attended):
            out.attended(tag, in_text=attended == "all")
        else:
            out.tile(tag, tokens_per_tile, alone=tags.form == "megatron")
    out.text(tags.image_end)
