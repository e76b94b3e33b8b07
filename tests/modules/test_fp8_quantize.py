"""FP8 by the recipes' definitions: rounding, scales, blocks, against loops over single numbers."""

from __future__ import annotations

import bisect
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.modules.fp8_quantize import E4M3, E5M2, amax, quantize, quantize_mx, scale_of

FORMATS = (E4M3, E5M2)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BITS = {E4M3: (4, 3), E5M2: (5, 2)}
BLOCKS = [None, (1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 1), (3, 127), (127, 3), (2, 4097), (129, 131)]


@functools.cache
def numbers(dtype: torch.dtype) -> list[float]:
    """Every finite number of a format that is not negative, by its definition (OCP 8-bit)."""
    exponent_bits, mantissa_bits = BITS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            normal = exponent > 0
            value = (normal + fraction) * 2.0 ** (max(exponent, 1) - bias)
            if value <= LARGEST[dtype]:
                found.append(value)
    return found


def rounded(x: float, dtype: torch.dtype) -> float:
    """The nearest number of the format, the one with an even last bit of two; saturating."""
    if math.isnan(x):
        return x
    known = numbers(dtype)
    size = min(abs(x), known[-1])
    above = bisect.bisect_left(known, size)
    near = [i for i in (above - 1, above) if 0 <= i < len(known)]
    nearest = min(near, key=lambda i: (abs(known[i] - size), i % 2))
    return math.copysign(known[nearest], x)


def reference_scale(largest: float, dtype: torch.dtype, power_of_two: bool) -> float:
    if largest == 0 or math.isinf(largest):
        return 1.0
    scale = min(LARGEST[dtype] / largest, float(torch.finfo(torch.float32).max))
    return 2.0 ** math.floor(math.log2(scale)) if power_of_two else scale


def reference(
    x: Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] | None,
    *,
    recipe: str,
    scale: float | None = None,
) -> Tensor:
    """Quantised and back, one number after another, in Python's doubles.

    scale: of delayed scaling, which does not look at the values.
    """
    rows, columns = block or tuple(x.shape)
    out = x.double().clone()
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            part = out[top : top + rows, left : left + columns]
            largest = float(part.abs().max())
            if recipe == "mxfp8":
                # The least power of two at which the block fits.
                inverse = 2.0 ** math.ceil(math.log2(largest / LARGEST[dtype])) if largest else 1.0
                used = 1 / inverse
            elif recipe == "delayed":
                assert scale is not None
                used = scale
            else:
                used = reference_scale(largest, dtype, recipe == "blockwise")
            found = [rounded(v * used, dtype) / used for v in part.flatten().tolist()]
            part[:] = torch.tensor(found, dtype=torch.float64).view_as(part)
    return out


def values(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Normal numbers of which a few are larger or smaller by orders of magnitude, or zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chance = torch.rand(shape, generator=generator)
    x[chance < 0.02] *= 1e4
    x[(chance > 0.02) & (chance < 0.1)] *= 1e-5
    x[chance > 0.97] = 0.0
    return x


def test_the_formats_have_the_published_numbers() -> None:
    for dtype in FORMATS:
        found = torch.arange(128, dtype=torch.uint8).view(dtype).double()
        assert found[found.isfinite()].tolist() == numbers(dtype)
    assert numbers(E4M3)[1] == 2.0**-9 and numbers(E5M2)[1] == 2.0**-16


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(recipe: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = values(shape)
    for block in BLOCKS if recipe != "mxfp8" else [(1, 32), (32, 1)]:
        if recipe == "current" and block is not None:
            continue
        expected = reference(x, dtype, block, recipe=recipe)
        for precision in (torch.float64, torch.float32):
            given = x.to(precision)
            if recipe == "mxfp8":
                found = quantize_mx(given, dtype, block)
            else:
                scale = scale_of(amax(given, block), dtype, power_of_two=recipe == "blockwise")
                found = quantize(given, dtype, scale, block)
            assert found.data.dtype == dtype and found.data.shape == x.shape
            y = found.dequantize(precision).double()
            if precision == torch.float64:
                torch.testing.assert_close(y, expected, rtol=1e-15, atol=0)
            else:
                # Rounded products now and then lie on the other side of a tie.
                off = (y - expected).abs() > 1e-6 * expected.abs()
                assert off.double().mean() <= 2e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    st.sampled_from(FORMATS),
    st.sampled_from(["current", "blockwise", "mxfp8"]),
)
def test_any_numbers(numbers: list[float], dtype: torch.dtype, recipe: str) -> None:
    """No value is lost by more than the format's spacing, and none grows beyond the largest, but
    for that spacing where scales are powers of two."""
    x = torch.tensor([numbers], dtype=torch.float64)
    if recipe == "mxfp8":
        found = quantize_mx(x, dtype, (1, 32))
    else:
        block = (1, 128) if recipe == "blockwise" else None
        scale = scale_of(amax(x, block), dtype, power_of_two=recipe == "blockwise")
        found = quantize(x, dtype, scale, block)
    y = found.dequantize(torch.float64)
    largest = x.abs().max()
    spacing = 2.0 ** -(BITS[dtype][1] + 1)
    tiny = 2 * largest / LARGEST[dtype] * 2.0 ** (-16 if dtype == E5M2 else -9)
    assert (y.abs() <= (largest * (1 + (1e-15 if recipe == "current" else spacing)))).all()
    assert ((y - x).abs() <= spacing * x.abs() + tiny + 1e-30).all()


def test_what_is_too_large_saturates_and_nan_stays() -> None:
    x = torch.tensor([[1e6, -1e6, math.inf, math.nan, 3.0]])
    for dtype in FORMATS:
        y = quantize(x, dtype, torch.ones(1, 1)).dequantize(torch.float32)[0]
        largest = LARGEST[dtype]
        assert y[:3].tolist() == [min(1e6, largest), -min(1e6, largest), largest]
        assert y[3].isnan() and y[4] == 3.0


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_nan_leaves_the_others_as_they_are(recipe: str) -> None:
    """Transformer Engine's fmaxf passes over it; a block of nothing else is scaled by nothing."""
    x = values((8, 64)).float()
    gaps = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    gaps[3, :32] = True
    holes, zeros = x.masked_fill(gaps, math.nan), x.masked_fill(gaps, 0.0)
    for block in [(1, 32), (32, 1)] if recipe == "mxfp8" else BLOCKS:
        found = []
        for matrix in (holes, zeros):
            if recipe == "mxfp8":
                found.append(quantize_mx(matrix, E4M3, block).dequantize(torch.float32))
            else:
                scale = scale_of(amax(matrix, block), E4M3, power_of_two=recipe == "blockwise")
                found.append(quantize(matrix, E4M3, scale, block).dequantize(torch.float32))
        assert torch.equal(found[0].isnan(), gaps)
        assert torch.equal(found[0][~gaps], found[1][~gaps])
    assert amax(torch.full((2, 2), math.nan), None).item() == 0.0
    assert amax(torch.tensor([[math.nan, -math.inf]]), None).item() == math.inf


@pytest.mark.parametrize("largest", [0.0, math.inf])
def test_without_a_largest_number_the_scale_is_one(largest: float) -> None:
    assert scale_of(torch.tensor([largest]), E4M3).item() == 1.0
    assert scale_of(torch.tensor([largest]), E4M3, power_of_two=True).item() == 1.0


def test_scales() -> None:
    tiny = torch.finfo(torch.float32).tiny
    found = scale_of(torch.tensor([448.0, 1.0, 3.5, tiny / 4]), E4M3)
    assert found.tolist() == [1.0, 448.0, 128.0, torch.finfo(torch.float32).max]
    powers = scale_of(torch.tensor([448.0, 1.0, 3.5, 500.0]), E4M3, power_of_two=True)
    assert powers.tolist() == [1.0, 256.0, 128.0, 0.5]


def test_mx_scales_are_the_least_powers_that_fit() -> None:
    x = torch.zeros(5, 32)
    x[:, 0] = torch.tensor([448.0, 449.0, 1.0, 2.0**-140, 0.0])
    found = quantize_mx(x, E4M3, (1, 32))
    assert found.inverse.dtype == torch.float8_e8m0fnu
    bits = found.inverse.view(torch.uint8).flatten().tolist()
    assert bits == [127, 128, 127 - 8, 0, 0]
    assert found.dequantize(torch.float32)[:3, 0].tolist() == [448.0, 448.0, 1.0]


@pytest.mark.parametrize("block", [None, (1, 128), (128, 1), (128, 128), (1, 32)])
@pytest.mark.parametrize("shape", [(0, 5), (5, 40)])
def test_shapes_of_scales(block: tuple[int, int] | None, shape: tuple[int, int]) -> None:
    found = quantize(torch.ones(shape), E4M3, scale_of(amax(torch.ones(shape), block), E4M3), block)
    expected = (
        (1, 1) if block is None else tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    )
    assert tuple(found.inverse.shape) == expected
    assert torch.equal(found.dequantize(torch.float32), torch.ones(shape))
