"""Poolings: latent attention against a naive reference, sizes, what must not change a vector."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import Batch
from nvmm.modules import pooling
from nvmm.parallel.setup import Chunk, Parallel, Precision
from tests import tiny

EPSILON = 0.1
POOLINGS = ("EOS", "Mean", "LatentAttention", "SelfAttention")
pytestmark = pytest.mark.usefixtures("world")


def batch_of(rows: list[Tensor], starts: list[int], packed: bool = False, width: int = 0) -> Batch:
    """Rows padded to `width` or the longest, or one packed row with padding behind it."""
    lengths = [len(row) for row in rows]
    bounds = None
    if packed:
        padding = max(width - sum(lengths), 0)
        tokens = torch.cat([*rows, torch.zeros(padding, dtype=torch.long)])[None]
        lengths = [*lengths, 0] if padding else lengths
        sizes = [*lengths[:-1], padding] if padding else lengths
        position_ids = torch.cat([torch.arange(n) for n in sizes])[None]
        bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    else:
        tokens = torch.zeros(len(rows), max(width, *lengths), dtype=torch.long)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        position_ids = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Batch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.ones(tokens.shape),
        position_ids=position_ids,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        sample_ids=torch.arange(len(rows)),
        owners=torch.arange(len(rows)),
        cu_seqlens=bounds,
        extras={"pool_from": torch.tensor(starts)},
    )


def model_of(name: str, **changes: Any) -> Any:
    from nvmm.parallel.parameters import initialize

    config = tiny.embedder(name) | changes
    chunk = Parallel().chunks(Precision())[0]
    model = instantiate(config, _convert_="all")(chunk=chunk).eval()
    initialize(model, seed=5)
    return model


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 509, (n,), generator=generator) for n in lengths]


def naive(head: Any, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The pooled vector of one text's tokens [t, h], written out head by head."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    d = head.head_dim
    query = norm(hidden, "norm_query") @ weights["linear_q.weight"].t()
    context = norm(weights["latents"], "norm_latents") @ weights["linear_kv.weight"].t()
    inner = query.shape[1]
    heads = []
    for start in range(0, inner, d):
        q = query[:, start : start + d]
        k, v = context[:, start : start + d], context[:, inner + start : inner + start + d]
        heads.append(torch.softmax(q @ k.t() / math.sqrt(d), dim=-1) @ v)
    hidden = hidden + torch.cat(heads, dim=1) @ weights["linear_proj.weight"].t()
    up = norm(hidden, "norm_mlp") @ weights["linear_fc1.weight"].t() + weights["linear_fc1.bias"]
    value, gate = up.split(up.shape[1] // 2, dim=1)
    activated = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    out = activated @ weights["linear_fc2.weight"].t() + weights["linear_fc2.bias"] + hidden
    return out.mean(0)


@pytest.mark.parametrize("packed", [False, True])
def test_latent_attention_equals_a_naive_reference(packed: bool) -> None:
    settings = tiny.embedder("LatentAttention")["pooling"] | {"layernorm_epsilon": EPSILON}
    head = model_of("LatentAttention", pooling=settings).pooling
    weights = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    for name, parameter in head.named_parameters():
        if "norm" in name or "bias" in name:
            noise = torch.linspace(-0.3, 0.4, parameter.numel())
            parameter.data += noise
            weights[name].data += noise
    rows, starts = rows_of(7, 4, 9), [2, 0, 8]
    batch = batch_of(rows, starts, packed, width=24)
    b, s = batch.tokens.shape
    hidden = torch.randn(s, b, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    result = head(hidden, batch, None, None)
    copy = hidden.detach().clone().requires_grad_()
    pieces = [
        copy[sum(map(len, rows[:i])) : sum(map(len, rows[: i + 1])), 0]
        if packed
        else copy[: len(row), i]
        for i, row in enumerate(rows)
    ]
    parts = zip(pieces, starts, strict=True)
    expected = torch.stack([naive(head, part[start:], weights) for part, start in parts])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    loss_weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    (result * loss_weights).sum().backward()
    (expected * loss_weights).sum().backward()
    torch.testing.assert_close(hidden.grad, copy.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-4)


def test_nv_embed_s_latent_attention_has_the_published_size() -> None:
    chunk = Chunk(Parallel(), Precision(), meta=True)
    with torch.device("meta"):
        head = pooling.LatentAttention(hidden_size=4096, chunk=chunk)
    assert sum(p.numel() for p in head.parameters()) == 740_356_096
    assert head.linear_q.weight.shape == (32768, 4096)
    assert head.linear_fc1.weight.shape == (32768, 4096)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_padding_and_neighbours_do_not_change_an_embedding(name: str, causal: bool) -> None:
    model = model_of(name, causal=causal)
    rows, starts = rows_of(5, 9, 12), [3, 0, 5]
    with torch.no_grad():
        alone = [
            model(batch_of([row], [start]))[0] for row, start in zip(rows, starts, strict=True)
        ]
        expected = torch.stack(alone)
        assert torch.allclose(expected.norm(dim=-1), torch.ones(3))
        for options in ({}, {"width": 20}, {"packed": True}, {"packed": True, "width": 32}):
            found = model(batch_of(rows, starts, **options))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        reverse = model(batch_of(rows[::-1], starts[::-1]))
        torch.testing.assert_close(reverse.flip(0), expected, rtol=1e-5, atol=2e-6)


def test_without_the_causal_mask_the_first_token_sees_the_last() -> None:
    row = rows_of(8)[0]
    other = row.clone()
    other[-1] = (row[-1] + 1) % 509
    for causal in (True, False):
        model = model_of("Mean", causal=causal)
        with torch.no_grad():
            first, second = (model(batch_of([x], [0]), output="hidden")[0, 0] for x in (row, other))
        assert torch.equal(first, second) is causal


def test_instruction_tokens_are_attended_to_but_not_pooled() -> None:
    model = model_of("Mean")
    row = rows_of(8)[0]
    with torch.no_grad():
        hidden = model(batch_of([row], [0]), output="hidden")[:, 0]
        found = model(batch_of([row], [3]))[0]
        without = model(batch_of([row[3:]], [0]))[0]
    expected = torch.nn.functional.normalize(hidden[3:].mean(0), dim=0)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, without, atol=1e-3)


def test_context_parallelism_is_refused() -> None:
    chunk = Chunk(Parallel(context_parallel_size=2), Precision())
    with pytest.raises(ValueError, match="context_parallel_size=2 must be 1"):
        instantiate(tiny.embedder("EOS"), _convert_="all")(chunk=chunk)
