"""Gated residual kernels: accuracy, masks, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.gated_residual import eager_gated_residual, gated_residual
from tests.kernels.accuracy import DTYPES, check_accuracy, needs_kernels, outputs_and_gradients

pytestmark = needs_kernels


def tensors(
    rows: int, width: int, scalar: bool = False, biased: bool = True, seed: int = 0
) -> list[Tensor | None]:
    """residual, branch, gate, bias"""
    g = torch.Generator().manual_seed(seed)
    residual, branch = (torch.randn(rows, width, generator=g) for _ in range(2))
    gate = torch.randn(1 if scalar else width, generator=g)
    return [residual, branch, gate, torch.randn(width, generator=g) if biased else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "biased"), [(1, 1, True), (70, 127, False), (3, 4097, True)]
)
def test_accuracy(
    rows: int,
    width: int,
    biased: bool,
    masked: bool,
    scalar: bool,
    tanh: bool,
    dtype: torch.dtype,
) -> None:
    check(rows, width, biased, masked, scalar, tanh, dtype)


def check(
    rows: int,
    width: int,
    biased: bool,
    masked: bool,
    scalar: bool,
    tanh: bool,
    dtype: torch.dtype,
) -> None:
    # A mask that needs no gradient, exact in every dtype.
    mask = torch.tensor([0.0, 1.0, 0.5]).repeat(rows)[:rows] if masked else None

    def run(function: object) -> object:
        return lambda *i: function(*i, None if mask is None else mask.to(i[0].dtype), tanh=tanh)

    check_accuracy(
        run(gated_residual),
        run(eager_gated_residual),
        lambda seed: tensors(rows, width, scalar, biased, seed),
        dtype,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(
        st.integers(1, 40),
        st.integers(1, 90),
        *(st.booleans() for _ in range(4)),
        st.sampled_from(DTYPES),
    )
)
def test_any_shape(case: tuple[int, int, bool, bool, bool, bool, torch.dtype]) -> None:
    check(*case)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("gate", [2.0, -100.0, 1e30, float("inf"), float("nan")])
def test_extreme_values(gate: float, tanh: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Large numbers, infinities and NaN in residual, branch and gate as in float64."""
    values = torch.tensor([0.0, 1.0, -1e30, 1e38, float("inf"), float("-inf"), float("nan")])
    residual, branch = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    inputs = [t.to(dtype) for t in (residual.view(1, -1), branch.view(1, -1))]
    inputs.append(torch.full((inputs[0].numel(),), gate, dtype=dtype))
    found, exact = (
        outputs_and_gradients(lambda *i, f=f: f(*i, tanh=tanh), inputs, wide)
        for f, wide in ((gated_residual, dtype), (eager_gated_residual, torch.float64))
    )
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e.to(dtype), rtol=tolerance, atol=0, equal_nan=True)


def test_rows_that_are_not_contiguous() -> None:
    residual, branch, gate, bias = tensors(6, 40)
    mask = torch.tensor([1.0, 0.0, 0.5] * 2)
    dy = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).t()
    for change in (
        lambda t: t.t().contiguous().t(),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ):
        found = []
        for strange in (change, Tensor.contiguous):
            leaves = [strange(t) for t in (residual, branch, gate, bias)]
            assert strange is Tensor.contiguous or not leaves[0].is_contiguous()
            leaves = [t.detach().requires_grad_() for t in leaves]
            y = gated_residual(*leaves, strange(mask))
            y.backward(strange(dy))
            found.append([y.detach(), *(t.grad for t in leaves)])
        assert all(map(torch.equal, *found))


def test_a_row_of_mask_zero_ignores_what_the_branch_holds() -> None:
    """NaN in a masked row reaches neither the output nor any gradient."""
    residual, branch, gate, bias = tensors(3, 8)
    branch[1] = float("nan")
    leaves = [t.requires_grad_() for t in (residual, branch, gate, bias)]
    mask = torch.tensor([1.0, 0.0, 1.0])
    y = gated_residual(*leaves, mask, tanh=True)
    assert torch.equal(y[1], residual[1])
    y.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert torch.equal(branch.grad[1], torch.zeros(8))


def test_all_rows_masked_is_the_residual() -> None:
    residual, branch, gate, _ = tensors(4, 8)
    y = gated_residual(residual, branch, gate.requires_grad_(), mask=torch.zeros(4))
    y.sum().backward()
    assert torch.equal(y, residual) and torch.equal(gate.grad, torch.zeros(8))


def test_no_rows() -> None:
    _, _, gate, bias = tensors(1, 8)
    y = gated_residual(torch.empty(0, 8), torch.empty(0, 8), gate.requires_grad_(), bias)
    y.sum().backward()
    assert y.shape == (0, 8) and torch.equal(gate.grad, torch.zeros(8))


@pytest.mark.usefixtures("auto")
def test_gradients_of_the_eager_path() -> None:
    leaves = [t.double().requires_grad_() for t in tensors(3, 5)]
    mask = torch.tensor([1.0, 0.0, 0.5]).double()
    assert torch.autograd.gradcheck(lambda *i: gated_residual(*i, mask, tanh=True), leaves)


@pytest.mark.parametrize("scalar", [True, False])
def test_schema_fake_and_autograd_registration(scalar: bool) -> None:
    residual, branch, gate, bias = (t.requires_grad_() for t in tensors(3, 5, scalar))
    arguments = (residual, branch, bias, gate, torch.ones(3), True)
    torch.library.opcheck(torch.ops.nvmm.gated_residual.default, arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("residual", torch.zeros(64, 3), "must agree in shape"),
        ("residual", torch.zeros(3, 64).bfloat16(), "must agree in shape"),
        ("bias", torch.zeros(4), "bias must have the length"),
        ("bias", torch.zeros(64).bfloat16(), "bias must have the length"),
        ("gate", torch.zeros(4), "gate must be one number"),
        ("mask", torch.ones(1, 3), "mask must have one number"),
        ("mask", torch.ones(3).bfloat16(), "mask must have one number"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor, message: str) -> None:
    inputs = {"residual": torch.zeros(3, 64), "branch": torch.zeros(3, 64)}
    inputs |= {"bias": torch.zeros(64), "gate": torch.zeros(64), "mask": torch.ones(3)}
    torch.ops.nvmm.gated_residual(*inputs.values(), True)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nvmm.gated_residual(*(inputs | {name: value}).values(), True)


@pytest.mark.usefixtures("auto")
def test_a_masked_row_ignores_what_the_branch_holds_eagerly() -> None:
    residual, branch, gate, _ = (t.double() for t in tensors(3, 8))
    branch[1] = float("nan")
    leaves = [t.requires_grad_() for t in (residual, branch, gate)]
    y = gated_residual(*leaves, mask=torch.tensor([1.0, 0.0, 1.0]).double())
    y.sum().backward()
    assert torch.equal(y[1], residual[1])
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
