"""Mistral 7B. A sliding window becomes the longest sequence, below which it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder
from nvmm.convert.formats.standard import standard

complete = decoder.complete
table = decoder.table


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = standard(hf)
    decoder.activation(hf)
    longest = hf.get("max_position_embeddings", 4096)
    window = hf.get("sliding_window") or longest
    return decoder.to_language(hf, max_sequence_length=min(longest, window))


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    hf = decoder.from_language(model, "mistral") | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": model["transformer"].get("layernorm_epsilon", 1e-5),
        "sliding_window": None,
    }
    decoder.expressible(model, to_model(hf), "mistral")
    return hf
