"""Multi-tensor L2 norm and scaling: accuracy, flags, lists of all kinds, determinism."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels import library
from nvmm.kernels.multi_tensor import (
    eager_l2norm,
    eager_scale,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)
from tests.kernels.accuracy import BOTH, DTYPES, needs_kernels, ulp

SIZES = [1, 3, 0, 127, 4097, 40_000]


def numbers(
    sizes: list[int], dtype: torch.dtype, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, generator=generator)).to(dtype) for n in sizes]


def flag() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def norm(tensors: list[Tensor]) -> Tensor:
    found, none = multi_tensor_applier(multi_tensor_l2norm, flag(), [tensors], False)
    assert none is None
    return found


def check_norm(tensors: list[Tensor]) -> None:
    exact = torch.cat([t.double() for t in tensors]).norm()
    theirs = (eager_l2norm(tensors, flag()) - exact).abs()
    assert (norm(tensors) - exact).abs() <= 2 * theirs + ulp(exact, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("sizes", [*([n] for n in SIZES), SIZES, [n % 37 for n in range(400)]])
def test_norm(sizes: list[int], scale: float, dtype: torch.dtype) -> None:
    check_norm(numbers(sizes, dtype, scale))


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.sampled_from(DTYPES))
def test_norm_of_any_list(sizes: list[int], dtype: torch.dtype) -> None:
    check_norm(numbers(sizes, dtype))


@needs_kernels
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_squares_that_fp32_does_not_hold(value: float) -> None:
    found = norm([torch.full((100,), value)])
    torch.testing.assert_close(found, torch.tensor([10 * value]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("choice", BOTH)
def test_an_empty_list_and_the_norms_of_each(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_choices", library.Kernels(multi_tensor=choice))
    for nothing in ([], [torch.ones(0)]):
        assert torch.equal(norm(nothing), torch.zeros(1))
    found, each = multi_tensor_l2norm(0, flag(), [[torch.tensor([3.0]), torch.tensor([4.0])]], True)
    assert torch.equal(found, torch.tensor([5.0])) and torch.equal(each, torch.tensor([3.0, 4.0]))
    assert multi_tensor_l2norm(0, flag(), [[]], True)[1].shape == (0,)


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 20_000])
def test_numbers_that_are_not_finite_set_the_flag(
    value: str, at: int, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_choices", library.Kernels(multi_tensor=choice))
    tensors = [torch.ones(5), torch.ones(20_001)]
    for bad in (False, True):
        if bad:
            tensors[1][at] = float(value)
        for_norm, for_scale = flag(), flag()
        found, _ = multi_tensor_l2norm(0, for_norm, [tensors])
        targets = [torch.empty_like(t) for t in tensors]
        multi_tensor_scale(0, for_scale, [tensors, targets], 0.5)
        assert for_norm.item() == for_scale.item() == bad == (not found.isfinite().item())
        for a, b in zip(targets, tensors, strict=True):
            torch.testing.assert_close(a, b * 0.5, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize(("source", "target"), [*itertools.product(DTYPES, DTYPES)])
def test_scale_rounds_once(
    source: torch.dtype, target: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_choices", library.Kernels(multi_tensor=choice))
    sources = numbers([*SIZES, *(n % 5 for n in range(200))], source)
    targets = [torch.empty_like(t, dtype=target) for t in sources]
    factor = 0.3
    multi_tensor_applier(multi_tensor_scale, flag(), [sources, targets], factor)
    for a, b in zip(sources, targets, strict=True):
        assert torch.equal(b, (a.float() * factor).to(target))
    before = [t.clone() for t in sources]
    multi_tensor_scale(0, flag(), [sources, sources], 2.0)  # in place, exact
    assert all(torch.equal(a, b * 2) for a, b in zip(sources, before, strict=True))


@pytest.mark.usefixtures("auto")
def test_an_empty_scale_and_layouts_that_are_not_contiguous() -> None:
    multi_tensor_scale(0, flag(), [[], []], 2.0)
    x = torch.arange(12.0).view(3, 4)
    y = torch.zeros(4, 3).t()
    multi_tensor_scale(0, flag(), [[x], [y]], 2.0)
    assert torch.equal(y, 2 * x)
    torch.testing.assert_close(norm([x.t(), x[:, ::2]]), torch.cat([x, x[:, ::2]], 1).norm()[None])


@needs_kernels
def test_bits_do_not_depend_on_threads() -> None:
    code = """
import torch
from tests.kernels.accuracy import FUSED
from tests.kernels.test_multi_tensor import DTYPES, norm, numbers
FUSED.install()
for dtype in DTYPES:
    tensors = numbers([70_001, 3, 200_000], dtype)
    torch.set_num_threads(1)
    expected = norm(tensors)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(norm(tensors), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kernels
def test_lists_that_do_not_fit_are_refused() -> None:
    ops, ones = torch.ops.nvmm, torch.ones(2)
    with pytest.raises(RuntimeError, match="targets: tensor 0 differs in size"):
        ops.multi_tensor_scale([ones], [torch.ones(3)], flag(), 1.0)
    with pytest.raises(RuntimeError, match="lists differ in length"):
        ops.multi_tensor_scale([ones], [], flag(), 1.0)
    with pytest.raises(RuntimeError, match="tensor 1 is of another dtype"):
        ops.multi_tensor_l2norm([ones, ones.bfloat16()], flag())
    with pytest.raises(RuntimeError, match="flag must be one int32"):
        ops.multi_tensor_l2norm([ones], torch.zeros(1))


@needs_kernels
def test_schema_and_fake() -> None:
    tensors = numbers([3, 4], torch.float32)
    torch.library.opcheck(torch.ops.nvmm.multi_tensor_l2norm.default, (tensors, flag()))
    targets = [torch.empty_like(t) for t in tensors]
    torch.library.opcheck(
        torch.ops.nvmm.multi_tensor_scale.default, (tensors, targets, flag(), 0.5)
    )


def test_the_eager_scale_is_the_kernel_s() -> None:
    sources = numbers(SIZES, torch.float32)
    found, expected = ([torch.empty_like(t) for t in sources] for _ in range(2))
    multi_tensor_scale(0, flag(), [sources, found], 0.3)
    eager_scale(sources, expected, flag(), 0.3)
    assert all(map(torch.equal, found, expected))
