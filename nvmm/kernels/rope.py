"""Rotary position embedding of queries and keys in one pass.

Su et al. 2021 (arXiv 2104.09864), in the rotate-half order of Llama, Qwen, Mistral and Nemotron:
channels i and i + dim / 2 of a head turn by the token's angle i. Angles and products are fp32
whatever the dtype, results are rounded once. Kernels: csrc/rope/
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library


def rope(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the first dim channels of each head of q and k; the others pass through.

    Args:
        q: [s, b, heads, d]; k: [s, b, groups, d]. Views of a fused QKV output are read in place.
        table: float32 [s, b, dim], dim <= d: the cosines of each token's dim / 2 angles, then their
            sines. An expanded tensor is read as it is. It gets no gradient.

    Raises ValueError for a table of another shape or dtype.
    """
    s, b, _, width = q.shape
    dim = table.shape[-1]
    if table.shape != (s, b, dim) or dim % 2 or dim > width or table.dtype != torch.float32:
        raise ValueError(
            f"the table of {table.dtype} {tuple(table.shape)} must be torch.float32 ({s}, {b}, dim)"
            f" with an even dim of at most {width}"
        )
    if library.fused("rope", q, k):
        turned: tuple[Tensor, Tensor] = torch.ops.nvmm.rope(q, k, table, False)
        return turned
    return eager_rope(q, k, table)


def eager_rope(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Do `rope` by PyTorch's own functions."""
    return _turned(q, table), _turned(k, table)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    half = table.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = table.to(wide).unsqueeze(2).chunk(2, -1)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    a, b = a.to(wide), b.to(wide)
    turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _fake(q: Tensor, k: Tensor, table: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, table, inverse = inputs
    ctx.save_for_backward(table)
    ctx.inverse = inverse


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
    (table,) = ctx.saved_tensors
    return *torch.ops.nvmm.rope(dq, dk, table, not ctx.inverse), None, None


if library.MISSING is None:
    torch.library.register_fake("nvmm::rope", _fake)
    torch.library.register_autograd("nvmm::rope", _backward, setup_context=_setup)
