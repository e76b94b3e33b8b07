"""Gated residual kernels: accuracy, masks, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvmm.kernels.gated_residual import eager_gated_residual, gated_residual
from tests.kernels.accuracy import DTYPES, check_accuracy, needs_kernels

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


def test_a_masked_row_ignores_what_the_branch_holds_eagerly() -> None:
    residual, branch, gate, _ = (t.double() for t in tensors(3, 8))
    branch[1] = float("nan")
    leaves = [t.requires_grad_() for t in (residual, branch, gate)]
    y = gated_residual(*leaves, mask=torch.tensor([1.0, 0.0, 1.0]).double())
    y.sum().backward()
    assert torch.equal(y[1], residual[1])
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
