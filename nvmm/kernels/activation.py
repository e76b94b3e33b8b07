"""Bias, activation and gate between an MLP's two linears, recomputed in backward.

SwiGLU and GEGLU: Shazeer 2020 (arXiv 2002.05202); squared ReLU: So et al. 2021 (arXiv 2109.08668);
GELU by erf: Hendrycks and Gimpel 2016 (arXiv 1606.08415). Kernels: csrc/activation/
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.kernels import library

KINDS = ("swiglu", "geglu", "squared_relu", "gelu")
GATED = ("swiglu", "geglu")


def activation(x: Tensor, bias: Tensor | None = None, *, kind: str) -> Tensor:
    """Apply activation `kind` to x + bias, in fp32 and rounded once.

    Args:
        x: [..., width]. SwiGLU and GEGLU take the gate from the first half of the last axis, which
            must be even, and give [..., width / 2]; the others keep the shape.
        bias: [width] or None.
        kind: swiglu | geglu | squared_relu | gelu.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind} must be one of {', '.join(KINDS)}")
    if library.fused("activation", x, bias):
        return torch.ops.nvmm.activation(x, bias, KINDS.index(kind))
    return eager_activation(x, bias, kind=kind)


def eager_activation(x: Tensor, bias: Tensor | None = None, *, kind: str) -> Tensor:
    """Do `activation` by PyTorch's own functions."""
    if bias is not None:
        x = x + bias
    if kind == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    if kind == "geglu":
        gate, up = x.chunk(2, -1)
        return F.gelu(gate) * up
    return F.relu(x).square() if kind == "squared_relu" else F.gelu(x)


def _fake(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    halves = KINDS[kind] in GATED
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2) if halves else x.shape)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if bias is None else x.shape[-1:])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, kind = inputs
    ctx.save_for_backward(x, bias)
    ctx.kind = kind


def _backward(ctx: Any, dy: Tensor) -> Any:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.nvmm.activation_backward(dy, x, bias, ctx.kind)
    return dx, None if bias is None else dbias, None


if library.MISSING is None:
    torch.library.register_fake("nvmm::activation", _fake)
    torch.library.register_fake("nvmm::activation_backward", _fake_backward)
    torch.library.register_autograd("nvmm::activation", _backward, setup_context=_setup)
