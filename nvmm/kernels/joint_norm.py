"""RMSNorm over rows whose columns are spread over a tensor-parallel group.

InternViT's QK-norm (Chen et al. 2024, arXiv 2312.14238): queries and keys are each normed over the
features of all heads. Every rank adds up its part, one all-reduce makes the statistics of all
tensors whole, and another one their gradients. Sums are fp32. Kernels: csrc/joint_norm/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.kernels import library


def joint_norm(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    eps: float,
    first: int = 0,
    real: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Return x / rms(x) * weight of each tensor; shapes and dtypes stay, padding columns are 0.

    Args:
        tensors: [..., columns of this rank], all with the same rows and columns.
        weights: [columns of all ranks], whole on every rank, and so is each one's gradient.
        eps: added to the mean square.
        first: this rank's first column in the whole row.
        real: number of its columns that count; those behind are padding, which gets no gradient.
            None: all.
        group: ranks that share the columns; None for one rank.
    """
    real = tensors[0].shape[-1] if real is None else real
    first = first if real else 0  # a rank of padding alone lies behind the whole
    return _JointNorm.apply(first, real, eps, group, len(tensors), *tensors, *weights)


class _JointNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        first: int,
        real: int,
        eps: float,
        group: dist.ProcessGroup | None,
        count: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors, weights = inputs[:count], inputs[count:]
        squares, apply, *_ = operations(*inputs)
        means = torch.stack([squares(x, real) for x in tensors])
        if group is not None:
            dist.all_reduce(means, group=group)
        scales = torch.rsqrt(means / weights[0].numel() + eps)
        ctx.save_for_backward(*inputs, scales)
        ctx.arguments = (first, real, group, count)
        return tuple(
            apply(x, weight, scale, first, real)
            for x, weight, scale in zip(tensors, weights, scales, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, scales = ctx.saved_tensors
        first, real, group, count = ctx.arguments
        rows = list(zip(gradients, inputs[:count], inputs[count:], scales, strict=True))
        *_, sums, backward = operations(*inputs)
        parts = [part for row in rows for part in sums(*row, first, real)]
        if group is not None:
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=group)
            parts = list(flat.split([part.numel() for part in parts]))
        dots, dweights = parts[::2], parts[1::2]
        dtensors = [
            backward(*row, dot / dweight.numel(), first, real)
            for row, dot, dweight in zip(rows, dots, dweights, strict=True)
        ]
        return (*[None] * 5, *dtensors, *(d.to(inputs[-1].dtype) for d in dweights))


def operations(*tensors: Tensor) -> Any:
    """Return the four operations of a rank, kernels or eager: squares, apply, sums, backward."""
    if library.fused("joint_norm", *tensors):
        ops = torch.ops.nvmm
        return (
            *(ops.joint_norm_squares, ops.joint_norm_apply),
            *(ops.joint_norm_sums, ops.joint_norm_backward),
        )
    return eager_squares, eager_apply, eager_sums, eager_backward


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eager_squares(x: Tensor, real: int) -> Tensor:
    """Return the sum of squares of each row's real columns, [rows]."""
    return _wide(x[..., :real]).square().sum(-1).flatten()


def eager_apply(x: Tensor, weight: Tensor, scale: Tensor, first: int, real: int) -> Tensor:
    """Return x * scale * weight with 0 in padding columns. scale: [rows]."""
    y = torch.zeros_like(x)
    scale = scale.view(*x.shape[:-1], 1)
    y[..., :real] = _wide(x[..., :real]) * scale * _wide(weight[first : first + real])
    return y


def eager_sums(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, first: int, real: int
) -> tuple[Tensor, Tensor]:
    """Return the sums of dy * weight * normed x along rows, [rows], and of dy * normed x over rows.

    The latter are this rank's part of the weight's gradient, [columns of all ranks].
    """
    scale = scale.view(*x.shape[:-1], 1)
    along = _wide(dy[..., :real]) * (_wide(x[..., :real]) * scale)
    dots = (along * _wide(weight[first : first + real])).sum(-1)
    dweight = torch.zeros_like(_wide(weight))
    dweight[first : first + real] = along.flatten(0, -2).sum(0)
    return dots.flatten(), dweight


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, dots: Tensor, first: int, real: int
) -> Tensor:
    """Return the gradient of x. dots: `eager_sums`' of all ranks over the whole row's length."""
    dx = torch.zeros_like(x)
    scale, dots = (t.view(*x.shape[:-1], 1) for t in (scale, dots))
    normed = _wide(x[..., :real]) * scale
    weighted = _wide(dy[..., :real]) * _wide(weight[first : first + real])
    dx[..., :real] = scale * (weighted - normed * dots)
    return dx


def _fake_squares(x: Tensor, real: int) -> Tensor:
    return x.new_empty((x.shape[:-1].numel(),), dtype=torch.float32)


def _fake_apply(x: Tensor, weight: Tensor, scale: Tensor, first: int, real: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_sums(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, first: int, real: int
) -> tuple[Tensor, Tensor]:
    return _fake_squares(x, real), weight.new_empty(weight.shape, dtype=torch.float32)


def _fake_backward(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


if library.MISSING is None:
    torch.library.register_fake("nvmm::joint_norm_squares", _fake_squares)
    torch.library.register_fake("nvmm::joint_norm_apply", _fake_apply)
    torch.library.register_fake("nvmm::joint_norm_sums", _fake_sums)
    torch.library.register_fake("nvmm::joint_norm_backward", _fake_backward)
