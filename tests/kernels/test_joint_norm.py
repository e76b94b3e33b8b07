"""Joint RMSNorm: accuracy of a rank's share, padding, ranks against one rank, all-reduces."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels import library
from nvmm.kernels.joint_norm import joint_norm
from nvmm.kernels.norm import eager_norm
from tests.kernels.accuracy import (
    BOTH,
    DTYPES,
    check_accuracy,
    check_rows,
    needs_kernels,
    outputs_and_gradients,
)
from tests.ranks import run_ranks

EPS = 1e-5
SHARES = [(0, 1, 1), (0, 127, 127), (4, 64, 40), (127, 127, 3), (64, 8, 0), (0, 4097, 4097)]


def tensors(rows: int, width: int, whole: int, seed: int = 0) -> list[Tensor]:
    """x, weight"""
    g = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, width, generator=g), torch.randn(whole, generator=g)]


def plain(x: Tensor, weight: Tensor, first: int = 0, real: int | None = None) -> Tensor:
    """A share by the definition."""
    real = x.shape[1] if real is None else real
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = x[:, :real].to(wide)
    scale = torch.rsqrt(kept.square().sum(-1, keepdim=True) / weight.numel() + EPS)
    y = kept * scale * weight[first : first + real].to(wide)
    return torch.nn.functional.pad(y, (0, x.shape[1] - real)).to(x.dtype)


def check(rows: int, first: int, width: int, real: int, dtype: torch.dtype) -> None:
    check_accuracy(
        lambda x, w: joint_norm([x], [w], eps=EPS, first=first, real=real)[0],
        lambda x, w: plain(x, w, first, real),
        lambda seed: tensors(rows, width, first + width, seed),
        dtype,
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("first", "width", "real"), SHARES)
def test_accuracy(rows: int, first: int, width: int, real: int, dtype: torch.dtype) -> None:
    check(rows, first, width, real, dtype)


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 90), st.integers(1, 90), st.data())
def test_any_shape(rows: int, first: int, width: int, data: st.DataObject) -> None:
    check(rows, first, width, data.draw(st.integers(0, width)), torch.float32)


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_extreme_values(dtype: torch.dtype, tolerance: float) -> None:
    """Rows of 1e18, 1e-20 and 0 keep their scale; infinity and NaN stay in their rows."""
    _, weight = tensors(1, 8, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    finite = torch.stack([1e18 * signs, 0 * signs, 1e-20 * signs, torch.arange(8.0)])
    wild = finite.clone()
    wild[0, 2], wild[1, 3], wild[2, 4] = float("inf"), float("nan"), float("-inf")
    for x in (finite, wild):
        rounded = [t.to(dtype) for t in (x, weight)]
        found, exact = (
            outputs_and_gradients(f, rounded, wide)
            for f, wide in (
                (lambda x, w: joint_norm([x], [w], eps=EPS)[0], dtype),
                (plain, torch.float64),
            )
        )
        check_rows(found, exact, tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_that_overflow_give_zeros(dtype: torch.dtype) -> None:
    """And no gradient, as RMSNorm has it."""
    x, weight = torch.full((2, 8), -1e30), torch.ones(8)
    found = outputs_and_gradients(lambda x, w: joint_norm([x], [w], eps=EPS)[0], [x, weight], dtype)
    assert len(found) == 3 and not any(t.any() for t in found)


def test_padding_holds_anything_and_gets_nothing() -> None:
    x, weight = tensors(3, 8, 8)
    x[:, 5:] = float("nan")
    x, weight = x.requires_grad_(), weight.requires_grad_()
    [y] = joint_norm([x], [weight], eps=EPS, real=5)
    y.sum().backward()
    assert y.isfinite().all() and torch.equal(y[:, 5:], torch.zeros(3, 3))
    assert torch.equal(x.grad[:, 5:], torch.zeros(3, 3)) and x.grad.isfinite().all()
    assert torch.equal(weight.grad[5:], torch.zeros(3)) and weight.grad[:5].all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape).requires_grad_(), torch.ones(8).requires_grad_()
    [y] = joint_norm([x], [weight], eps=EPS)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(weight.grad, torch.zeros(8))


def test_rows_that_are_not_contiguous() -> None:
    x, weight = tensors(6, 8, 8)
    turned = x.view(2, 3, 8).transpose(0, 1)
    found, expected = (joint_norm([t], [weight], eps=EPS)[0] for t in (turned, turned.contiguous()))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("auto")
def test_gradients_of_the_eager_path() -> None:
    leaves = [t.double().requires_grad_() for seed in (0, 1) for t in tensors(3, 6, 9, seed)]
    assert torch.autograd.gradcheck(
        lambda q, wq, k, wk: joint_norm([q, k], [wq, wk], eps=EPS, first=2, real=5), leaves
    )


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    x, weight = tensors(3, 8, 8)
    with pytest.raises(RuntimeError, match="real columns"):
        joint_norm([x], [weight], eps=EPS, real=9)
    with pytest.raises(RuntimeError, match="holds x's columns"):
        joint_norm([x], [weight], eps=EPS, first=4, real=5)


@needs_kernels
def test_schemas_and_fakes() -> None:
    x, weight = tensors(3, 8, 12)
    rows, ops = torch.rand(3), torch.ops.nvmm
    torch.library.opcheck(ops.joint_norm_squares.default, (x, 5))
    torch.library.opcheck(ops.joint_norm_apply.default, (x, weight, rows, 4, 7))
    torch.library.opcheck(ops.joint_norm_sums.default, (x, x, weight, rows, 4, 7))
    torch.library.opcheck(ops.joint_norm_backward.default, (x, x, weight, rows, rows, 4, 7))


HEADS, SIZE = 5, 6
UPSTREAM = torch.linspace(-1, 1, 4 * HEADS * SIZE).view(4, HEADS * SIZE)


def _share(rank: int, world_size: int, init: str, choice: str) -> list[Tensor]:
    """q, k and their gradients as far as they are real, the weights' gradients, the all-reduces."""
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    library.Kernels(joint_norm=choice).install()
    width = -(-HEADS // world_size) * SIZE
    first = rank * width
    real = min(max(HEADS * SIZE - first, 0), width)
    leaves, weights, ups = [], [], []
    for seed in (0, 1):
        x, weight = tensors(4, HEADS * SIZE, HEADS * SIZE, seed)
        part = torch.nn.functional.pad(x, (0, 2 * width))[:, first : first + width]
        leaves.append(part.clone().requires_grad_())
        weights.append(weight.requires_grad_())
        ups.append(torch.nn.functional.pad(UPSTREAM, (0, 2 * width))[:, first : first + width])
    calls = 0
    plain = dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return plain(*args, **kwargs)

    dist.all_reduce = counted
    ys = joint_norm(leaves, weights, eps=EPS, first=first, real=real, group=dist.group.WORLD)
    torch.autograd.backward(ys, ups)
    found = [*ys, *(x.grad for x in leaves)]
    cut = [t.detach()[:, :real] for t in found]
    return [*cut, *(w.grad for w in weights), torch.tensor(calls)]


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_what_one_gives(world_size: int, choice: str) -> None:
    """5 heads over 2 ranks (one padding head) and over 4 (the last has nothing but padding)."""
    leaves = [[t.requires_grad_() for t in tensors(4, 30, 30, seed)] for seed in (0, 1)]
    ys = [eager_norm(x, weight, eps=EPS, rms=True) for x, weight in leaves]
    torch.autograd.backward(ys, [UPSTREAM, UPSTREAM])
    results = run_ranks(_share, world_size, choice)
    expected = [*ys, *(x.grad for x, _ in leaves)]
    for index, whole in enumerate(expected):
        torch.testing.assert_close(torch.cat([r[index] for r in results], 1), whole.detach())
    for result in results:
        for (_, weight), gradient in zip(leaves, result[4:6], strict=True):
            torch.testing.assert_close(gradient, weight.grad)
        assert result[6] == 2, "one all-reduce forward, one backward"


def test_a_gradient_of_another_shape_is_refused() -> None:
    x, weight, rows = torch.zeros(3, 64), torch.ones(64), torch.ones(3)
    ops = torch.ops.nvmm
    with pytest.raises(RuntimeError, match="must have x's shape"):
        ops.joint_norm_sums(torch.zeros(64, 3), x, weight, rows, 0, 64)
    with pytest.raises(RuntimeError, match="must have x's shape"):
        ops.joint_norm_backward(torch.zeros(64, 3), x, weight, rows, rows, 0, 64)
    with pytest.raises(RuntimeError, match="row statistics"):
        ops.joint_norm_backward(x, x, weight, rows, torch.ones(2), 0, 64)
