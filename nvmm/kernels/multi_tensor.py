"""L2 norm and scaling of lists of tensors, called as Apex's and TE's multi-tensor functions are.

Kernels: csrc/multi_tensor/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *args: Any
) -> Any:
    """Call op(0, noop_flag, tensor_lists, *args), as Apex does; ours choose their own chunks."""
    return op(0, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of all tensors together and, if `per_tensor`, each one's: [1], [tensors].

    Squares are added up in float64, in an order that does not depend on the number of threads.

    Args:
        chunk_size: not used.
        noop_flag: int32 [1], set to 1 where the norm is not finite.
        tensor_lists: one list, of one device; empty tensors count as 0.
    """
    [tensors] = tensor_lists
    norm = _l2norm(list(tensors), noop_flag)
    if not per_tensor:
        return norm, None
    return norm, torch.cat([norm[:0], *(_l2norm([tensor], noop_flag) for tensor in tensors)])


def _l2norm(tensors: list[Tensor], flag: Tensor) -> Tensor:
    if tensors and library.fused("multi_tensor", *tensors):
        return torch.ops.nvmm.multi_tensor_l2norm([t.contiguous() for t in tensors], flag)
    return eager_l2norm(tensors, flag)


def eager_l2norm(tensors: Sequence[Tensor], flag: Tensor) -> Tensor:
    """Return the norm by PyTorch's own functions, float32 [1]."""
    if not tensors:
        return torch.zeros(1, device=flag.device)
    norm = torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32)).norm()
    flag.masked_fill_(~norm.isfinite(), 1)
    return norm.reshape(1)


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Write sources * scale, rounded once, into the targets. A list may be both.

    Args:
        chunk_size: not used.
        noop_flag: int32 [1], set to 1 where a source has a number that is not finite.
        tensor_lists: sources and targets, each of one dtype.
    """
    sources, targets = tensor_lists
    if not sources:
        return
    dense = all(t.is_contiguous() for t in (*sources, *targets))
    problem = None if dense else "a tensor is not contiguous"
    fused = [library.fused("multi_tensor", *ts, problem=problem) for ts in (sources, targets)]
    if all(fused):
        torch.ops.nvmm.multi_tensor_scale(list(sources), list(targets), noop_flag, scale)
        torch.autograd.graph.increment_version(targets)
    else:
        eager_scale(sources, targets, noop_flag, scale)


def eager_scale(
    sources: Sequence[Tensor], targets: Sequence[Tensor], flag: Tensor, scale: float
) -> None:
    """Do `multi_tensor_scale` by PyTorch's own functions."""
    for source, target in zip(sources, targets, strict=True):
        flag.masked_fill_(~source.isfinite().all(), 1)
        target.copy_(source.to(torch.promote_types(source.dtype, target.dtype)) * scale)


def _fake_norm(tensors: Sequence[Tensor], flag: Tensor) -> Tensor:
    return flag.new_empty((1,), dtype=torch.float32)


def _fake_scale(*_: Any) -> None:
    return None


if library.MISSING is None:
    torch.library.register_fake("nvmm::multi_tensor_l2norm", _fake_norm)
    torch.library.register_fake("nvmm::multi_tensor_scale", _fake_scale)
