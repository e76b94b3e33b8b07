"""Qwen3's dense models: norms of each head's queries and keys, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder, qwen2

complete = decoder.complete
table = decoder.table


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = decoder.read(hf, *qwen2.WINDOWS)
    decoder.activation(hf)
    return decoder.to_language(hf, {"qk_layernorm": True, **decoder.sliding_windows(hf)})


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
