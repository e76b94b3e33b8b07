"""Qwen3's dense models: norms of each head's queries and keys, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder, qwen2

complete = decoder.complete
table = decoder.table
_HEAD_DIM = 128
"""Transformers' default, whatever the width and the number of heads."""


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    decoder.activation(hf)
    changes = {"qk_layernorm": True, **decoder.sliding_windows(hf)}
    whole = {"head_dim": _HEAD_DIM, **hf}
    return decoder.to_language(whole, changes, longest=32768, fields=qwen2.WINDOWS)


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    config = model["transformer"]
    hf = decoder.from_language(model, "qwen3") | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "head_dim": config.get("kv_channels")
        or config["hidden_size"] // config["num_attention_heads"],
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "attention_bias": False,
        **decoder.window_fields(model),
    }
    decoder.expressible(model, to_model(hf), "qwen3")
    return hf
