"""RMSNorm and LayerNorm kernels: accuracy, edge cases, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.norm import eager_norm, norm, residual_norm
from tests.kernels.accuracy import (
    DTYPES,
    check_accuracy,
    check_rows,
    needs_kernels,
    outputs_and_gradients,
)

pytestmark = needs_kernels
EPS = 1e-5


def tensors(rows: int, width: int, rms: bool, seed: int = 0) -> list[Tensor | None]:
    """x, weight, bias"""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(rows, width), (width,), (width,)]
    )
    return [3 * x + 1, weight, None if rms else bias]


def check(rows: int, width: int, rms: bool, zero_centered: bool, dtype: torch.dtype) -> None:
    options = {"eps": EPS, "rms": rms, "zero_centered": zero_centered}
    check_accuracy(
        lambda *inputs: norm(*inputs, **options),
        lambda *inputs: eager_norm(*inputs, **options),
        lambda seed: tensors(rows, width, rms, seed),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (3, 127), (127, 64), (2, 4097), (300, 48)])
def test_accuracy(
    rows: int, width: int, rms: bool, zero_centered: bool, dtype: torch.dtype
) -> None:
    check(rows, width, rms, zero_centered, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(2, 200), st.booleans(), st.sampled_from(DTYPES))
def test_any_shape(rows: int, width: int, rms: bool, dtype: torch.dtype) -> None:
    check(rows, width, rms, False, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
def test_residual(rms: bool, dtype: torch.dtype) -> None:
    def inputs(seed: int) -> list[Tensor | None]:
        residual = torch.randn(33, 65, generator=torch.Generator().manual_seed(seed + 1))
        x, weight, bias = tensors(33, 65, rms, seed)
        return [x, residual, weight, bias]

    def eager(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        total = x + residual
        return eager_norm(total, weight, bias, eps=EPS, rms=rms), total

    check_accuracy(
        lambda *inputs: residual_norm(*inputs, eps=EPS, rms=rms),
        eager,
        inputs,
        dtype,
    )


def test_sum_alone_sends_its_gradient_back() -> None:
    x, weight, _ = tensors(3, 8, True)
    leaves = [x.clone().requires_grad_(), torch.randn(3, 8).requires_grad_()]
    _, total = residual_norm(*leaves, weight, eps=EPS, rms=True)
    total.sum().backward()
    assert all(torch.equal(leaf.grad, torch.ones(3, 8)) for leaf in leaves)


def test_rows_that_are_not_contiguous() -> None:
    x, weight, bias = tensors(6, 40, False)
    turned = x.t().contiguous().t()
    for strange in (turned, x[::2], x[:, :20].contiguous()[:, ::2]):
        w, b = weight[: strange.shape[1]], bias[: strange.shape[1]]
        expected = norm(strange.contiguous(), w, b, eps=EPS, rms=False)
        assert torch.equal(norm(strange, w, b, eps=EPS, rms=False), expected)


@pytest.mark.parametrize("rms", [True, False])
def test_no_rows(rms: bool) -> None:
    x, weight, bias = tensors(0, 8, rms)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    norm(x, weight, bias, eps=EPS, rms=rms).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("rms", [True, False])
def test_extreme_values(rms: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Rows of 1e18, 1e-20 and 0 keep their scale; infinity and NaN stay in their rows."""
    _, weight, bias = tensors(1, 8, rms)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    finite = torch.stack([1e18 * signs, 0 * signs, 1e-20 * signs, torch.arange(8.0)])
    wild = finite.clone()
    wild[0, 2], wild[1, 3], wild[2, 4] = float("inf"), float("nan"), float("-inf")
    for x in (finite, wild):
        rounded = [t if t is None else t.to(dtype) for t in (x, weight, bias)]
        found, exact = (
            outputs_and_gradients(lambda *i, f=f: f(*i, eps=1e-6, rms=rms), rounded, wide)
            for f, wide in ((norm, dtype), (eager_norm, torch.float64))
        )
        check_rows(found, exact, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
def test_a_variance_that_overflows_leaves_the_bias(rms: bool, dtype: torch.dtype) -> None:
    """And no gradient: as PyTorch's RMSNorm; its LayerNorm gives NaN."""
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    inputs = [1e30 * signs.expand(2, 8), torch.ones(8), None if rms else torch.arange(8.0)]
    y, dx, dweight, *dbias = outputs_and_gradients(
        lambda *i: norm(*i, eps=1e-6, rms=rms), inputs, dtype
    )
    assert torch.equal(y, (torch.zeros(8) if rms else inputs[2]).to(dtype).expand(2, 8))
    assert not dx.any() and not dweight.any() and all(t.any() for t in dbias)


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("zero_centered", [True, False])
def test_gradients_of_the_eager_path(rms: bool, zero_centered: bool) -> None:
    options = {"eps": EPS, "rms": rms, "zero_centered": zero_centered}
    inputs = [t if t is None else t.double().requires_grad_() for t in tensors(3, 7, rms)]
    residual = torch.randn(3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *i: norm(*i, **options), inputs)
    assert torch.autograd.gradcheck(
        lambda r, x, *i: residual_norm(x, r, *i, **options), [residual, *inputs]
    )


@pytest.mark.parametrize("rms", [True, False])
def test_schema_fake_and_autograd_registration(rms: bool) -> None:
    x, weight, bias = tensors(5, 9, rms)
    inputs = [t if t is None else t.requires_grad_() for t in (x, torch.randn(5, 9), weight, bias)]
    torch.library.opcheck(torch.ops.nvmm.norm.default, (*inputs, EPS, rms, True))


X = torch.zeros(3, 64)
WEIGHT = torch.ones(64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(4)}, "weight must have the length"),
        ({"weight": WEIGHT.bfloat16()}, "weight must have the length"),
        ({"bias": torch.zeros(4)}, "bias must have the length"),
        ({"bias": torch.zeros(1, 64)}, "bias must have the length"),
        ({"bias": torch.zeros(64).bfloat16()}, "bias must have the length"),
        ({"bias": torch.zeros(64), "rms": True}, "RMSNorm has no bias"),
        ({"residual": torch.zeros(64, 3)}, "residual must have x's shape"),
        ({"residual": X.bfloat16()}, "residual must have x's shape"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    options = {"residual": None, "weight": WEIGHT, "bias": None, "rms": False} | changes
    residual, weight, bias, rms = options.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nvmm.norm(X, residual, weight, bias, EPS, rms, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dy", torch.zeros(64, 3)),
        ("dsum", torch.zeros(64, 3)),
        ("weight", torch.ones(4)),
        ("mean", torch.zeros(2)),
        ("rstd", torch.zeros(3).double()),
    ],
)
def test_what_does_not_fit_is_refused_backward(name: str, value: Tensor) -> None:
    inputs = {"dy": X, "dsum": X, "h": X, "weight": WEIGHT, "mean": X[:, 0].clone()}
    inputs |= {"rstd": torch.ones(3)}
    torch.ops.nvmm.norm_backward(*inputs.values(), False, False)
    with pytest.raises(RuntimeError, match="norm: "):
        torch.ops.nvmm.norm_backward(*(inputs | {name: value}).values(), False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernel and eager
def test_rms_norm_refuses_a_bias(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in tensors(3, 8, False))
    with pytest.raises(ValueError, match="RMSNorm has no bias"):
        norm(x, weight, bias, eps=EPS, rms=True)
    with pytest.raises(ValueError, match="RMSNorm has no bias"):
        residual_norm(x, x, weight, bias, eps=EPS, rms=True)
