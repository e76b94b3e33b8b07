"""Mistral 7B, with a sliding window in every layer or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import need, windows

complete = decoder.complete
table = decoder.table


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = decoder.read(hf, "sliding_window", "layer_types")
    decoder.activation(hf)
    window = hf["sliding_window"]
    # Transformers' Mistral has the one mask for all layers, whatever layer_types says.
    windowed = [window is not None] * need(hf, "num_hidden_layers")
    if hf.get("layer_types") is not None and decoder.layer_types(hf) != windowed:
        raise ValueError(
            f"config.json: layer_types={hf['layer_types']} and sliding_window={window} contradict"
            " each other"
        )
    return decoder.to_language(hf, windows(window, windowed))


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    size = model["transformer"].get("window_size")
    hf = decoder.from_language(model, "mistral") | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": model["transformer"].get("layernorm_epsilon", 1e-5),
        "sliding_window": None if size is None else size[0] + 1,
    }
    decoder.expressible(model, to_model(hf), "mistral")
    return hf
