"""Pixel shuffle: each block of a grid's tokens becomes one token (InternVL's v2; NVLM section 3.1).

Kernels: csrc/pixel_shuffle/
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Put each block's channels together: [n, rows / factor, columns / factor, factor^2 channels].

    Channels of a block are in the order of its pixels, row by row. The factor divides rows and
    columns. A view with gaps (an encoder's output without its class token) is read in place.
    """
    if library.fused("pixel_shuffle", x):
        return torch.ops.nvmm.pixel_shuffle(x, factor)
    return eager_pixel_shuffle(x, factor)


def eager_pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Do `pixel_shuffle` by PyTorch's own functions."""
    blocks = x.unflatten(1, (-1, factor)).unflatten(3, (-1, factor))
    return blocks.transpose(2, 3).flatten(3)


def _fake(x: Tensor, factor: int) -> Tensor:
    n, rows, columns, channels = x.shape
    return x.new_empty((n, rows // factor, columns // factor, factor * factor * channels))


def _fake_backward(dy: Tensor, factor: int) -> Tensor:
    n, rows, columns, channels = dy.shape
    return dy.new_empty((n, rows * factor, columns * factor, channels // factor**2))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.factor = inputs[1]


def _backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.nvmm.pixel_shuffle_backward(dy, ctx.factor), None


if library.MISSING is None:
    torch.library.register_fake("nvmm::pixel_shuffle", _fake)
    torch.library.register_fake("nvmm::pixel_shuffle_backward", _fake_backward)
    torch.library.register_autograd("nvmm::pixel_shuffle", _backward, setup_context=_setup)
