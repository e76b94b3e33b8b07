"""Qwen2 and Qwen2.5: biases on q, k and v alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder

complete = decoder.complete
table = decoder.table
WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = decoder.read(hf, *WINDOWS)
    decoder.activation(hf)
    return decoder.to_language(hf, {"add_qkv_bias": True, **decoder.sliding_windows(hf)})


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    hf = decoder.from_language(model, "qwen2") | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": model["transformer"].get("layernorm_epsilon", 1e-5),
        **decoder.window_fields(model),
    }
    decoder.expressible(model, to_model(hf), "qwen2")
    return hf
