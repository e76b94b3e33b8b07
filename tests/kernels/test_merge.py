"""Merging rows: places, gradients, refusals, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels import library
from nvmm.kernels.merge import eager_merge_rows, merge_rows
from tests.kernels.accuracy import BOTH, DTYPES, needs_kernels, outputs_and_gradients

pytestmark = needs_kernels


def tensors(m: int, n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """base, values"""
    generator = torch.Generator().manual_seed(seed)
    base, values = (torch.randn(rows, width, generator=generator) for rows in (m, n))
    return base, values


def places(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]


def check(m: int, n: int, width: int, beside: bool, dtype: torch.dtype, seed: int = 0) -> None:
    """Bits of PyTorch's own functions, outputs and gradients: nothing is computed."""
    inputs = tensors(m, n, width, seed)
    if beside:
        whole = places(m + n, m + n, seed)
        index = (whole[:n], whole[n:])
    else:
        index = (places(m, n, seed), None)
    found, expected = (
        outputs_and_gradients(lambda *x, f=function: f(*x, *index), inputs, dtype)
        for function in (merge_rows, eager_merge_rows)
    )
    assert all(map(torch.equal, found, expected)) and len(found) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "width"),
    [(1, 1, 1), (3, 1, 127), (127, 64, 3), (65, 0, 8), (3, 3, 4097), (4097, 1000, 2)],
)
def test_equals_pytorch(m: int, n: int, width: int, beside: bool, dtype: torch.dtype) -> None:
    check(m, n, width, beside, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 70), st.booleans(), st.integers(0, 9))
def test_any_shape(m: int, n: int, width: int, beside: bool, seed: int) -> None:
    check(max(m, n), min(m, n), width, beside, torch.float32, seed)


def test_places_and_gradients_by_hand() -> None:
    base, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0]])
    leaves = [t.requires_grad_() for t in (base, values)]
    out = merge_rows(base, values, torch.tensor([2, 0]))
    assert out.flatten().tolist() == [20, 2, 10]
    out.backward(torch.tensor([[5.0], [6.0], [7.0]]))
    assert [t.grad.flatten().tolist() for t in leaves] == [[0, 6, 0], [7, 5]]
    both = merge_rows(base, values, torch.tensor([3, 0]), torch.tensor([1, 4, 2]))
    assert both.flatten().tolist() == [20, 1, 3, 10, 2]


def test_what_is_replaced_may_hold_anything() -> None:
    base, values = tensors(4, 2, 5)
    base[1] = float("nan")
    out = merge_rows(base.requires_grad_(), values, torch.tensor([1, 3]))
    (out * float("inf")).nan_to_num(1.0, 1.0, 1.0).sum().backward()
    assert out.isfinite().all() and not base.grad[[1, 3]].any()


def test_extreme_values_keep_their_bits() -> None:
    numbers = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 3e38]).expand(3, 5)
    out = merge_rows(torch.zeros(3, 5), numbers, torch.arange(3))
    assert torch.equal(out.view(torch.int32), numbers.contiguous().view(torch.int32))


def test_rows_that_are_not_contiguous() -> None:
    base, values = tensors(12, 6, 10)
    index = torch.tensor([0, 9, 5, 9, 2, 9])[::2]
    for a, b in ((base[::2], values[::2]), (base.t()[:6, :8], values.t()[:3, :6])):
        b = b[:, :1].expand(-1, a.shape[1])
        expected = merge_rows(a.contiguous(), b.contiguous(), index.contiguous())
        assert torch.equal(merge_rows(a, b, index), expected)


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize(
    ("index", "base_index", "message"),
    [
        ([1, 4], None, r"the rows \[4\] must be in \[0, 4\)"),
        ([-1, 2], None, r"the rows \[-1\] must be in \[0, 4\)"),
        ([2, 2], None, "2 rows have 1 places, one each is needed"),
        ([0, 6], [1, 2, 3, 4], r"the rows \[6\] must be in \[0, 6\)"),
        ([0, 5], [1, 2, 3, 5], "6 rows have 5 places, one each is needed"),
    ],
)
def test_what_has_no_place_of_its_own_is_refused(
    index: list[int],
    base_index: list[int] | None,
    message: str,
    choice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_choices", library.Kernels(merge=choice))
    beside = None if base_index is None else torch.tensor(base_index)
    with pytest.raises(ValueError, match=message):
        merge_rows(*tensors(4, 2, 3), torch.tensor(index), beside)


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("beside", [True, False])
def test_gradients_of_the_eager_path(beside: bool) -> None:
    base, values = (t.double().requires_grad_() for t in tensors(4, 2, 3))
    index = (
        (torch.tensor([5, 1]), torch.tensor([0, 2, 3, 4])) if beside else (torch.tensor([3, 1]),)
    )
    assert torch.autograd.gradcheck(lambda *i: merge_rows(*i, *index), (base, values))


def test_schema_fake_and_autograd_registration() -> None:
    base, values = (t.requires_grad_() for t in tensors(4, 2, 3))
    for source in ([0, 4, 2, 5], [5, 0, 1, 4, 2, 3]):
        arguments = (base, values, torch.tensor(source))
        torch.library.opcheck(torch.ops.nvmm.merge.default, arguments)
