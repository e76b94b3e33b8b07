"""Residual adds of scaled branches: LayerScale and the tanh gate of gated cross-attention.

LayerScale: Touvron et al. 2021 (arXiv 2103.17239), section 2; tanh gates: Alayrac et al. 2022
(arXiv 2204.14198), section 2.2. Kernels: csrc/gated_residual/
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library


def gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    tanh: bool = False,
) -> Tensor:
    """Return residual + mask * gate * (branch + bias), with tanh(gate) when `tanh`; rounded once.

    Args:
        residual, branch: [..., width].
        gate: [width], or one number [1].
        bias: [width] or None.
        mask: [...], a weight of each row; a row of 0 keeps its residual whatever the branch holds,
            and sends nothing back. It gets no gradient.
    """
    if library.fused("gated_residual", residual, branch, gate, bias, mask):
        return torch.ops.nvmm.gated_residual(residual, branch, bias, gate, mask, tanh)
    return eager_gated_residual(residual, branch, gate, bias, mask, tanh=tanh)


def eager_gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    tanh: bool = False,
) -> Tensor:
    """Do `gated_residual` by PyTorch's own functions."""
    if bias is not None:
        branch = branch + bias
    if mask is not None:
        weight = mask.unsqueeze(-1)
        branch = branch.masked_fill(weight == 0, 0.0) * weight
    return residual + branch * (gate.tanh() if tanh else gate)


def _fake(
    residual: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    mask: Tensor | None,
    tanh: bool,
) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_backward(
    dy: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    mask: Tensor | None,
    tanh: bool,
) -> tuple[Tensor, Tensor]:
    sums = branch.new_empty((2, branch.shape[-1]), dtype=torch.float32)
    return branch.new_empty(branch.shape), sums


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, branch, bias, gate, mask, tanh = inputs
    ctx.save_for_backward(branch, bias, gate, mask)
    ctx.tanh = tanh


def _backward(ctx: Any, dy: Tensor) -> Any:
    branch, bias, gate, mask = ctx.saved_tensors
    dbranch, sums = torch.ops.nvmm.gated_residual_backward(dy, branch, bias, gate, mask, ctx.tanh)
    dgate, level = sums
    factor = gate.float().tanh() if ctx.tanh else gate.float()
    if gate.numel() == 1:
        # torch adds a vector up in fp32 with more error than its rows' sums have.
        dgate = dgate.sum(dtype=torch.float64).float().view_as(gate)
    if ctx.tanh:
        dgate = dgate * (1 - factor.square())
    dbias = None if bias is None else (level * factor).to(bias.dtype)
    return dy, dbranch, dbias, dgate.to(gate.dtype), None, None


if library.MISSING is None:
    torch.library.register_fake("nvmm::gated_residual", _fake)
    torch.library.register_fake("nvmm::gated_residual_backward", _fake_backward)
    torch.library.register_autograd("nvmm::gated_residual", _backward, setup_context=_setup)
