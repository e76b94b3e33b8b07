"""Nemotron-4: LayerNorm that stores gamma - 1, squared ReLU without a gate, RoPE on half a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import SQUARED_RELU, only, whole

complete = decoder.complete
table = decoder.table


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    hf = decoder.read(hf, "norm_eps", "kv_channels")
    only(hf, "hidden_act", "relu2")
    only(hf, "attention_bias", False)
    only(hf, "mlp_bias", False)
    # NVIDIA's name of head_dim, which Transformers does not read.
    only(hf, "kv_channels", hf["head_dim"], None)
    changes = {
        "normalization": "LayerNorm",
        "layernorm_epsilon": hf["norm_eps"],
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
        "activation_func": SQUARED_RELU,
    }
    return decoder.to_language(hf, changes, partial_rotary=True)


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    hf = decoder.from_language(model, "nemotron") | {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "norm_eps": model["transformer"].get("layernorm_epsilon", 1e-5),
        "partial_rotary_factor": whole(model)["rotary_percent"],
        "attention_bias": False,
        "mlp_bias": False,
    }
    decoder.expressible(model, to_model(hf), "nemotron")
    return hf
