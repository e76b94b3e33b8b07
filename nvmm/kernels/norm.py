"""RMSNorm and LayerNorm over the last axis, with the residual add before them if wanted.

RMSNorm: Zhang and Sennrich 2019 (arXiv 1910.07467); LayerNorm: Ba et al. 2016 (arXiv 1607.06450).
Statistics and products are fp32, results are rounded once. Kernels: csrc/norm/
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.kernels import library


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms: bool,
    zero_centered: bool = False,
) -> Tensor:
    """Return x normed, in x's shape and dtype.

    Args:
        x: [..., width].
        weight: [width]; gamma, or gamma - 1 when `zero_centered` (layernorm1p).
        bias: [width] or None; RMSNorm (`rms`) has none.
        eps: added to the mean square or the variance.

    Raises ValueError for a bias of RMSNorm.
    """
    _check_bias(bias, rms)
    if library.fused("norm", x, weight, bias):
        return torch.ops.nvmm.norm(x, None, weight, bias, eps, rms, zero_centered)[0]
    return eager_norm(x, weight, bias, eps=eps, rms=rms, zero_centered=zero_centered)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms: bool,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (normed sum, sum) of x + residual, [..., width]; the sum is rounded, then normed.

    The other arguments are `norm`'s.
    """
    _check_bias(bias, rms)
    if library.fused("norm", x, residual, weight, bias):
        out = torch.ops.nvmm.norm(x, residual, weight, bias, eps, rms, zero_centered)
        return out[0], out[1]
    total = x + residual
    return eager_norm(total, weight, bias, eps=eps, rms=rms, zero_centered=zero_centered), total


def eager_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms: bool,
    zero_centered: bool = False,
) -> Tensor:
    """Do `norm` by PyTorch's own functions."""
    if zero_centered:
        weight = weight + 1
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _check_bias(bias: Tensor | None, rms: bool) -> None:
    if rms and bias is not None:
        raise ValueError("RMSNorm has no bias, and got one")


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    statistics = x.new_empty((rows,), dtype=torch.float32)
    y = x.new_empty(x.shape)
    total = y.new_empty(x.shape if residual is not None else (0,))
    return y, total, statistics.new_empty((0 if rms else rows,)), statistics


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty((0,) if rms else weight.shape)
    return h.new_empty(h.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, _, rms, zero_centered = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.arguments = (rms, zero_centered)
    ctx.has = (residual is not None, bias is not None)


def _backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
    h, weight, mean, rstd = ctx.saved_tensors
    has_residual, has_bias = ctx.has
    if dy is None:
        return dsum, dsum, None, None, None, None, None
    dsum = dsum if has_residual else None
    dx, dweight, dbias = torch.ops.nvmm.norm_backward(
        dy, dsum, h, weight, mean, rstd, *ctx.arguments
    )
    residual = dx if has_residual else None
    return dx, residual, dweight, dbias if has_bias else None, None, None, None


if library.MISSING is None:
    torch.library.register_fake("nvmm::norm", _fake)
    torch.library.register_fake("nvmm::norm_backward", _fake_backward)
    torch.library.register_autograd("nvmm::norm", _backward, setup_context=_setup)
