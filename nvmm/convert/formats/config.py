"""Our model configs against Hugging Face's: fields, defaults, and differences that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.config.nested import differences
from nvmm.config.signatures import value_of

_GET_METHOD = "hydra.utils.get_method"
SILU = {"_target_": _GET_METHOD, "path": "torch.nn.functional.silu"}
GELU = {"_target_": _GET_METHOD, "path": "torch.nn.functional.gelu"}
RELU = {"_target_": _GET_METHOD, "path": "torch.nn.functional.relu"}
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
    "softmax_scale": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "no_rope_freq": None,
    "window_size": None,
    "window_attn_skip_freq": None,
}
_LANGUAGE_DEFAULTS = {
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": None,
    "position_embedding_type": "rope",
    "position_offset": 0,
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
_AUDIO_DEFAULTS = {"num_mel_bins": 80, "max_source_positions": 1500, "pool": 1}
_HTSAT_DEFAULTS = {
    "num_mel_bins": 64,
    "picture": 256,
    "patch_size": 4,
    "hidden_size": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [4, 8, 16, 32],
    "window_size": 8,
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "layernorm_epsilon": 1e-5,
    "projection": "clapcap",
    "projection_size": 1024,
}
_CONNECTOR_DEFAULTS = {
    "downsample": 2,
    "hidden_size": None,
    "layernorm": True,
    "layernorm_epsilon": 1e-6,
    "bias": False,
    "activation_func": GELU,
    "pad_grid": False,
    "token_order": "rows",
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

_INERT = frozenset(
    (
        # Names, versions and storage.
        *("model_type", "architectures", "auto_map", "_name_or_path", "name_or_path"),
        *("_commit_hash", "transformers_version", "torch_dtype", "dtype", "tokenizer_class"),
        *("transformers_weights", "unsloth_version", "unsloth_fixed"),
        # What a forward pass returns, and the kernels that compute it.
        *("return_dict", "output_attentions", "output_hidden_states", "output_scores"),
        *("return_dict_in_generate", "use_cache", "torchscript", "use_bfloat16"),
        *("tf_legacy_loss", "pretraining_tp", "chunk_size_feed_forward"),
        *("_attn_implementation_autoset", "attn_implementation", "_attn_implementation"),
        *("use_flash_attn",),
        # Training: dropout and initial spreads are the experiment's here.
        *("attention_dropout", "hidden_dropout", "dropout", "activation_dropout"),
        *("drop_path_rate", "initializer_range", "initializer_factor", "init_std"),
        # Special tokens, which the tokenizer's folder says, and generation.
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("cls_token_id", "mask_token_id", "decoder_start_token_id", "forced_bos_token_id"),
        *("forced_eos_token_id", "max_length", "min_length", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens",),
        # Heads of other tasks.
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("finetuning_task", "prefix"),
    )
)
"""Fields of a config.json that change no output of the models that we read."""
_OFF: dict[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "attention_bias": False,
    "mlp_bias": False,
}
"""Fields that change the output, with the value at which they do not."""


def known(hf: Mapping[str, Any], *fields: str) -> None:
    """Refuse fields of a config.json that a converter does not read and that may change the model.

    fields: those that it reads. A null is no setting.

    Raises ValueError naming each field and its value.
    """
    unknown = [
        f"{name}={value!r}"
        for name, value in hf.items()
        if value is not None
        and name not in fields
        and name not in _INERT
        and (name not in _OFF or value != _OFF[name])
    ]
    if unknown:
        raise ValueError(
            f"config.json: {', '.join(unknown)} would not be read; delete what does not change the"
            " model"
        )


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
        return {**model, **parts, **_whole_encoders(model), "connector": connector}
    if is_htsat(model):
        return {**_HTSAT_DEFAULTS, **model}
    if "transformer" not in model:
        return {**_CONNECTOR_DEFAULTS, **model}
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
    elif is_whisper(model):
        defaults = _AUDIO_DEFAULTS
    else:
        # mcore gives QKV a bias where either says so; the encoders ask add_qkv_bias alone.
        filled["add_qkv_bias"] = filled["add_qkv_bias"] or filled["add_bias_linear"]
    return {**defaults, **model, "transformer": filled}


def is_whisper(model: Mapping[str, Any]) -> bool:
    """Return True for a config of Whisper's encoder, whose bins and positions have defaults."""
    return str(model.get("_target_", "")).endswith(".AudioEncoder")


def _whole_encoders(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoders and connectors of modalities beside images, with their defaults."""
    encoders = model.get("encoders")
    if not encoders:
        return {}
    return {
        "encoders": {
            modality: {name: whole(part) for name, part in parts.items()}
            for modality, parts in encoders.items()
        }
    }


def is_htsat(model: Mapping[str, Any]) -> bool:
    """Return True for a config of CLAP's audio encoder, whose sizes all have defaults."""
    return str(model.get("_target_", "")).endswith(".HTSAT")


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
        for key, first, second in differences(
            _comparable(derived), _comparable(configured), get=value_of
        )
        if key.rpartition(".")[2] not in free
    ]


def _comparable(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config with all defaults, without values that make no other graph."""
    model = whole(model)
    for part in [model, *(model[name] for name in ("language", "vision") if name in model)]:
        if part.get("layer_scale") is not None:
            part["layer_scale"] = True
        if "transformer" in part:
            part["transformer"] = _windows_as_list(part["transformer"])
    return model


def layer_windows(config: Mapping[str, Any]) -> list[bool]:
    """Return which layers of a TransformerConfig's fields have a window."""
    layers, skip = config["num_layers"], config.get("window_attn_skip_freq")
    if config.get("window_size") is None:
        return [False] * layers
    if isinstance(skip, list):
        return [bool(flag) for flag in skip]
    return [skip is None or (number + 1) % skip != 0 for number in range(layers)]


def windows(size: int | None, layers: list[bool]) -> dict[str, Any]:
    """Return the fields of a TransformerConfig whose chosen layers see `size` keys at most.

    Raises ValueError for a size below 1.
    """
    if size is None or not any(layers):
        return {}
    if size < 1:
        raise ValueError(f"config.json: sliding_window={size} must be at least 1")
    fields: dict[str, Any] = {"window_size": [size - 1, 0]}
    if not all(layers):
        fields["window_attn_skip_freq"] = [int(flag) for flag in layers]
    return fields


def _windows_as_list(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("window_size")
    plain = {"window_size": None, "window_attn_skip_freq": None}
    return {**config, **plain, **windows(size and size[0] + 1, layer_windows(config))}
