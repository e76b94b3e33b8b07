"""The one contract between data, models and objectives.

A `Sample` is one training example after decoding, tiling and templating: one text or several (a
query and its documents, two answers to compare), each with media of its own. A `Batch` is one
micro-batch: padded rows (b >= 1), or one packed row (b = 1) whose segments `cu_seqlens` delimits;
every text is a row or a segment, and `owners` says which sample it belongs to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss."""

SEQUENCE, ATTENDED = "sequence", "attended"
"""Placements: features stand at placeholders of the sequence, or cross-attention reads them outside
of it (NVLM sections 3.3 and 3.4)."""


class MediaKind(NamedTuple):
    """One kind of media: its modality ("image", "audio" ...) and where its features go."""

    modality: str
    placement: str = SEQUENCE

    def __str__(self) -> str:
        return f"{self.modality} ({self.placement})"


IMAGE = MediaKind("image")
ATTENDED_IMAGE = MediaKind("image", ATTENDED)

QUERY, POSITIVE, NEGATIVE = range(3)
"""Roles of the texts of a retrieval sample (`extras["role"]`)."""


@dataclass(frozen=True)
class TextMedia:
    """The media of one kind in one text, in order of appearance.

    A tile is one input of the encoder: a tile of an image, a window of a sound.

    values: [n, ...], one row per tile, in the dtype and shape that the encoder takes (images:
        uint8 [n, 3, height, width]).
    positions: int64 [n], index in the text's tokens of each tile's first placeholder; of attended
        media, of the first token of the tile's tag, or of the first token after the tile if the
        text has no tag.
    items: int64 [n], the item of the text that the tile belongs to, an image or a sound (0-based).
    tiles: int64 [n], place of the tile in its item: 1..k row-major, 0 for the thumbnail.
    placeholder_id: token id that stands for one media feature; -1 for attended media.
    tokens_per_item: features of each tile: consecutive placeholders, or keys.
    ends: attended media alone: int64 [n], one past the tag's last token; those tokens see this tile
        and no other. Text from an item's last end on sees the whole item.
    tag_ids: attended media alone: int64 [n, t], tokens whose embeddings are keys in front of the
        tile's features, -1 where a tag is shorter (NVLM-H; t is 0 in NVLM-X).
    extents: media in the sequence alone: int64 [n], frames of each window that hold sound; the
        encoder looks at no others. None: at all frames.
    counts: with `extents` alone: int64 [n], features of each tile, at most tokens_per_item.
    """

    values: Tensor
    positions: Tensor
    items: Tensor
    tiles: Tensor
    placeholder_id: int
    tokens_per_item: int
    ends: Tensor | None = None
    tag_ids: Tensor | None = None
    extents: Tensor | None = None
    counts: Tensor | None = None

    @property
    def num_features(self) -> Tensor:
        """The number of features of each tile, int64 [n]."""
        return _num_features(self)


@dataclass(frozen=True)
class Text:
    """One text of a sample, placeholders expanded, not yet shifted.

    tokens: int64 [n].
    weights: float32 [n]; the weight of token i *as a target*, 0 where it is not supervised.
    media: kind -> the media of that kind in this text.
    extras: tensors of this text that one objective or model reads, each of the same shape in every
        text; a batch stacks them.
    """

    tokens: Tensor
    weights: Tensor
    media: dict[MediaKind, TextMedia] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One example: one text or several, in the order that the objective expects.

    sample_id: (dataset, epoch, number) as one number (`nvmm.data.order.sample_ids`), negative where
        there is no sample. `source` names shard and key for messages.
    dropped: media that were left out where it was cut to the longest sequence.
    """

    texts: tuple[Text, ...]
    sample_id: int = 0
    source: str = ""
    dropped: int = 0

    @property
    def text(self) -> Text:
        """The only text. Raises ValueError when the sample has several."""
        if len(self.texts) != 1:
            raise ValueError(f"{self.source}: {len(self.texts)} texts where one is expected")
        return self.texts[0]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all its texts."""
        return sum(len(text.tokens) for text in self.texts)


@dataclass(frozen=True)
class Media:
    """The media of one kind in one micro-batch, text by text, item by item.

    values: [n, ...]; empty on later pipeline stages: they receive every field of attended media
        except the values, and no placed media.
    rows: int64 [n], the row of `Batch.tokens` that holds the placeholders or the tags.
    positions, ends: as in TextMedia, as columns of that row.
    texts: int64 [n], the text that each tile belongs to, an index into `Batch.owners`.
    items, tiles, placeholder_id, tokens_per_item, tag_ids, extents, counts: as in TextMedia.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor
    texts: Tensor
    items: Tensor
    tiles: Tensor
    placeholder_id: int
    tokens_per_item: int
    ends: Tensor | None = None
    tag_ids: Tensor | None = None
    extents: Tensor | None = None
    counts: Tensor | None = None

    @property
    def num_features(self) -> Tensor:
        """The number of features of each tile, int64 [n]."""
        return _num_features(self)

    @property
    def num_keys(self) -> int:
        """The number of keys that cross-attention reads of attended media, features and tags."""
        tags = 0 if self.tag_ids is None else int((self.tag_ids >= 0).sum())
        return self.positions.numel() * self.tokens_per_item + tags


def _num_features(media: TextMedia | Media) -> Tensor:
    if media.counts is not None:
        return media.counts
    return torch.full_like(media.positions, media.tokens_per_item)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    A sample of several texts takes as many rows (or segments), in order.

    tokens: int64 [b, s].
    labels: int64 [b, s]; labels[:, t] is the token after t, IGNORE_INDEX where unsupervised.
    loss_mask: float32 [b, s]; weight of the label at t, 0 exactly where labels is IGNORE_INDEX.
    position_ids: int64 [b, s]; restarts at 0 in every row and packed segment.
    lengths: int32 [b], or [num_segments] of a packed row; valid tokens of each row or segment.
        Both are padded on the right (prompts of generation on the left); a segment of padding, the
        last one, has length 0.
    sample_ids: int64 [num_samples].
    owners: int64 [num_texts], the sample that each text belongs to, an index into `sample_ids`;
        ascending. Texts are all rows, or all segments but the padding's.
    cu_seqlens: int32 [num_segments + 1] over the packed row, or None for padded rows.
        The last entry equals s: padding of a packed row is a segment of its own.
    media: kind -> the media of that kind.
    extras: tensors [num_texts, ...] of the texts, and those that `Objective.prepare` adds.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: Tensor
    sample_ids: Tensor
    owners: Tensor
    cu_seqlens: Tensor | None = None
    media: dict[MediaKind, Media] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b, s = self.tokens.shape
        for name in ("labels", "loss_mask", "position_ids"):
            shape = tuple(getattr(self, name).shape)
            if shape != (b, s):
                raise ValueError(f"Batch.{name} has shape {shape}, expected {(b, s)} as tokens")
        if self.cu_seqlens is not None:
            if b != 1:
                raise ValueError(f"a packed batch has one row, got {b}")
            if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 2:
                raise ValueError("Batch.cu_seqlens must be [num_segments + 1]")
        sequences = b if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        if tuple(self.lengths.shape) != (sequences,):
            raise ValueError(
                f"Batch.lengths has shape {tuple(self.lengths.shape)}, expected {(sequences,)}:"
                " one for each row, or each segment of a packed row"
            )
        texts = self.owners.numel()
        if not sequences - (self.cu_seqlens is not None) <= texts <= sequences:
            raise ValueError(f"Batch.owners has {texts} texts for {sequences} rows or segments")

    @property
    def max_seqlen(self) -> int:
        """The length of the longest packed segment, or the padded length."""
        if self.cu_seqlens is None:
            return int(self.tokens.shape[1])
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def num_tokens(self) -> int:
        """The number of supervised label positions."""
        return int((self.loss_mask != 0).sum())

    @property
    def sample_lengths(self) -> Tensor:
        """The valid tokens of each sample over all its texts, int64 [num_samples]."""
        lengths = self.lengths[: self.owners.numel()].long()
        return torch.zeros_like(self.sample_ids).index_add_(0, self.owners, lengths)

    def require(self, reads: Collection[MediaKind], reader: str) -> None:
        """Raise ValueError when the batch has media that `reader` does not read.

        reader: name of the model, for the message.
        """
        unread = sorted(str(kind) for kind in self.media.keys() - set(reads))
        if unread:
            readable = ", ".join(sorted(map(str, reads))) or "no media"
            hint = "; data.train.build.attended=none places tiles in the sequence"
            raise ValueError(
                f"the data (data.train.build or data.validation.build) give {', '.join(unread)},"
                f" which {reader} does not read: it reads {readable}"
                + (hint if ATTENDED in " ".join(unread) else "")
            )

    def count_media(self, modality: str) -> Tensor:
        """Count items and tiles of a modality in each sample, int64 [2, num_samples].

        An item whose tiles are placed in several ways (NVLM-H's thumbnail) counts once.
        """
        count = self.sample_ids.numel()
        kinds = [m for kind, m in self.media.items() if kind.modality == modality]
        if not kinds:
            return self.sample_ids.new_zeros(2, count)
        tiles = torch.cat([torch.stack([media.texts, media.items]) for media in kinds], dim=1)
        items = tiles.unique(dim=1)
        return torch.stack(
            [self.owners[counted[0]].bincount(minlength=count) for counted in (items, tiles)]
        )

    def replace(self, **changes: object) -> Batch:
        """Return a copy with some fields exchanged."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to every tensor (e.g. a move to a device)."""
        return _map(self, function)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return self.map(lambda x: x.to(device, non_blocking=True))


def _map(value, function):  # type: ignore[no-untyped-def]
    """Apply `function` to every tensor in a value, through dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            f.name: _map(getattr(value, f.name), function) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    return value
