"""Chat turns and images become tokens and weights (NVLM sections 3.2, 4, 5; figures 9 to 12).

The decoder sees an image as `<Image>`, then for every tile its tag and `tokens_per_tile`
placeholders, then `</Image>`. Placeholders are expanded here, before any mask is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import ImageLayout
from nvmm.data.samples.rendered import Rendered, Writer
from nvmm.data.samples.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"
"""The text that stands in a turn for one image of the sample."""

DOCUMENT = "document"
"""The role of a turn that is a document: no roles are written and all of its text is trained."""

CONTEXT = "context"
"""The role of a turn that is what an answer rests on: chunks of documents, or passages."""

Variant = Literal["none", "1d", "2d_grid", "2d_bbox"]
TagForm = Literal["megatron", "hf"]
Attended = Literal["none", "regular", "all"]
"""The tiles that cross-attention reads instead of the decoder: none (NVLM-D), regular, which is all
but thumbnails (NVLM-H), or all (NVLM-X)."""


@dataclass(frozen=True)
class ImageTags:
    """The texts that announce the tiles of an image.

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
        """Return the text before a tile's placeholders; `tile` is 1..k row-major, 0 the thumbnail.

        grid: (cols, rows). tile_size: in pixels.
        """
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
class Turn:
    """One message; role is system, CONTEXT, user or assistant, or the only turn's DOCUMENT.

    trained: whether the loss is on an assistant's turn.
    """

    role: str
    text: str
    trained: bool = True


@dataclass(frozen=True)
class Piece:
    """A part of a conversation's text, of one weight; or `ids`, which are tokens already.

    alone: it is made tokens apart from what stands beside it.
    """

    text: str = ""
    weight: float = 0.0
    ids: tuple[int, ...] = ()
    alone: bool = False


class Template(Protocol):
    """A dialect, bound to a tokenizer: how turns become text, and what of it is trained.

    bos: whether a text without turns begins with the tokenizer's BOS token.
    """

    bos: bool

    def bound(self, tokenizer: Tokenizer) -> Template: ...

    def joins(self, tokenizer: Tokenizer) -> bool: ...

    def end_token(self, tokenizer: Tokenizer) -> tuple[str, int]: ...

    def lead(self, tokenizer: Tokenizer, first: bool = False) -> tuple[str, str]: ...

    def pieces(
        self, turns: Sequence[Turn], tokenizer: Tokenizer, *, prompt: bool, source: str = ""
    ) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Affixes:
    """The texts around a role's text."""

    prefix: str = ""
    suffix: str = ""


class ChatTemplate:
    """A dialect in which turns become text: it is data, one YAML of configs/template/.

        system, user    prefix + text + suffix
        assistant       prefix + text + before_end + end token + suffix; text to end are trained

    roles: role -> {prefix, suffix}; `{end}` in them stands for the end of a turn. A turn of a role
        that is not listed is an error that names the sample.
    separator: text between two turns.
    bos: whether the sequence begins with the tokenizer's BOS token.
    end: token that ends an answer; None for the tokenizer's `end_of_turn`, "" for no token (texts
        that are scored and not answered).
    before_end: text between an answer and its end token, trained with both.
    end_earlier: whether an answer that is not the last turn ends with both too.
    generation_prompt: text that a prompt ends with; None for the separator and the assistant's
        prefix. What such an answer's prefix has beyond it, as the space of `Assistant: ` behind
        `Assistant:`, is the model's to write, and so trained with the answer.
    trim: whether the white space around each turn's text is left out.
    system: system message of samples that bring none; None for no system turn.
    supervise_suffix: whether the text behind an answer's end token is trained too.
    special_tokens: texts in the affixes that must be one token each.
    """

    def __init__(
        self,
        roles: Mapping[str, Mapping[str, str]],
        separator: str = "",
        bos: bool = False,
        end: str | None = None,
        generation_prompt: str | None = None,
        system: str | None = None,
        supervise_suffix: bool = False,
        special_tokens: Sequence[str] = (),
        before_end: str = "",
        end_earlier: bool = True,
        trim: bool = False,
    ) -> None:
        missing = {"user", "assistant"} - roles.keys()
        if missing:
            raise ValueError(f"template.roles lacks {', '.join(sorted(missing))}")
        self.roles = {}
        for role, affixes in roles.items():
            unknown = affixes.keys() - {"prefix", "suffix"}
            if unknown:
                raise ValueError(
                    f"template.roles.{role}.{unknown.pop()} is unknown; use prefix or suffix"
                )
            self.roles[role] = Affixes(**affixes)
        self.separator = separator
        self.bos = bos
        self.end = end
        self.before_end = before_end
        if generation_prompt is None:
            generation_prompt = separator + self.roles["assistant"].prefix
        self.generation_prompt = generation_prompt
        self.system = system
        self.supervise_suffix = supervise_suffix
        self.special_tokens = tuple(special_tokens)
        self.end_earlier = end_earlier
        self.trim = trim
        if system is not None and "system" not in self.roles:
            raise ValueError(f"template.system={system!r} needs template.roles.system")
        if supervise_suffix and not self.roles["assistant"].suffix:
            raise ValueError(
                "template.supervise_suffix=true needs a suffix: template.roles.assistant.suffix is"
                " empty"
            )

    def __repr__(self) -> str:
        # Token counts of an index go by this text, so that a key it lacks is one without effect.
        later = {"before_end": "", "end_earlier": True, "trim": False}
        said = {k: v for k, v in sorted(vars(self).items()) if k not in later or v != later[k]}
        return f"ChatTemplate({', '.join(f'{k}={v!r}' for k, v in said.items())})"

    def bound(self, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template for a tokenizer, here itself, as all its texts are given.

        Raises ValueError for a tokenizer that lacks a token that the template needs.
        """
        self.check(tokenizer)
        return self

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError for a tokenizer that lacks a token that the template needs."""
        end = tokenizer.end_of_turn if self.end is None else self.end
        for token in (*self.special_tokens, *([end] if end else []), tokenizer.image_token):
            known = tokenizer.token_id(token)
            if known is None or tokenizer.encode(token) != [known]:
                raise ValueError(
                    f"template: {token} is not a token of {tokenizer.path}"
                    f"{'' if known is None else ' that is found in text'}; name one that is, or"
                    " list it in tokenizer.extra_tokens"
                )
        if self.bos and tokenizer.bos_id is None:
            raise ValueError(f"template.bos=true needs a BOS token, and {tokenizer.path} has none")

    def joins(self, tokenizer: Tokenizer) -> bool:
        """Return whether a word has other ids in a conversation than a text that begins with it."""
        apart = tokenizer.encode("a")
        prefix = self.separator + self.roles["assistant"].prefix
        behind = tokenizer.encode_pieces(["a"], continued=True)[0]
        return behind != apart or tokenizer.joined_space(prefix) > 0

    def end_token(self, tokenizer: Tokenizer) -> tuple[str, int]:
        """Return the token that ends an answer, as text and id."""
        if self.end is None:
            return tokenizer.end_of_turn, tokenizer.end_of_turn_id
        if not self.end:
            return "", tokenizer.eos_id
        token = tokenizer.token_id(self.end)
        assert token is not None, "checked with the tokenizer"
        return self.end, token

    def lead(self, tokenizer: Tokenizer, first: bool = False) -> tuple[str, str]:
        """Return the text in front of an answer: what a prompt ends with, and what the model
        writes before the answer's first word.

        first: of a turn that no other stands in front of.
        """
        end, _ = self.end_token(tokenizer)
        text = ("" if first else self.separator) + self.roles["assistant"].prefix
        text, prompt = (each.replace("{end}", end) for each in (text, self.generation_prompt))
        ahead = text[len(prompt) :] if text.startswith(prompt) else ""
        head = text[: len(text) - len(ahead)]
        # A prompt ends before the space of a word's token: the first token will be ` A`, not `A`.
        size = len(head) - tokenizer.joined_space(head)
        return head[:size], head[size:] + ahead

    def pieces(
        self, turns: Sequence[Turn], tokenizer: Tokenizer, *, prompt: bool, source: str = ""
    ) -> Iterator[Piece]:
        """Yield the text of a conversation, with what is trained of it; see `render`.

        Raises BadSample naming `source` for a turn of a role that the template lacks.
        """
        if self.system is not None and not any(turn.role == "system" for turn in turns):
            turns = [Turn("system", self.system), *turns]
        end, _ = self.end_token(tokenizer)
        if self.bos and tokenizer.bos_id is not None:
            yield Piece(ids=(tokenizer.bos_id,))
        for index, turn in enumerate(turns):
            affixes = self.roles.get(turn.role)
            if affixes is None:
                roles = ", ".join(self.roles)
                raise BadSample(source, f"a turn of {turn.role}, and template.roles has {roles}")
            prefix, suffix = (
                text.replace("{end}", end) for text in (affixes.prefix, affixes.suffix)
            )
            text = turn.text.strip() if self.trim else turn.text
            # 1. System, context and user are text between affixes, and none of it is trained.
            if turn.role != "assistant":
                yield Piece((self.separator if index else "") + prefix)
                yield Piece(text)
                yield Piece(suffix)
                continue
            # 2. The assistant's text and end token are trained, and what the model writes in front
            # of it; a template may add the suffix.
            head, ahead = self.lead(tokenizer, first=not index)
            yield Piece(head)
            ends = self.end_earlier or index == len(turns) - 1
            closing = self.before_end + end if ends else ""
            yield Piece(ahead + text + closing, float(turn.trained))
            yield Piece(suffix, float(self.supervise_suffix and turn.trained))
        if prompt:
            text = self.generation_prompt.replace("{end}", end)
            yield Piece(text[: len(text) - tokenizer.joined_space(text)])


def render(
    turns: Sequence[Turn],
    images: Sequence[ImageLayout],
    *,
    tokenizer: Tokenizer,
    template: Template,
    tags: ImageTags,
    tile_size: int,
    tokens_per_tile: int,
    attended: Attended = "none",
    generation_prompt: bool = False,
    source: str = "",
) -> Rendered:
    """Render turns as tokens and weights; weight 1 on assistant text and its end token, else 0.

    Turns that are not `trained` have weight 0. A document's prompt ends where its text does.

    A document's text and its end-of-text token have weight 1.

    `<image>` in a turn is replaced by the next image's block. Tiles that `attended` names have no
    placeholders: with "all" the block is tags alone, with "regular" the thumbnail's. With
    `generation_prompt` the sequence ends where the next assistant turn's text begins, or where the
    document goes on.

    Without images the ids are those of the tokenizer for the whole text, as Transformers'
    `apply_chat_template` makes them. A token of both a prefix and an answer has weight 1, and a
    prompt ends before white space that would be of such a token.

    Raises BadSample naming `source` when markers and images differ in number, a marker stands in an
    assistant turn, or the template lacks a role.
    """
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        reason = f"the text has {markers} {IMAGE_MARKER} markers, the sample {len(images)} images"
        raise BadSample(source, reason)
    if any(turn.role == "assistant" and IMAGE_MARKER in turn.text for turn in turns):
        raise BadSample(source, f"{IMAGE_MARKER} in an assistant turn")
    out = Writer(tokenizer)
    if turns and turns[0].role == DOCUMENT:
        pieces = _document(turns[0], tokenizer, template, generation_prompt)
    else:
        pieces = template.pieces(turns, tokenizer, prompt=generation_prompt, source=source)
    remaining = iter(images)
    for piece in pieces:
        if piece.ids:
            out.flush()
            out.ids(piece.ids, piece.weight)
        write = out.alone if piece.alone else out.text
        before, *rest = piece.text.split(IMAGE_MARKER)
        write(before, piece.weight)
        for after in rest:
            image = next(remaining, None)
            if image is None:
                raise BadSample(source, f"the template itself writes {IMAGE_MARKER}")
            _write_image(out, image, tags, tile_size, tokens_per_tile, attended)
            write(after, piece.weight)
    out.flush()
    return out.out


def _document(
    document: Turn, tokenizer: Tokenizer, template: Template, prompt: bool
) -> Iterator[Piece]:
    """Yield the text of a document, all of it trained, and its end unless it is a prompt."""
    if template.bos and tokenizer.bos_id is not None:
        yield Piece(ids=(tokenizer.bos_id,))
    yield Piece(document.text, 1.0, alone=True)
    if not prompt:
        yield Piece(ids=(tokenizer.eos_id,), weight=1.0)


def is_attended(tile: int, attended: Attended) -> bool:
    """Return whether cross-attention reads this tile of an image (0: the thumbnail)."""
    return attended == "all" or (attended == "regular" and tile != 0)


def _write_image(
    out: Writer,
    image: ImageLayout,
    tags: ImageTags,
    tile_size: int,
    tokens_per_tile: int,
    attended: Attended,
) -> None:
    """Write an image's block: its start, each tile's tag and placeholders, and its end."""
    out.out.tiles.append(len(image.tiles))
    out.text(tags.image_start)
    for tile in image.tiles:
        tag = tags.tag(tile, image.grid, tile_size)
        if is_attended(tile, attended):
            out.attended(tag, in_text=attended == "all")
        else:
            out.tile(tag, tokens_per_tile, alone=tags.form == "megatron")
    out.text(tags.image_end)
