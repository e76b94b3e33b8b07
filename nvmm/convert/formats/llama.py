"""Llama 2 and 3, with Llama 3's RoPE scaling, and Yi, which has Llama's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder

complete = decoder.complete
table = decoder.table


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = decoder.read(hf, "attention_bias", "mlp_bias")
    decoder.activation(hf)
    bias = bool(hf["attention_bias"])
    if bool(hf["mlp_bias"]) != bias:
        raise ValueError(
            f"config.json: attention_bias={bias} and mlp_bias={not bias} are not supported together"
        )
    return decoder.to_language(hf, {"add_bias_linear": bias, "add_qkv_bias": bias})


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    bias = model["transformer"].get("add_bias_linear", True)
    hf = decoder.from_language(model, "llama") | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": model["transformer"].get("layernorm_epsilon", 1e-5),
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    decoder.expressible(model, to_model(hf), "llama")
    return hf
