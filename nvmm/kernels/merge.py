"""Put the rows of two tensors together in a given order, in one pass over memory.

They are media features and embeddings of words or tags. Kernels: csrc/merge/
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library


def merge_rows(
    base: Tensor, values: Tensor, index: Tensor, base_index: Tensor | None = None
) -> Tensor:
    """Put `values` at rows `index` and `base` in the other rows; out of place.

    Args:
        base: [m, width]. values: [n, width], of its dtype.
        index: int64 [n], each value's row of the result.
        base_index: int64 [m], each base row's row of the result, which has m + n rows then. None:
            row i stays row i; the rows that `index` names are lost, and their gradient is zero.

    Raises ValueError (on CPU) when two rows have one place, or a row has none.
    """
    m, n = base.shape[0], values.shape[0]
    rows = m if base_index is None else m + n
    if type(index) is Tensor and index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check(index if base_index is None else torch.cat([base_index, index]), rows)
    if not library.fused("merge", base, values):
        return eager_merge_rows(base, values, index, base_index)
    source = torch.arange(rows, device=index.device)
    if base_index is not None:
        source = source.scatter(0, base_index, torch.arange(m, device=index.device))
    source = source.scatter(0, index, torch.arange(m, m + n, device=index.device))
    return torch.ops.nvmm.merge(base, values, source)


def eager_merge_rows(
    base: Tensor, values: Tensor, index: Tensor, base_index: Tensor | None = None
) -> Tensor:
    """Do `merge_rows` by PyTorch's own functions, without its checks."""
    if base_index is not None:
        rows = base.new_zeros(base.shape[0] + values.shape[0], base.shape[1])
        base = rows.index_copy(0, base_index, base)
    return base.index_copy(0, index, values)


def _check(index: Tensor, rows: int) -> None:
    targets = index.unique()
    outside = targets[(targets < 0) | (targets >= rows)]
    if outside.numel():
        raise ValueError(f"the rows {outside.tolist()} must be in [0, {rows})")
    if targets.numel() != index.numel():
        raise ValueError(f"{index.numel()} rows have {targets.numel()} places, one each is needed")


def _fake(base: Tensor, values: Tensor, source: Tensor) -> Tensor:
    return base.new_empty((source.shape[0], base.shape[1]))


def _fake_backward(dy: Tensor, target: Tensor, base_rows: int) -> tuple[Tensor, Tensor]:
    others = target.shape[0] - base_rows
    return dy.new_empty((base_rows, dy.shape[1])), dy.new_empty((others, dy.shape[1]))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    base, values, source = inputs
    ctx.save_for_backward(source)
    ctx.rows = (base.shape[0], values.shape[0])


def _backward(ctx: Any, dy: Tensor) -> Any:
    (source,) = ctx.saved_tensors
    m, n = ctx.rows
    rows = torch.arange(source.shape[0], device=source.device)
    target = torch.full((m + n,), -1, device=source.device).scatter(0, source, rows)
    return *torch.ops.nvmm.merge_backward(dy, target, m), None


if library.MISSING is None:
    torch.library.register_fake("nvmm::merge", _fake)
    torch.library.register_fake("nvmm::merge_backward", _fake_backward)
    torch.library.register_autograd("nvmm::merge", _backward, setup_context=_setup)
