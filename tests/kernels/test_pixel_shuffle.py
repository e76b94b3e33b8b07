"""Pixel shuffle: order, views, gradients, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.pixel_shuffle import eager_pixel_shuffle, pixel_shuffle
from tests.kernels.accuracy import DTYPES, needs_kernels, outputs_and_gradients

pytestmark = needs_kernels


def grid(n: int, rows: int, columns: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, rows, columns, channels, generator=generator)


def check(x: Tensor, factor: int, dtype: torch.dtype) -> None:
    """Bits of PyTorch's own functions, output and gradient: nothing is computed."""
    found, expected = (
        outputs_and_gradients(lambda y, f=function: f(y, factor), [x], dtype)
        for function in (pixel_shuffle, eager_pixel_shuffle)
    )
    assert all(map(torch.equal, found, expected)) and len(found) == 2
    assert all(t.is_contiguous() for t in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ((1, 1, 1, 1), 1),
        ((3, 2, 4, 127), 2),
        ((2, 6, 3, 3), 3),
        ((1, 4, 4, 4097), 2),
        ((127, 2, 2, 8), 1),
        ((2, 16, 8, 40), 4),
    ],
)
def test_equals_pytorch(shape: tuple[int, ...], factor: int, dtype: torch.dtype) -> None:
    check(grid(*shape), factor, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
)
def test_any_shape(
    n: int, rows: int, columns: int, factor: int, channels: int, dtype: torch.dtype
) -> None:
    check(grid(n, rows * factor, columns * factor, channels), factor, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_an_encoder_s_output(dtype: torch.dtype) -> None:
    """Without its class token, batch first or tokens first in memory; nothing else is read."""
    whole = grid(1, 3, 1 + 4 * 6, 8)[0].to(dtype)
    whole[:, 0] = float("nan")
    for tokens in (whole, whole.transpose(0, 1).contiguous().transpose(0, 1)):
        view = tokens[:, 1:].view(3, 4, 6, 8)
        assert not view.is_contiguous()
        assert torch.equal(pixel_shuffle(view, 2), pixel_shuffle(view.contiguous(), 2))
        leaf = tokens.clone().requires_grad_()
        pixel_shuffle(leaf[:, 1:].view(3, 4, 6, 8), 2).square().sum().backward()
        assert torch.equal(leaf.grad[:, 1:], 2 * whole[:, 1:]) and not leaf.grad[:, 0].any()


def test_channels_that_are_not_contiguous_and_a_strange_gradient() -> None:
    x = grid(2, 3, 4, 4).transpose(1, 3).requires_grad_()
    y = pixel_shuffle(x, 1)
    assert torch.equal(y, x)
    y.sum().backward()  # expanded from one number
    assert torch.equal(x.grad, torch.ones_like(x))


def test_extreme_values_keep_their_bits() -> None:
    numbers = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    out = pixel_shuffle(numbers.view(1, 2, 2, 1), 2).flatten()
    assert torch.equal(out.view(torch.int32), numbers.view(torch.int32))


def test_a_factor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the factor must divide the grid"):
        pixel_shuffle(torch.ones(1, 4, 6, 2), 4)


@pytest.mark.usefixtures("auto")
def test_gradients_of_the_eager_path() -> None:
    x = grid(2, 2, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: pixel_shuffle(y, 2), (x,))


def test_schema_fake_and_autograd_registration() -> None:
    x = grid(2, 2, 4, 3).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.nvmm.pixel_shuffle.default, (x, 2))
