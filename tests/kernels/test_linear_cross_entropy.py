"""Linear cross-entropy: accuracy, masking, memory, main gradients, tensor parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.accuracy import (
    DTYPES,
    FUSED,
    check_accuracy,
    needs_kernels,
    outputs_and_gradients,
)
from tests.ranks import run_ranks

IGNORED = -100


def tensors(
    rows: int, columns: int, width: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels, every fifth of them ignored"""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(columns, width, generator=g) / 2
    labels = torch.randint(0, columns, (rows,), generator=g)
    labels[::5] = IGNORED
    return hidden, weight, labels


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "chunk"), [(1, 3, 8), (3, 127, 32), (65, 130, 64), (2, 4097, 1000)]
)
def test_accuracy(rows: int, columns: int, chunk: int, dtype: torch.dtype) -> None:
    check(rows, columns, chunk, dtype)


def check(rows: int, columns: int, chunk: int, dtype: torch.dtype) -> None:
    check_accuracy(
        lambda *inputs: linear_cross_entropy(*inputs, chunk=chunk),
        eager,
        lambda seed: tensors(rows, columns, seed=seed),
        dtype,
    )


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(2, 150), st.integers(8, 60), st.sampled_from(DTYPES))
def test_any_shape(rows: int, columns: int, chunk: int, dtype: torch.dtype) -> None:
    check(rows, columns, chunk, dtype)


@needs_kernels
def test_accuracy_at_the_full_vocabulary() -> None:
    check_accuracy(
        linear_cross_entropy, eager, lambda seed: tensors(5, 152_064, seed=seed), torch.bfloat16
    )


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_rows_take_no_part(dtype: torch.dtype) -> None:
    hidden, weight, labels = tensors(9, 40)
    hidden, weight = hidden.to(dtype), weight.to(dtype).requires_grad_()
    short = weight.detach()[:31].clone().requires_grad_()
    labels = labels % 31
    found = linear_cross_entropy(hidden, weight, labels, vocab_size=31, chunk=16)
    expected = linear_cross_entropy(hidden, short, labels, chunk=16)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(weight.grad[:31], short.grad)
    assert torch.equal(weight.grad[31:], torch.zeros_like(weight.grad[31:]))


def test_nothing_but_ignored_rows() -> None:
    hidden, weight, labels = tensors(4, 20)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(4))
    assert not hidden.grad.any() and not weight.grad.any()


def test_no_rows() -> None:
    hidden, weight, _ = tensors(1, 20)
    hidden = hidden[:0].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,) and hidden.grad.shape == (0, 16)


def test_logits_that_overflow_an_exponential() -> None:
    hidden, weight, labels = tensors(6, 50)
    loss = linear_cross_entropy(300 * hidden, 10 * weight, labels, chunk=16)
    torch.testing.assert_close(loss, eager(300 * hidden, 10 * weight, labels))


NAN, INF = float("nan"), float("inf")


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize(
    ("what", "rows", "value"),
    [
        ("hidden", [1], NAN),
        ("hidden", [1], INF),
        ("weight", [7], NAN),
        ("weight", [7], INF),
        ("weight", [7], -INF),
        ("weight", [0, 1, 2, 3], -INF),  # all of a chunk
        ("weight", list(range(10)), -INF),
        ("both", list(range(10)), 1e18),
    ],
)
def test_extreme_values(
    what: str, rows: list[int], value: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Loss and gradients as eager has them; infinite logits are of the sign of the weight."""
    hidden, weight, labels = tensors(6, 10, 4)
    hidden = hidden.abs()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if what in (name, "both"):
            tensor[rows[: len(tensor)]] = (
                tensor[rows[: len(tensor)]] * value if value == 1e18 else value
            )
    rounded = [hidden.to(dtype), weight.to(dtype), labels]
    found, expected = (
        outputs_and_gradients(f, rounded, dtype)
        for f in (lambda *i: linear_cross_entropy(*i, chunk=4), eager)
    )
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_tensors_that_are_not_contiguous() -> None:
    hidden, weight, labels = tensors(6, 50)
    found = []
    for strange in (
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.t().contiguous().t(),
        None,
    ):
        leaves = [hidden, weight]
        if strange is not None:
            leaves = [strange(t) for t in leaves]
            assert not any(t.is_contiguous() for t in leaves)
        leaves = [t.detach().requires_grad_() for t in leaves]
        ids = labels if strange is None else labels.repeat_interleave(2)[::2]
        loss = linear_cross_entropy(*leaves, ids, chunk=16)
        (loss * torch.arange(6.0)).sum().backward()
        found.append([loss.detach(), *(t.grad for t in leaves)])
    for strange in found[:2]:
        for a, b in zip(strange, found[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_vocabulary_are_refused() -> None:
    hidden, weight, labels = tensors(6, 50)
    labels[1] = 49
    with pytest.raises(ValueError, match=r"must be in \[0, 45\) or -100"):
        linear_cross_entropy(hidden, weight, labels, vocab_size=45)


@pytest.mark.usefixtures("auto")
def test_gradients_in_float64() -> None:
    hidden, weight, labels = tensors(4, 11, 3)
    leaves = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels.clamp(max=9), vocab_size=10, chunk=4), leaves
    )


@pytest.mark.parametrize("hooked", [True, False])
def test_main_grad_gets_the_gradient_once(hooked: bool) -> None:
    """With mcore's hook a placeholder is returned and marked, without it nothing."""
    hidden, weight, labels = tensors(7, 30)
    plain = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, plain, labels, chunk=8).sum().backward()
    weight.requires_grad_()
    weight.main_grad = torch.ones(30, 16)
    if hooked:
        weight.grad_added_to_main_grad = False
    linear_cross_entropy(hidden, weight, labels, chunk=8, into_main_grad=True).sum().backward()
    assert (weight.grad is not None) == hooked == getattr(weight, "grad_added_to_main_grad", False)
    torch.testing.assert_close(weight.main_grad, plain.grad + 1)


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, labels = tensors(7, 30)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels).sum().backward()
    assert hidden.grad.any() and weight.grad is None


@needs_kernels
def test_extra_memory_is_a_chunk() -> None:
    """No tensor of rows is larger than a chunk: never rows x vocabulary."""
    rows, columns, chunk = 64, 4096, 256
    hidden, weight, labels = tensors(rows, columns)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[:1] != (columns,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk=chunk).sum().backward()
    assert rows * 16 <= largest <= rows * chunk


def _share(rank: int, size: int, init: str) -> tuple[Tensor, Tensor, Tensor]:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    FUSED.install()
    hidden, weight, labels = tensors(9, 48)
    hidden = hidden.requires_grad_()
    part = weight.chunk(size)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, part, labels.clamp(max=20), vocab_size=21, group=dist.group.WORLD, chunk=8
    )
    (loss * torch.arange(9.0)).sum().backward()
    dist.all_reduce(hidden.grad)
    return loss.detach(), hidden.grad, part.grad


@needs_kernels
def test_schemas_and_fakes() -> None:
    _, _, labels = tensors(6, 10)
    logits = torch.randn(6, 10)
    rows = [torch.full((6,), -INF), torch.zeros(6), torch.zeros(6)]
    ops = torch.ops.nvmm
    torch.library.opcheck(ops.logits_reduce.default, (logits, labels, 0, 8, *rows))
    level, scale = logits.logsumexp(1), torch.rand(6)
    torch.library.opcheck(ops.logits_gradient.default, (logits, labels, level, scale, 0, 8))


def test_two_ranks_give_what_one_gives() -> None:
    """21 real ids in 2 x 24 rows: the last rank holds nothing but padding."""
    hidden, weight, labels = tensors(9, 48)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels.clamp(max=20), vocab_size=21)
    (loss * torch.arange(9.0)).sum().backward()
    results = run_ranks(_share, 2)
    for found, dhidden, _ in results:
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(dhidden, hidden.grad)
    torch.testing.assert_close(torch.cat([part for *_, part in results]), weight.grad)
