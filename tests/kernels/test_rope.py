"""Rotary position kernels: accuracy, mcore's own as a reference, views, autograd, fakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvmm.kernels.rope import eager_rope, rope
from tests.kernels.accuracy import DTYPES, check_accuracy, needs_kernels

pytestmark = needs_kernels
SHAPES = [  # s, b, heads, groups, d, dim
    (1, 1, 1, 1, 2, 2),
    (3, 1, 3, 1, 127, 64),
    (127, 2, 2, 2, 64, 64),
    (5, 3, 6, 2, 5, 4),
    (2, 1, 1, 1, 4098, 4098),
    (4097, 1, 1, 1, 3, 2),
    (4, 2, 3, 3, 16, 0),
]


def tensors(s: int, b: int, heads: int, groups: int, d: int, seed: int = 0) -> list[Tensor]:
    """q, k"""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, b, count, d, generator=generator) for count in (heads, groups)]


def angles(s: int, b: int, dim: int, seed: int = 0) -> Tensor:
    """Any angles in the place of a position's: [s, b, dim / 2]."""
    generator = torch.Generator().manual_seed(100 + seed)
    return 100 * torch.rand(s, b, dim // 2, generator=generator)


def table_of(angle: Tensor) -> Tensor:
    return torch.cat([angle.cos(), angle.sin()], -1)


def check(s: int, b: int, heads: int, groups: int, d: int, dim: int, dtype: torch.dtype) -> None:
    table = table_of(angles(s, b, dim))
    check_accuracy(
        lambda q, k: rope(q, k, table),
        lambda q, k: eager_rope(q, k, table),
        lambda seed: tensors(s, b, heads, groups, d, seed),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*shape, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 80),
    st.data(),
)
def test_any_shape(s: int, b: int, heads: int, groups: int, d: int, data: st.DataObject) -> None:
    dim = 2 * data.draw(st.integers(0, d // 2))
    check(s, b, heads, groups, d, dim, data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 6])
def test_turns_as_mcore_does_and_more_exactly(dim: int, dtype: torch.dtype) -> None:
    """mcore rounds cosines and sines to the dtype first."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    q, k = (t.to(dtype) for t in tensors(40, 1, 4, 2, 16))
    angle = angles(40, 1, dim)
    tolerance, share = (5e-2, 0.8) if dtype == torch.bfloat16 else (2e-6, 1.1)
    found = rope(q, k, table_of(angle))
    for x, y in zip((q, k), found, strict=True):
        theirs = _apply_rotary_pos_emb_bshd(x, torch.cat([angle, angle], -1)[:, :, None])
        exact = eager_rope(x.double(), x.double(), table_of(angle))[0]
        torch.testing.assert_close(y, theirs, rtol=0, atol=tolerance)
        ours, error = (float((z - exact).square().mean().sqrt()) for z in (y, theirs))
        assert ours < share * error


def test_backward_turns_by_the_negative_angle() -> None:
    q, k = (t.requires_grad_() for t in tensors(7, 2, 3, 1, 10))
    angle = angles(7, 2, 8)
    upstream = tensors(7, 2, 3, 1, 10, seed=1)
    torch.autograd.backward(rope(q, k, table_of(angle)), upstream)
    for gradient, expected in zip((q.grad, k.grad), rope(*upstream, table_of(-angle)), strict=True):
        assert torch.equal(gradient, expected)


def test_position_zero_changes_nothing() -> None:
    q, k = tensors(3, 1, 2, 2, 8)
    found = rope(q, k, table_of(torch.zeros(3, 1, 4)))
    assert torch.equal(found[0], q) and torch.equal(found[1], k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_output_and_an_expanded_table(dtype: torch.dtype) -> None:
    """Bit-equal to copies, forward and backward; what stands between the heads is not read."""
    fused = torch.randn(5, 2, 3, 5 * 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused[..., 64:] = float("nan")  # the values
    q, k = fused[..., :48].unflatten(-1, (3, 16))[:, :, 1], fused[..., 48:64]
    table = table_of(angles(5, 1, 12)).expand(5, 2, 12)
    for strange in ((q, k), (q.transpose(0, 1), k.transpose(0, 1)), (q[::2], k[::2])):
        s, b = strange[0].shape[:2]
        angle = table[:1, :1].expand(s, b, 12)
        views = [t.detach().requires_grad_() for t in strange]
        copies = [t.detach().contiguous().requires_grad_() for t in strange]
        assert not views[1].is_contiguous()
        outputs = [rope(*x, angle) for x in (views, copies)]
        assert all(map(torch.equal, *outputs))
        assert all(t.is_contiguous() and t.isfinite().all() for t in outputs[0])
        turned = [t.transpose(0, 2) for t in outputs[0]]
        torch.autograd.backward(turned, [torch.ones_like(t.contiguous()) for t in turned])
        torch.autograd.backward([t.sum() for t in outputs[1]])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(views, copies, strict=True))
    assert all(map(torch.equal, rope(q, k, table), rope(q, k, table.contiguous())))


def test_a_last_axis_that_is_not_contiguous() -> None:
    q, k = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors(3, 2, 2, 4, 6))
    table = table_of(angles(3, 2, 6)).transpose(0, 2).contiguous().transpose(0, 2)
    expected = rope(q.contiguous(), k.contiguous(), table.contiguous())
    assert all(map(torch.equal, rope(q, k, table), expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_stay_in_their_pair(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in tensors(4, 1, 2, 1, 8))
    q[0, 0, 0, 1], q[1, 0, 1, 5], q[2, 0, 0, 7] = float("nan"), float("inf"), -1e38
    found, _ = rope(q, k, table_of(angles(4, 1, 6)))
    expected = eager_rope(q, k, table_of(angles(4, 1, 6)))[0]
    torch.testing.assert_close(found, expected, equal_nan=True)
    pair = torch.zeros(4, 1, 2, 8, dtype=torch.bool)
    pair[0, 0, 0, 1] = pair[0, 0, 0, 4] = pair[1, 0, 1, 2] = pair[1, 0, 1, 5] = True
    assert torch.equal(~found.isfinite(), pair)
    assert found[2, 0, 0, 7] == q[2, 0, 0, 7]  # behind dim


@pytest.mark.parametrize("shape", [(0, 2, 3, 1, 8), (2, 0, 3, 1, 8), (2, 2, 3, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    q, k = (t.requires_grad_() for t in tensors(*shape))
    found = rope(q, k, table_of(angles(shape[0], shape[1], 4)))
    torch.autograd.backward([t.sum() for t in found])
    assert [t.shape for t in found] == [q.shape, k.shape] == [q.grad.shape, k.grad.shape]


@pytest.mark.parametrize(
    "table",
    [
        torch.ones(4, 3, 8),
        torch.ones(3, 4, 7),
        torch.ones(3, 4, 10),
        torch.ones(3, 4, 8, dtype=torch.bfloat16),
    ],
)
def test_another_table_is_refused(table: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be torch.float32 \(3, 4, dim\) with an even dim"):
        rope(*tensors(3, 4, 2, 1, 8), table)


@pytest.mark.usefixtures("auto")
def test_gradients_of_the_eager_path() -> None:
    q, k = (t.double().requires_grad_() for t in tensors(3, 2, 2, 1, 7))
    table = table_of(angles(3, 2, 4))
    assert torch.autograd.gradcheck(lambda *i: rope(*i, table), (q, k))


def test_schema_fake_and_autograd_registration() -> None:
    q, k = (t.requires_grad_() for t in tensors(3, 2, 4, 2, 9))
    arguments = (q.transpose(0, 1), k.transpose(0, 1), table_of(angles(2, 3, 6)), False)
    torch.library.opcheck(torch.ops.nvmm.rope.default, arguments)
