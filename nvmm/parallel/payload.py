"""Tensors that travel with the hidden states from pipeline stage to pipeline stage, both ways.

mcore's schedules carry exactly one 3-D tensor between stages and differentiate it. Other tensors
for later stages are packed behind the hidden states along the first axis, by `cat` and slices, so
that gradients come back by the same way and no stage computes an encoder twice.

The lengths differ from micro-batch to micro-batch (numbers of tiles), so stages must exchange
shapes (`parallel.variable_seq_lengths=true`, 24 bytes a transfer): with fixed shapes every
micro-batch would send and receive the largest payload.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def pack(hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Put named tensors [m, b, h] behind hidden states [s, b, h]: [s + ..., b, h].

    The result is always a new tensor: mcore frees the storage of a tensor that was sent.
    Raises ValueError for a tensor of another batch, width or dtype.
    """
    for name, tensor in tensors.items():
        if tensor.shape[1:] != hidden.shape[1:] or tensor.dtype != hidden.dtype:
            raise ValueError(
                f"payload {name} is {tuple(tensor.shape)} {tensor.dtype}; behind hidden states"
                f" {tuple(hidden.shape)} {hidden.dtype} it must be [m, b, h] of the same type"
            )
    return torch.cat([hidden, *tensors.values()])


def unpack(packed: Tensor, rows: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Take apart the hidden states and the named tensors, `rows` of each, that `pack` joined.

    Raises ValueError when fewer rows arrived than the named tensors alone have.
    """
    first = packed.shape[0] - sum(rows.values())
    if first < 1:
        raise ValueError(f"{packed.shape[0]} rows arrived, {dict(rows)} and hidden states expected")
    hidden, *rest = packed.split([first, *rows.values()])
    return hidden, dict(zip(rows, rest, strict=True))
