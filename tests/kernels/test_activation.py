"""Activation kernels: accuracy, edge cases, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.activation import GATED, KINDS, activation, eager_activation
from tests.kernels.accuracy import DTYPES, check_accuracy, needs_kernels, outputs_and_gradients

pytestmark = needs_kernels


def tensors(rows: int, width: int, kind: str, biased: bool, seed: int = 0) -> list[Tensor | None]:
    width *= 2 if kind in GATED else 1
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, width, generator=generator)
    return [x, torch.randn(width, generator=generator) if biased else None]


def check(rows: int, width: int, kind: str, biased: bool, dtype: torch.dtype) -> None:
    check_accuracy(
        lambda *inputs: activation(*inputs, kind=kind),
        lambda *inputs: eager_activation(*inputs, kind=kind),
        lambda seed: tensors(rows, width, kind, biased, seed),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 127), (65, 48), (2, 4097)])
def test_accuracy(rows: int, width: int, biased: bool, kind: str, dtype: torch.dtype) -> None:
    check(rows, width, kind, biased, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(KINDS), st.booleans())
def test_any_shape(rows: int, width: int, kind: str, biased: bool) -> None:
    check(rows, width, kind, biased, torch.float32)


EXTREMES = [0.0, 9.0, 88.0, 104.0, 200.0, 1e30, 3e38, float("inf")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Far tails, both infinities and NaN as in float64, forward and backward."""
    x = torch.tensor([sign * x for x in EXTREMES for sign in (1, -1)] + [float("nan")])
    twos = torch.full_like(x, 2.0)
    for inputs in [(x, twos), (twos, x)] if kind in GATED else [(x,)]:
        rounded = torch.cat(inputs).to(dtype)
        found, exact = (
            outputs_and_gradients(lambda t, f=f: f(t, kind=kind), [rounded], wide)
            for f, wide in ((activation, dtype), (eager_activation, torch.float64))
        )
        for a, e in zip(found, exact, strict=True):
            torch.testing.assert_close(a, e.to(dtype), rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2.5e-7), (torch.bfloat16, 2e-4)])
def test_error_function_and_exponential_everywhere(dtype: torch.dtype, limit: float) -> None:
    """GELU and SwiGLU of all of [-12, 12], which reaches every branch, beyond the last rounding."""
    x = torch.linspace(-12, 12, 400_000).to(dtype).unique()
    for kind, y in (("gelu", x), ("swiglu", torch.cat([x, torch.ones_like(x)]))):
        leaves = [y.detach().to(t).requires_grad_() for t in (dtype, torch.float64)]
        values = [
            f(t, kind=kind) for f, t in zip((activation, eager_activation), leaves, strict=True)
        ]
        for value in values:
            value.sum().backward()
        for a, e in (values, [t.grad[: x.numel()] for t in leaves]):
            error = (a - e).abs() - e.abs() * torch.finfo(dtype).eps / 2
            assert (error / x.abs().clamp(min=1)).max() < limit, kind


def test_rows_that_are_not_contiguous_and_none() -> None:
    x = torch.randn(6, 4, 10).transpose(0, 1)
    assert torch.equal(activation(x, kind="swiglu"), activation(x.contiguous(), kind="swiglu"))
    assert activation(torch.empty(0, 6), kind="geglu").shape == (0, 3)


def test_odd_gated_width_and_unknown_kind_are_refused() -> None:
    with pytest.raises(RuntimeError, match="must be even"):
        activation(torch.ones(2, 3), kind="swiglu")
    with pytest.raises(ValueError, match="kind=silu must be one of swiglu, geglu"):
        activation(torch.ones(2, 4), kind="silu")


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_eager_path(kind: str) -> None:
    x, bias = (t.double().requires_grad_() for t in tensors(3, 5, kind, True))
    assert torch.autograd.gradcheck(lambda *i: activation(*i, kind=kind), (x, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_schema_fake_and_autograd_registration(kind: str) -> None:
    x, bias = (t.requires_grad_() for t in tensors(3, 5, kind, True))
    torch.library.opcheck(torch.ops.nvmm.activation.default, (x, bias, KINDS.index(kind)))


@pytest.mark.parametrize(
    ("dy", "bias"),
    [
        (torch.zeros(2, 6), None),
        (torch.zeros(3, 2), None),
        (torch.zeros(2, 3).bfloat16(), None),
        (torch.zeros(2, 3), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(6).bfloat16()),
    ],
)
def test_gradients_and_biases_that_do_not_fit_are_refused(dy: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(RuntimeError, match=r"activation: the (gradient|bias) must have"):
        torch.ops.nvmm.activation_backward(dy, torch.zeros(2, 6), bias, KINDS.index("swiglu"))
