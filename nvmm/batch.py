"""The one contract between data, models and objectives.

`Sample` is one training example after decoding, tiling and templating. `Batch` is one micro-batch:
padded rows (b >= 1), or one packed row (b = 1) whose segments `cu_seqlens` delimits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss."""
IMAGE = "image"
"""Kind of media whose features stand at placeholders of the sequence."""
ATTENDED = "attended"
"""Kind of media that cross-attention reads, outside the sequence (NVLM sections 3.3 and 3.4)."""

QUERY, POSITIVE, NEGATIVE = range(3)
"""What a text of a retrieval sample is (`extras["role"]`)."""


@dataclass(frozen=True)
class SampleMedia:
    """The media of one kind (IMAGE or ATTENDED) in one sample, in order of appearance.

    values: uint8 [n, 3, height, width], one row per tile.
    positions: int64 [n], index in the sample's tokens of each tile's first placeholder; of attended
        media, of the first token of the tile's tag (of what follows, where the text has no tag).
    items: int64 [n], which image of the sample the tile belongs to (0-based).
    tiles: int64 [n], place of the tile in its image: 1..k row-major, 0 for the thumbnail.
    placeholder_id: token id that stands for one media feature; -1 for attended media.
    tokens_per_item: features of each tile: consecutive placeholders, or keys.
    ends: attended media alone: int64 [n], one past the tag's last token; those tokens see this tile
        and no other. Text from an image's last end on sees the whole image.
    tag_ids: attended media alone: int64 [n, t], tokens whose embeddings are keys in front of the
        tile's features, -1 where a tag is shorter (NVLM-H; t is 0 in NVLM-X).
    """

    values: Tensor
    positions: Tensor
    items: Tensor
    tiles: Tensor
    placeholder_id: int
    tokens_per_item: int
    ends: Tensor | None = None
    tag_ids: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """One example, placeholders expanded, not yet shifted.

    tokens: int64 [n].
    loss_mask: float32 [n]; the weight of token i *as a target* (0 = not supervised). Not shifted.
    media: kind -> SampleMedia.
    sample_id: (dataset, epoch, number) as one number (`nvmm.data.order.sample_ids`), negative where
        there is no sample. `source` names shard and key for messages.
    segments: tokens of each text, for a sample of several (a query and its documents); () is one.
        Each becomes a row, or a segment of a packed row, of its own.
    extras: tensors [texts, ...] owned by one objective, for a sample of several texts.
    """

    tokens: Tensor
    loss_mask: Tensor
    media: dict[str, SampleMedia]
    sample_id: int
    source: str = ""
    segments: tuple[int, ...] = ()
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Media:
    """The media of one kind in one micro-batch, sample by sample, image by image.

    values: uint8 [n, 3, height, width]; empty on later pipeline stages, which know of attended
        media all but the pixels (and of placed media nothing).
    rows: int64 [n], the row of `Batch.tokens` that holds the placeholders or the tags.
    positions, ends: as in SampleMedia, as columns of that row.
    samples: int64 [n], index into `Batch.sample_ids`.
    items, tiles, placeholder_id, tokens_per_item, tag_ids: as in SampleMedia.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor
    samples: Tensor
    items: Tensor
    tiles: Tensor
    placeholder_id: int
    tokens_per_item: int
    ends: Tensor | None = None
    tag_ids: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Of attended media: rows that cross-attention reads, features and tags."""
        tags = 0 if self.tag_ids is None else int((self.tag_ids >= 0).sum())
        return self.positions.numel() * self.tokens_per_item + tags


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    A sample of several texts takes as many rows (or segments), in order.

    tokens: int64 [b, s].
    labels: int64 [b, s]; labels[:, t] is the token after t, IGNORE_INDEX where unsupervised.
    loss_mask: float32 [b, s]; weight of the label at t, 0 exactly where labels is IGNORE_INDEX.
    position_ids: int64 [b, s]; restarts at 0 in every row and packed segment.
    lengths: int32 [b], or [num_segments] of a packed row; valid tokens of each row or segment.
        Both are padded on the right; a segment of padding has length 0.
    sample_ids: int64 [num_samples].
    cu_seqlens: int32 [num_segments + 1] over the packed row, or None for padded rows.
        The last entry equals s: padding of a packed row is a segment of its own.
    media: kind -> Media.
    extras: tensors owned by one objective.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: Tensor
    sample_ids: Tensor
    cu_seqlens: Tensor | None = None
    media: dict[str, Media] = field(default_factory=dict)
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

    @property
    def max_seqlen(self) -> int:
        """Longest packed segment, or the padded length."""
        if self.cu_seqlens is None:
            return int(self.tokens.shape[1])
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def num_tokens(self) -> int:
        """Number of supervised label positions."""
        return int((self.loss_mask != 0).sum())

    def count_media(self) -> Tensor:
        """Images and tiles of each sample, int64 [2, num_samples].

        An image whose thumbnail goes another way than its tiles is one image.
        """
        count = self.sample_ids.numel()
        if not self.media:
            return self.sample_ids.new_zeros(2, count)
        tiles = torch.cat([torch.stack([m.samples, m.items]) for m in self.media.values()], dim=1)
        images = tiles.unique(dim=1)
        return torch.stack([found[0].bincount(minlength=count) for found in (images, tiles)])

    def replace(self, **changes: object) -> Batch:
        """A copy with some fields exchanged."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to every tensor (e.g. a move to a device)."""
        return _map(self, function)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return self.map(lambda x: x.to(device, non_blocking=True))


def _map(value, function):  # type: ignore[no-untyped-def]
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
