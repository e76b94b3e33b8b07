"""Core attention: masks, grouped queries, packing and key spans against a plain soft-max."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.batch import Batch
from nvmm.modules.attention import CoreAttention
from nvmm.parallel.context_parallel import positions
from tests.ranks import run_ranks

CAUSAL, FULL = AttnMaskType.causal, AttnMaskType.no_mask


def attention(mask: AttnMaskType = CAUSAL, **changes: Any) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, **changes
    )
    return CoreAttention(config, 1, mask, "self", attention_dropout=0.0)


def qkv(queries: int, keys: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q [queries, rows, 4, 8]; k, v [keys, rows, 2, 8]."""
    g = torch.Generator().manual_seed(queries + keys)
    return (
        torch.randn(queries, rows, 4, 8, generator=g),
        torch.randn(keys, rows, 2, 8, generator=g),
        torch.randn(keys, rows, 2, 8, generator=g),
    )


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    spans: Any = None,
    window: int = 1000,
    scale: float = 8**-0.5,
) -> Tensor:
    """One query head at a time, in float64; window: keys that a query sees before its own."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    sq, rows, heads, _ = q.shape
    sk, groups = k.shape[0], k.shape[2]
    for row in range(rows):
        first, last = (0, sk) if spans is None else spans[row]
        for head in range(heads):
            for i in range(sq):
                stop = min(last, sk - sq + i + 1) if causal else last
                start = max(first, sk - sq + i - window)
                seen = slice(start, stop)
                if stop <= start:
                    continue
                group = head // (heads // groups)
                scores = k[seen, row, group].double() @ q[i, row, head].double() * scale
                out[i, row, head] = scores.softmax(0) @ v[seen, row, group].double()
    return out.flatten(2)


@pytest.mark.parametrize("mask", [CAUSAL, FULL])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_equals_plain_attention(mask: AttnMaskType, queries: int) -> None:
    """Grouped queries; with fewer queries than keys the last query sees the last key."""
    q, k, v = qkv(queries, 7)
    out = attention(mask)(q, k, v, None)
    expected = plain(q, k, v, mask == CAUSAL)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", [CAUSAL, FULL])
def test_key_spans_hide_padding_and_empty_queries_give_zero(mask: AttnMaskType) -> None:
    q, k, v = qkv(6, 6)
    spans = [(0, 4), (3, 6)]
    core = attention(mask)
    out = core(q, k, v, torch.tensor(spans, dtype=torch.int32))
    expected = plain(q, k, v, mask == CAUSAL, spans)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    if mask == CAUSAL:
        assert out[:3, 1].abs().max() == 0
    hidden = v.clone()
    hidden[:3, 1] = hidden[4:, 0] = 1e4
    assert torch.equal(core(q, k, hidden, torch.tensor(spans)), out)


def test_another_scale_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, in windows, in packed rows and in the kernel for these."""
    for window in (None, (2, 0)):
        config = attention(window_size=window).config
        core = CoreAttention(config, 1, CAUSAL, "self", attention_dropout=0.0, softmax_scale=0.9)
        q, k, v = qkv(7, 7, rows=1)
        before = 1000 if window is None else window[0]
        expected = plain(q, k, v, True, window=before, scale=0.9)
        torch.testing.assert_close(core(q, k, v, None).double(), expected, atol=1e-6, rtol=1e-5)
        row = [x[:, 0] for x in (q, k, v)]
        out = core(*row, None, packed_seq_params=packed([0, 7]))
        torch.testing.assert_close(out.double(), expected[:, 0], atol=1e-6, rtol=1e-5)
        scales = []

        def varlen(q: Tensor, *args: Any, scales: Any = scales, **options: Any) -> Tensor:
            scales.append(options["softmax_scale"])
            return q

        with monkeypatch.context() as patch:
            patch.setattr("nvmm.modules.attention.flash_varlen", lambda query: varlen)
            core(*row, None, packed_seq_params=packed([0, 7]))
        assert scales == [0.9]


@pytest.mark.parametrize("window", [0, 1, 3, 6, 7])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 9), (3, 3)])
def test_a_window_hides_keys_further_back(
    window: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of four queries, at the end of a prompt and, without mcore's mask, of a cache."""
    monkeypatch.setattr("nvmm.modules.attention.QUERY_BLOCK", 4)
    q, k, v = qkv(queries, keys)
    core = attention(window_size=(window, 0))
    expected = plain(q, k, v, True, window=window)
    for mask in (CAUSAL, FULL) if queries == 1 else (CAUSAL,):
        out = core(q, k, v, None, attn_mask_type=mask)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    spans = [(0, keys), (2, keys)]
    out = core(q, k, v, torch.tensor(spans, dtype=torch.int32))
    expected = plain(q, k, v, True, spans, window)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("skip", "windowed"),
    [(None, [1, 2, 3, 4]), (2, [1, 3]), ([0, 0, 1, 1], [3, 4])],
)
def test_layers_without_a_window_see_everything(skip: Any, windowed: list[int]) -> None:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        window_size=(2, 0),
        window_attn_skip_freq=skip,
    )
    q, k, v = qkv(7, 7)
    for number in range(1, 5):
        core = CoreAttention(config, number, CAUSAL, "self", attention_dropout=0.0)
        window = 2 if number in windowed else 1000
        expected = plain(q, k, v, True, window=window)
        torch.testing.assert_close(core(q, k, v, None).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(-1, 0), (2, 2), (2, -1), (2,)])
def test_a_window_of_another_form_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"transformer\.window_size=.* must be null or \[n, 0\]"):
        attention(window_size=size)


def test_a_window_needs_a_causal_mask() -> None:
    with pytest.raises(ValueError, match=r"window_size=\(2, 0\) needs a causal mask"):
        attention(FULL, window_size=(2, 0))


def packed(bounds: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=9,
        max_seqlen_kv=9,
    )


@pytest.mark.parametrize(
    ("mask", "window"), [(CAUSAL, None), (FULL, None), (CAUSAL, (1, 0))], ids=str
)
def test_packed_segments_are_separate(mask: AttnMaskType, window: tuple[int, int] | None) -> None:
    q, k, v = (x[:, 0] for x in qkv(9, 9, rows=1))
    bounds = [0, 4, 5, 9]
    core = attention(mask, window_size=window)
    out = core(q, k, v, None, packed_seq_params=packed(bounds))
    for start, end in itertools.pairwise(bounds):
        part = (x[start:end, None] for x in (q, k, v))
        torch.testing.assert_close(out[start:end], core(*part, None)[:, 0])
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[4:5] += 1
    again = core(*changed, None, packed_seq_params=packed(bounds))
    assert torch.equal(again[:4], out[:4]) and torch.equal(again[5:], out[5:])
    assert not torch.equal(again[4], out[4])


@pytest.mark.parametrize(
    ("mask", "window"), [(CAUSAL, None), (FULL, None), (CAUSAL, (2, 0))], ids=str
)
def test_a_varlen_kernel_gets_what_it_needs(
    mask: AttnMaskType, window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn's own kernel needs a GPU; one with its signature in its place."""
    bounds = [0, 3, 9, 11]
    q, k, v = (x[:, 0] for x in qkv(11, 11, rows=1))
    core = attention(mask, window_size=window)
    expected = core(q, k, v, None, packed_seq_params=packed(bounds))
    calls = []

    def varlen(  # type: ignore[no-untyped-def]
        q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size=(-1, -1)
    ) -> Tensor:
        calls.append((max_q, max_k, dropout_p, softmax_scale))
        parts = []
        for start, end in itertools.pairwise(cu_q.tolist()):
            part = (x[start:end, None] for x in (q, k, v))
            before = window_size[0] if window_size[0] >= 0 else 1000
            parts.append(plain(*part, causal, window=before)[:, 0])
        return torch.cat(parts).unflatten(1, q.shape[1:]).float()

    monkeypatch.setattr("nvmm.modules.attention.flash_varlen", lambda query: varlen)
    found = core(q, k, v, None, packed_seq_params=packed(bounds))
    torch.testing.assert_close(found, expected)
    assert calls == [(9, 9, 0.0, None)]


def _context_parallel(
    rank: int,
    world_size: int,
    init: str,
    mask: AttnMaskType,
    bounds: list[int] | None,
    window: tuple[int, int] | None,
) -> tuple[Tensor, list[Tensor]]:
    """This rank's output and its gradients at the whole q, k, v."""
    from nvmm.modules import attention as module
    from nvmm.parallel.context_parallel import shard
    from nvmm.parallel.setup import Parallel

    module.QUERY_BLOCK = 3
    Parallel(context_parallel_size=world_size).initialize(
        seed=1, rank=rank, world_size=world_size, init_method=init
    )
    core = attention(mask, context_parallel_size=world_size, window_size=window)
    whole = qkv(32, 32, rows=2 if bounds is None else 1)
    for x in whole:
        x.requires_grad_()
    parts = [shard(x, _batch(bounds)) for x in whole]
    if bounds is not None:
        parts = [x[:, 0] for x in parts]
    params = None if bounds is None else packed(bounds)
    out = core(*parts, None, packed_seq_params=params)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    with pytest.raises(ValueError, match=r"parallel\.context_parallel_size=2 must be 1 with key"):
        core(*parts, torch.tensor([[0, 3]]))
    return out.detach(), [x.grad for x in whole if x.grad is not None]


def _batch(bounds: list[int] | None) -> Batch:
    rows = 2 if bounds is None else 1
    zeros = torch.zeros(rows, 32, dtype=torch.int64)
    lengths = torch.tensor([32, 32]) if bounds is None else torch.diff(torch.tensor(bounds))
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    return Batch(
        zeros,
        zeros,
        zeros.float(),
        zeros,
        lengths,
        zeros[0, :1],
        torch.zeros(lengths.numel(), dtype=torch.int64),
        cu_seqlens,
    )


@pytest.mark.parametrize(
    ("mask", "window"), [(CAUSAL, None), (FULL, None), (CAUSAL, (5, 0))], ids=str
)
@pytest.mark.parametrize("bounds", [None, [0, 4, 20, 32]], ids=["padded", "packed"])
def test_context_parallel_ranks_equal_one(
    mask: AttnMaskType, window: tuple[int, int] | None, bounds: list[int] | None
) -> None:
    """Outputs at each rank's positions; gradients of all ranks add up to the whole ones."""
    results = run_ranks(_context_parallel, 2, mask, bounds, window)
    whole = qkv(32, 32, rows=2 if bounds is None else 1)
    for x in whole:
        x.requires_grad_()
    if bounds is None:
        expected = attention(mask, window_size=window)(*whole, None)
    else:
        row = [x[:, 0] for x in whole]
        expected = attention(mask, window_size=window)(*row, None, packed_seq_params=packed(bounds))
    (expected * torch.linspace(-1, 1, expected.shape[-1])).sum().backward()
    for rank, (out, _) in enumerate(results):
        index = positions(_batch(bounds), 2, rank)
        torch.testing.assert_close(out, expected[index], atol=1e-6, rtol=1e-5)
    for x, first, second in zip(whole, results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first + second, x.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [512, 600, 1025])
def test_a_long_part_attends_block_by_block(queries: int) -> None:
    """Queries at the end of a longer row, whose last block is whole, or not, or a single query."""
    keys = queries + 200
    q, k, v = (x.permute(1, 2, 0, 3) for x in qkv(queries, keys, rows=1))
    out = attention()._attend(q, k, v, True, None)[0]
    k, v = (x[0].repeat_interleave(2, 0) for x in (k, v))
    scores = q[0] @ k.transpose(1, 2) / 8**0.5
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_attention_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_bias"):
        attention()(*qkv(2, 2), None, attention_bias=torch.zeros(1))
