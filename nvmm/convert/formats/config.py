"""Our model configs against Hugging Face's: fields, defaults, and differences that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.config.nested import differences

_GET_METHOD = "hydra.utils.get_method"
SILU = {"_target_": _GET_METHOD, "path": "torch.nn.functional.silu"}
GELU = {"_target_": _GET_METHOD, "path": "torch.nn.functional.gelu"}
GELU_TANH = {"_target_": "torch.nn.functional.gelu", "_partial_": True, "approximate": "tanh"}
QUICK_GELU = {"_target_": "megatron.core.activations.quick_gelu", "_partial_": True}
SQUARED_RELU = {"_target_": "megatron.core.activations.squared_relu", "_partial_": True}
_TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
_VOCABULARY_MULTIPLE = 128

_TRANSFORMER_DEFAULTS = {
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "activation_func": GELU,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
_LANGUAGE_DEFAULTS = {
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
}
_VISION_DEFAULTS = {
    "class_token": True,
    "patch_bias": True,
    "pre_layernorm": False,
    "post_layernorm": False,
    "qk_norm": None,
    "layer_scale": None,
    "drop_class_token": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_AUDIO_DEFAULTS = {"num_mel_bins": 80, "max_source_positions": 1500}
_CONNECTOR_DEFAULTS = {
    "downsample": 2,
    "hidden_size": None,
    "layernorm": True,
    "layernorm_epsilon": 1e-6,
    "bias": False,
    "activation_func": GELU,
}
_FREE = frozenset(
    {
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "vocab_size",
        "padded_vocab_size",
        "max_sequence_length",
        "image_mean",
        "image_std",
    }
)
"""Keys that may differ between two configs of one graph: training, preprocessing, vocabulary.

The table checks the vocabulary's rows.
"""


def need(hf: Mapping[str, Any], key: str) -> Any:
    """Return a field of a config.json. Raises ValueError when it is not there."""
    if hf.get(key) is None:
        raise ValueError(f"config.json has no {key}")
    return hf[key]


def only(hf: Mapping[str, Any], key: str, *allowed: Any) -> Any:
    """Return a field that we support with some values alone; the first is the default.

    Raises ValueError naming the field, its value and those.
    """
    value = hf.get(key, allowed[0])
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"config.json: {key}={value!r} is not supported; it must be {choices}")
    return value


def transformer(**fields: Any) -> dict[str, Any]:
    """Return a YAML's partial of TransformerConfig with these fields."""
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return {"_target_": _TRANSFORMER, "_partial_": True, **fields, **dropout}


def padded(vocab_size: int) -> int:
    """Return the rows of our embedding for a vocabulary: the next multiple of 128."""
    return -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def integral(number: float) -> float:
    """Return 5e5 as 500000, as a YAML has it."""
    return int(number) if float(number).is_integer() else number


def whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config with the constructors' defaults where it says nothing."""
    parts = {name: whole(model[name]) for name in ("language", "vision") if name in model}
    if parts:
        connector = _CONNECTOR_DEFAULTS | dict(model.get("connector") or {})
        return {**model, **parts, "connector": connector}
    fields = dict(model["transformer"])
    heads = fields["num_attention_heads"]
    filled = {
        **_TRANSFORMER_DEFAULTS,
        "ffn_hidden_size": 4 * fields["hidden_size"],
        **fields,
        "num_query_groups": fields.get("num_query_groups") or heads,
        "kv_channels": fields.get("kv_channels") or fields["hidden_size"] // heads,
    }
    defaults: Mapping[str, Any] = _LANGUAGE_DEFAULTS
    if "patch_size" in model:
        defaults = _VISION_DEFAULTS
    elif "num_mel_bins" in model:
        defaults = _AUDIO_DEFAULTS
    else:
        # mcore gives QKV a bias where either says so; the encoders ask add_qkv_bias alone.
        filled["add_qkv_bias"] = filled["add_qkv_bias"] or filled["add_bias_linear"]
    return {**defaults, **model, "transformer": filled}


def mismatches(
    derived: Mapping[str, Any],
    configured: Mapping[str, Any],
    here: str,
    there: str,
    free: frozenset[str] = _FREE,
) -> list[str]:
    """List the keys in which two model configs describe another graph, with both values.

    free: last names of keys that may differ.
    """
    return [
        f"model.{key}={first!r} in {here}, {second!r} in {there}"
        for key, first, second in differences(_comparable(derived), _comparable(configured))
        if key.rpartition(".")[2] not in free
    ]


def _comparable(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config with all defaults, without values that make no other graph."""
    model = whole(model)
    for part in [model, *(model[name] for name in ("language", "vision") if name in model)]:
        if part.get("rope_scaling") is False:
            part["rope_scaling_factor"] = None
        if part.get("layer_scale") is not None:
            part["layer_scale"] = True
    return model
