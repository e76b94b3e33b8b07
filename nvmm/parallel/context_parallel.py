"""Context parallelism: the part of a sequence that a rank keeps, and the gather of the whole.

A sequence of 2 x size chunks is dealt in a zigzag: rank r keeps chunks r and 2 x size - 1 - r, so
that under a causal mask every rank has the same work. A packed row is dealt segment by segment.
Ranks of one context-parallel group read the same batch; the media are merged on the whole
sequence, and only then `share` and `shard` take this rank's part.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.batch import Batch


def positions(batch: Batch, size: int, rank: int) -> Tensor:
    """Return the columns of `batch` that rank `rank` keeps, in order, int64 [s / size].

    Raises ValueError when a row (or a packed segment) does not consist of 2 x size equal chunks.
    """
    if batch.cu_seqlens is None:
        bounds = [0, batch.tokens.shape[1]]
    else:
        bounds = batch.cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            what = "rows" if batch.cu_seqlens is None else "packed segments"
            raise ValueError(
                f"parallel.context_parallel_size={size} needs {what} whose length is a multiple of"
                f" {2 * size}, got {end - start}; samples {batch.sample_ids.tolist()}"
            )
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts).to(batch.tokens.device)


def share(batch: Batch) -> Batch:
    """Return this context-parallel rank's part of a micro-batch, tokens [b, s / size] and the like.

    Fields of whole rows stay whole: lengths, cu_seqlens, media, extras. Losses and counts over the
    parts add up to the whole batch's. With one rank it is the batch itself.
    """
    index = _local_positions(batch)
    if index is None:
        return batch
    return batch.replace(
        **{
            name: getattr(batch, name).index_select(1, index)
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
    )


def shard(hidden: Tensor, batch: Batch) -> Tensor:
    """Return this context-parallel rank's part [s / size, b, h] of hidden states [s, b, h].

    Backward leaves zeros at the other ranks' positions: the sum over the group, which mcore's
    gradient reduction takes, is the whole gradient.
    """
    index = _local_positions(batch)
    return hidden if index is None else hidden.index_select(0, index.to(hidden.device))


def _local_positions(batch: Batch) -> Tensor | None:
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    if size <= 1:  # 0 in a process without groups
        return None
    return positions(batch, size, parallel_state.get_context_parallel_rank())


def is_first() -> bool:
    """Return whether this is the first of its context-parallel ranks, or there is one."""
    from megatron.core import parallel_state

    return not parallel_state.is_initialized() or parallel_state.get_context_parallel_rank() == 0


def total(x: Tensor) -> Tensor:
    """Add up x over the context-parallel ranks, which have the parts of a sequence.

    The gradient of each rank's x is that of the sum: the ranks' losses of the sum are one loss.
    """
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return x
    group = parallel_state.get_context_parallel_group()
    summed: Tensor = x if group.size() == 1 else _Total.apply(x, group)
    return summed


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather every rank's x [s, ...] to [size, s, ...]; backward sums the ranks' gradients.

    The function of torch.distributed.nn fails in backward on gloo groups that are not the world.
    """
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


def in_order(gathered: Tensor) -> Tensor:
    """Put a sequence's zigzag parts [size, 2 x chunk, ...] in order, [size x 2 x chunk, ...]."""
    chunks = gathered.unflatten(1, (2, gathered.shape[1] // 2))
    return torch.cat([chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)])


class _Total(torch.autograd.Function):
    """all_reduce forward within `group`; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        summed = x.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Gather(torch.autograd.Function):
    """all_gather_into_tensor forward, reduce_scatter_tensor backward, within `group`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        out = x.new_empty((group.size(), *x.shape))
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out = gradient.new_empty(gradient.shape[1:])
        gathered = gradient.contiguous().flatten(0, 1)
        dist.reduce_scatter_tensor(out, gathered, group=ctx.group)
        return out, None
