"""Mappings between one tensor of ours and tensors of another layout, in both directions.

Ours are mcore's: a fused QKV interleaved by query group, a gated fc1 of gate over up, an embedding
padded to a fixed number of rows. All of it is pure torch and works on meta tensors, which is how
names and shapes of any model are checked without its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mapping(Protocol):
    """One correspondence. Sizes that do not fit raise ValueError."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield our tensor as blocks of its first axis, read from `theirs` one by one."""
        ...

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Return their tensors, in the order in which `to_ours` takes them."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: one tensor."""
        yield theirs[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """One tensor."""
        return [ours]


@dataclass(frozen=True)
class Reshape:
    """The same values in another shape; -1 stands for any size."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: one tensor."""
        yield _shaped(theirs[0], self.theirs).reshape(self.ours)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """One tensor."""
        return [_shaped(ours, self.ours).reshape(self.theirs)]


@dataclass(frozen=True)
class QKV:
    """q, k and v of [heads * d, ...] and twice [groups * d, ...] <-> one tensor, group by group.

    A group holds its query heads, then its key, then its value (mcore's `linear_qkv`, weight or
    bias).
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: q, k, v."""
        parts = [
            _rows(tensor, heads * self.head_dim).unflatten(0, (self.num_groups, -1))
            for tensor, heads in zip(
                theirs, (self.num_heads, self.num_groups, self.num_groups), strict=True
            )
        ]
        yield torch.cat(parts, dim=1).flatten(0, 1)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """q, k, v."""
        rows = (self.num_heads + 2 * self.num_groups) * self.head_dim
        groups = _rows(ours, rows).unflatten(0, (self.num_groups, -1))
        queries = self.num_heads // self.num_groups * self.head_dim
        parts = groups.split([queries, self.head_dim, self.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class KeylessBias:
    """Biases of q and v of [heads * d] each (Whisper) <-> q, k, v head by head.

    In an encoder without rotary positions a key bias adds the same to all scores of a query, which
    the softmax takes away again: k's is zero in ours and left out of theirs.
    """

    num_heads: int
    head_dim: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: q, v."""
        q, v = theirs[0], theirs[1]
        mapping = QKV(self.num_heads, self.num_heads, self.head_dim)
        yield from mapping.to_ours([q, torch.zeros_like(q), v])

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """q, v."""
        q, _, v = QKV(self.num_heads, self.num_heads, self.head_dim).to_theirs(ours)
        return [q, v]


@dataclass(frozen=True)
class FusedQKV:
    """One tensor of all q, all k, all v (InternViT) <-> q, k, v head by head.

    num_dummy_heads: zero heads that theirs carries after the real ones (NVLM-D-72B: 7 after 25).
    """

    num_heads: int
    head_dim: int
    num_dummy_heads: int = 0

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: one tensor [3 * (heads + dummy heads) * d, ...]."""
        heads = self.num_heads + self.num_dummy_heads
        parts = _rows(theirs[0], 3 * heads * self.head_dim).unflatten(0, (3, heads, self.head_dim))
        _require_zeros(parts[:, self.num_heads :])
        yield parts[:, : self.num_heads].transpose(0, 1).flatten(0, 2)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """One tensor."""
        rows = _rows(ours, 3 * self.num_heads * self.head_dim)
        parts = rows.unflatten(0, (self.num_heads, 3, self.head_dim)).transpose(0, 1)
        return [_padded(parts, 1, self.num_dummy_heads).flatten(0, 2)]


@dataclass(frozen=True)
class DummyHeads:
    """One tensor of all heads' features along an axis, after which theirs has zero heads."""

    axis: int
    num_heads: int
    head_dim: int
    num_dummy_heads: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: one tensor, (heads + dummy heads) * d long along the axis."""
        sizes = [self.num_heads * self.head_dim, self.num_dummy_heads * self.head_dim]
        real, dummy = _rows(theirs[0], sum(sizes), self.axis).split(sizes, self.axis)
        _require_zeros(dummy)
        yield real.contiguous()

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """One tensor."""
        ours = _rows(ours, self.num_heads * self.head_dim, self.axis)
        return [_padded(ours, self.axis, self.num_dummy_heads * self.head_dim)]


@dataclass(frozen=True)
class GatedMLP:
    """gate and up, [f, h] each <-> [2 f, h]."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: gate, up."""
        rows = None
        for tensor in theirs:
            rows = rows or tensor.shape[0]
            yield _rows(tensor, rows)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """gate, up."""
        return list(_rows(ours, ours.shape[0] // 2 * 2).chunk(2))


@dataclass(frozen=True)
class PadVocabulary:
    """Rows of a vocabulary <-> the same rows, then zeros up to our fixed number."""

    our_rows: int
    their_rows: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theirs: one tensor [rows, ...]."""
        tensor = _rows(theirs[0], self.their_rows)
        missing = self.our_rows - self.their_rows
        if missing < 0:
            raise ValueError(f"{self.their_rows} vocabulary rows do not fit into {self.our_rows}")
        padding = tensor.new_zeros(missing, *tensor.shape[1:])
        yield tensor
        if missing:
            yield padding

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """One tensor."""
        return [_rows(ours, self.our_rows)[: self.their_rows]]


@dataclass(frozen=True)
class Drop:
    """A tensor of theirs that our model has no use for; it need not be there."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Nothing."""
        yield from ()

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Nothing."""
        return []


@dataclass(frozen=True)
class Tied(Drop):
    """A tied copy of another tensor of theirs: it may be there, with the same values.

    source: name of the tensor it repeats.
    """

    source: str


@dataclass(frozen=True)
class Unused(Drop):
    """A tensor of theirs that does not act on what our model computes: written as a constant.

    It may be there; its values are left out on import.
    """

    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Constant(Drop):
    """A tensor of theirs that follows from the config alone, such as an index; it may be there.

    make: gives it, in its own dtype.
    """

    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of a table: our name (None for what we drop), their names, and the mapping.

    A `*` in the names stands for a layer's number.
    """

    ours: str | None
    theirs: tuple[str, ...]
    mapping: Mapping = Rename()

    def named(self, ours: str, theirs: str) -> Row:
        """Return the row with both sides prefixed."""
        mapping = self.mapping
        if isinstance(mapping, Tied):
            mapping = Tied(theirs + mapping.source)
        return Row(
            None if self.ours is None else ours + self.ours,
            tuple(theirs + name for name in self.theirs),
            mapping,
        )


def expand(rows: Sequence[Row], num_layers: int) -> list[Row]:
    """Return the table with every row that has a `*` written once per layer."""
    out: list[Row] = []
    for row in rows:
        if not any("*" in name for name in row.theirs):
            out.append(row)
            continue
        for layer in range(num_layers):
            theirs = tuple(name.replace("*", str(layer)) for name in row.theirs)
            ours = None if row.ours is None else row.ours.replace("*", str(layer))
            out.append(Row(ours, theirs, row.mapping))
    return out


def prefixed(rows: Sequence[Row], ours: str, theirs: str) -> list[Row]:
    """Return the table of a part of a larger model."""
    return [row.named(ours, theirs) for row in rows]


def _rows(tensor: Tensor, count: int, axis: int = 0) -> Tensor:
    if tensor.shape[axis] != count:
        raise ValueError(f"shape {list(tensor.shape)} must have {count} along axis {axis}")
    return tensor


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    fits = len(shape) == tensor.dim() and all(
        expected in (-1, size) for expected, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"shape {list(tensor.shape)} must be {list(shape)} (-1: any)")
    return tensor


def _padded(tensor: Tensor, axis: int, count: int) -> Tensor:
    shape = [*tensor.shape[:axis], count, *tensor.shape[axis + 1 :]]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if count else tensor.contiguous()


def _require_zeros(dummy: Tensor) -> None:
    if dummy.device.type != "meta" and dummy.numel() and bool(dummy.any()):
        raise ValueError("a dummy head is not zero: this is not a model with padded heads")
