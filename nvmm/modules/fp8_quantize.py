"""Quantising to FP8 by the definitions of Transformer Engine 2.11's recipes, in plain PyTorch.

A value is data x inverse, data in float8 and one inverse scale for each block. Data are rounded to
nearest, ties to even, and saturate; NaN stays NaN. Arithmetic is float32, but float64 where the
tensor is float64. MX formats: OCP Microscaling Formats v1.0, section 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Block = tuple[int, int]


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8.

    data: float8 [rows, columns].
    inverse: the factor of each block, float32 or float64 (mxfp8: float8_e8m0fnu), [rows / block
        rows, columns / block columns], rounded up: the last blocks may be incomplete.
    block: rows and columns of a block; None: the whole matrix.
    """

    data: Tensor
    inverse: Tensor
    block: Block | None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the values [rows, columns] in `dtype`, which is float32 or float64."""
        inverse = self.inverse
        if inverse.dtype == torch.float8_e8m0fnu:
            inverse = inverse.float()  # no cast leads from E8M0 to float64
        return self.data.to(dtype) * _spread(inverse.to(dtype), self.data.shape, self.block)

    def gathered(self, group: dist.ProcessGroup) -> Quantized:
        """Gather the rows of all ranks of `group`, in order. A rank's rows are whole blocks.

        The bytes travel as uint8: gloo knows no float8.
        """
        data = _gather_rows(self.data, group)
        inverse = self.inverse if self.block is None else _gather_rows(self.inverse, group)
        return Quantized(data, inverse, self.block)


def amax(x: Tensor, block: Block | None) -> Tensor:
    """Return the largest magnitude of each block of x [rows, columns].

    It is float32, but float64 where x is float64.

    NaN is passed over, as by Transformer Engine's fmaxf: the scale is the other values'.
    """
    magnitude = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
    magnitude = torch.fmax(magnitude, magnitude.new_zeros(()))
    if block is None:
        return magnitude.amax().view(1, 1) if x.numel() else magnitude.new_zeros(1, 1)
    rows, columns = block
    padded = F.pad(magnitude, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    parts = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return parts.amax((1, 3))


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """Return the ratio of `dtype`'s largest number to an amax, never infinite.

    It is 1 where the amax is 0 or infinite. power_of_two: round it down to a power of two.
    """
    scale = torch.finfo(dtype).max / amax
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor, block: Block | None = None) -> Quantized:
    """Quantise x [rows, columns] by its scales, which are shaped like `Quantized.inverse`."""
    return Quantized(_cast(x, dtype, scale, block), 1 / scale, block)


def quantize_mx(x: Tensor, dtype: torch.dtype, block: Block) -> Quantized:
    """Quantise x [rows, columns] by E8M0 scales, the least powers of two without an overflow."""
    largest = amax(x, block)
    mantissa, exponent = torch.frexp(largest / torch.finfo(dtype).max)
    biased = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)  # of the log2, rounded up
    biased = torch.where(largest == 0, 0, torch.where(largest.isinf(), 254, biased))
    scale = torch.ldexp(torch.ones_like(largest), 127 - biased)
    inverse = biased.to(torch.uint8).view(torch.float8_e8m0fnu)
    return Quantized(_cast(x, dtype, scale, block), inverse, block)


def _cast(x: Tensor, dtype: torch.dtype, scale: Tensor, block: Block | None) -> Tensor:
    limit = torch.finfo(dtype).max
    scaled = x.detach().to(scale.dtype) * _spread(scale, x.shape, block)
    return scaled.clamp(-limit, limit).to(dtype)


def _spread(values: Tensor, shape: torch.Size, block: Block | None) -> Tensor:
    """Repeat each block's value for its elements; one value for all is left to broadcasting."""
    if block is None:
        return values
    for axis, size in enumerate(block):
        if size > 1:
            values = values.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return values


def _gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    local_rows = x.contiguous().view(torch.uint8) if x.element_size() == 1 else x.contiguous()
    rows = local_rows.new_empty(group.size() * local_rows.shape[0], *local_rows.shape[1:])
    dist.all_gather_into_tensor(rows, local_rows, group=group)
    return rows.view(x.dtype)
