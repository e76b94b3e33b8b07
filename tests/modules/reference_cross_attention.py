"""Gated cross-attention written out naively: one query, one head, one key at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    """RMSNorm, or LayerNorm where the weights hold a bias."""
    bias = weights.get(f"{name}.bias")
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + bias


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def gated_cross_attention(
    hidden: Tensor,
    keys: Tensor,
    visible: list[list[list[int]]],
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_groups: int,
    width: int,
    eps: float,
    gated_linear_unit: bool,
) -> Tensor:
    """hidden [s, b, h], keys [n, h]; visible[t][r]: the keys that position t of row r sees."""
    if "kv_norm.weight" in weights:
        keys = norm(keys, weights, "kv_norm", eps)
    query = linear(norm(hidden, weights, "input_norm", eps), weights, "linear_q")
    query = query.view(*hidden.shape[:2], num_heads, width)
    both = linear(keys, weights, "linear_kv").view(len(keys), num_groups, 2, width)
    key, value = both[:, :, 0], both[:, :, 1]
    if "q_norm.weight" in weights:
        query = norm(query, weights, "q_norm", eps)
        key = norm(key, weights, "k_norm", eps)
    rows = []
    for t in range(hidden.shape[0]):
        for r in range(hidden.shape[1]):
            rows.append(
                _position(
                    hidden[t, r],
                    query[t, r],
                    key[visible[t][r]],
                    value[visible[t][r]],
                    weights,
                    eps=eps,
                    gated_linear_unit=gated_linear_unit,
                )
            )
    return torch.stack(rows).view_as(hidden)


def _position(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Mapping[str, Tensor],
    *,
    eps: float,
    gated_linear_unit: bool,
) -> Tensor:
    if len(key) == 0:
        return x
    heads = []
    for head, q in enumerate(query):
        group = head * key.shape[1] // len(query)
        scores = torch.stack([q @ k for k in key[:, group]]) / math.sqrt(len(q))
        heads.append(scores.softmax(0) @ value[:, group])
    y = x + weights["gate"].tanh() * linear(torch.cat(heads), weights, "linear_proj")
    if "ffn_gate" not in weights:
        return y
    inner = linear(norm(y, weights, "ffn_norm", eps), weights, "ffn.linear_fc1")
    if gated_linear_unit:
        gate, up = inner.chunk(2)
        inner = F.silu(gate) * up
    else:
        inner = F.gelu(inner)
    return y + weights["ffn_gate"].tanh() * linear(inner, weights, "ffn.linear_fc2")
