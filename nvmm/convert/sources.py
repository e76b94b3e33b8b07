"""Sources of tensors, read by name and block by block, and combinations of sources."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class InMemory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.spec = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor."""
        yield self.tensors[name]


class WithLora:
    """A LoRA checkpoint's tensors over its base's: where both have a name, the former's count."""

    def __init__(self, lora: Source, base: Source) -> None:
        self.homes = {name: source for source in (base, lora) for name in source.spec}
        self.spec = {name: source.spec[name] for name, source in self.homes.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks of the source that has it."""
        yield from self.homes[name].blocks(name)


class SubModel:
    """The tensors of a source whose names begin with a prefix, without it."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.source = source
        self.prefix = prefix
        self.spec = {
            name.removeprefix(prefix): tensor
            for name, tensor in source.spec.items()
            if name.startswith(prefix)
        }

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks of the tensor."""
        yield from self.source.blocks(self.prefix + name)


class Renamed:
    """A source with a prefix before its names."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.source = source
        self.prefix = prefix
        self.spec = {prefix + name: tensor for name, tensor in source.spec.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks of the tensor."""
        yield from self.source.blocks(name.removeprefix(self.prefix))


class Source(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def spec(self) -> Mapping[str, Tensor]:
        """Name -> meta tensor (shape and dtype)."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor as consecutive blocks of its first axis."""
        ...


def at_row(row: int, block: Tensor) -> torch.Size:
    """Return where a block begins in its tensor: at a row, and at 0 along the other axes."""
    return torch.Size([row, *[0] * (block.dim() - 1)][: block.dim()])


def read(source: Source, name: str) -> Tensor:
    """Read one whole tensor of a source."""
    spec = source.spec[name]
    out, row = torch.empty(0), 0
    for block in source.blocks(name):
        if block.shape == spec.shape:
            return block
        if row == 0:
            out = torch.empty(spec.shape, dtype=block.dtype)
        out[row : row + len(block)] = block
        row += len(block)
    return out


class Cast:
    """A source with its floating-point tensors in another dtype (None: as they are).

    like: a spec whose dtypes the tensors have where `dtype` is None.

    Reading raises ValueError for finite values that become infinite (above 65504 in fp16).
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype | None,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.source = source
        self.spec = {}
        for name, tensor in source.spec.items():
            wanted = dtype or (like or source.spec)[name].dtype
            self.spec[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
        self._lock = threading.Lock()
        self._values = self._zero = self._subnormal = 0

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks in the other dtype."""
        for block in self.source.blocks(name):
            out = block.to(self.spec[name].dtype)
            if out is not block:
                self._count(name, block, out)
            yield out

    def _count(self, name: str, before: Tensor, after: Tensor) -> None:
        """Refuse an overflow, and count what underflows."""
        limits = torch.finfo(after.dtype)
        if limits.max * 1.01 > torch.finfo(before.dtype).max:
            return  # the range is as wide: bf16 has fp32's exponents
        over = after.isinf() & before.isfinite()
        if bool(over.any()):
            raise ValueError(
                f"{name}: {int(over.sum())} values, up to {float(before[over].abs().max()):g}, are"
                f" beyond {after.dtype}'s largest, {limits.max:g}; give another --dtype"
            )
        small = (before != 0) & (after.abs() < limits.tiny)
        zero, inexact = after == 0, after.to(before.dtype) != before
        with self._lock:
            self._values += before.numel()
            self._zero += int((small & zero).sum())
            self._subnormal += int((small & ~zero & inexact).sum())

    @property
    def underflow(self) -> str | None:
        """The number of values read that were too small for their dtype; None for none."""
        if not self._zero + self._subnormal:
            return None
        return (
            f"of {self._values:,} values {self._zero:,} were too small for the dtype and became"
            f" zero, {self._subnormal:,} more lost digits (subnormal numbers)"
        )


class Merged:
    """Several sources with different names as one."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.homes = {name: source for source in sources for name in source.spec}
        self.spec = {name: source.spec[name] for name, source in self.homes.items()}
        names = [name for source in sources for name in source.spec]
        refuse([f"given twice: {name}" for name, count in Counter(names).items() if count > 1])

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks of the source that has the name."""
        yield from self.homes[name].blocks(name)


class Average:
    """The mean of the same tensors of several sources, taken in fp32.

    Raises ValueError listing the names and shapes in which they differ.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        first = sources[0].spec
        for number, source in enumerate(sources[1:], 2):
            compare_shapes(source.spec, first, f"source {number}", "source 1")
        self.sources = sources
        self.spec = first

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the mean as one block, in the first source's dtype."""
        total: Tensor | None = None
        for source in self.sources:
            value = read(source, name)
            total = value.float() if total is None else total.add_(value)
        assert total is not None
        yield total.div_(len(self.sources)).to(self.spec[name].dtype)


def compare_shapes(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], here: str, there: str
) -> None:
    """Raise ValueError listing every name and shape in which two specs differ."""
    problems = [f"only in {here}: {name}" for name in first if name not in second]
    problems += [f"only in {there}: {name}" for name in second if name not in first]
    problems += [
        f"{name} is {list(first[name].shape)} in {here}, {list(second[name].shape)} in {there}"
        for name in first
        if name in second and first[name].shape != second[name].shape
    ]
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{len(problems)} keys do not fit:\n  " + "\n  ".join(problems))
