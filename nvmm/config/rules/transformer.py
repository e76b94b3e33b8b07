"""Rules of TransformerConfig's fields: those that our layers read, and no other one. No torch.

mcore's config has more than two hundred fields. Most are read by layers that nvmm does not build,
by Transformer Engine or by Megatron-LM's own trainer; given here they would change nothing, or turn
on what nothing compares between layouts. So only what is listed here may be given, and a field that
a new mcore brings is refused until it is listed. tests/config/test_transformer_fields.py goes
through all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from nvmm.config.problem import Problem, View
from nvmm.config.rules import precision, rope
from nvmm.config.signatures import default_of

TARGET = "megatron.core.transformer.transformer_config.TransformerConfig"

ENCODER_FIELDS = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "add_bias_linear",
        "add_qkv_bias",
        "gated_linear_unit",
        "activation_func",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "softmax_scale",
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
    }
)
"""Fields that the layers of every transformer read."""
LANGUAGE_FIELDS = ENCODER_FIELDS | {
    "qk_layernorm",
    "window_size",
    "window_attn_skip_freq",
    "no_rope_freq",
}
"""Fields that the decoder's layers read: it has positions, a causal mask and norms of heads."""

ENGINE_FIELDS = frozenset(
    {
        "fp8_interval",
        "fp8_param",
        "fp8_wgrad",
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        "fp4",
        "fp4_recipe",
        "fp4_param",
    }
)
"""Fields that Transformer Engine's layers read."""
DECIDED_ELSEWHERE = {
    **{
        name: f"parallel.{name}"
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "sequence_parallel",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "variable_seq_lengths",
        )
    },
    **{
        name: "precision.dtype"
        for name in ("bf16", "fp16", "params_dtype", "pipeline_dtype", "autocast_dtype")
    },
    **dict.fromkeys(precision.FIELDS, "precision.fp8"),
    "calculate_per_token_loss": "objective, whose sums are divided by the global count",
    **{
        name: "parallel.pipeline_model_parallel_size"
        for name in (
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "deallocate_pipeline_outputs",
            "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        )
    },
}
"""Fields that the trainer fills in -> the key that decides them."""
_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_COUNTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "ffn_hidden_size"),
)
_POSITIONS = ("rotary_interleaved", "fused_single_qkv_rope", "flash_decode")


def transformers(view: View) -> list[str]:
    """Return the keys of every TransformerConfig in the model."""
    keys = []

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            if str(node.get("_target_", "")).endswith("TransformerConfig"):
                keys.append(key)
            for name, child in node.items():
                walk(child, f"{key}.{name}")

    walk(view.get("model"), "model")
    return keys


def has_transformer_engine(view: View) -> bool:
    """Return True where the config chooses Transformer Engine and it is installed."""
    return (
        view.get("backend") == "transformer_engine"
        and importlib.util.find_spec("transformer_engine") is not None
    )


def _fields(view: View) -> Iterator[Problem]:
    for prefix in transformers(view):
        node = view.get(prefix)
        if node["_target_"] != TARGET:
            yield Problem(f"{prefix}._target_", node["_target_"], f"must be {TARGET}")
            continue
        if node.get("_args_"):
            yield Problem(f"{prefix}._args_", node["_args_"], "must be left out; name the fields")
        read = LANGUAGE_FIELDS if prefix == _language(view) and _decodes(view) else ENCODER_FIELDS
        for name, value in node.items():
            if name in DECIDED_ELSEWHERE:
                allowed = f"must not be given here; set {DECIDED_ELSEWHERE[name]}"
                yield Problem(f"{prefix}.{name}", value, allowed)
            elif name not in read and name not in _HYDRA and value != default_of(TARGET, name):
                if not (name in ENGINE_FIELDS and has_transformer_engine(view)):
                    yield Problem(f"{prefix}.{name}", value, _unread(name))


def _unread(name: str) -> str:
    default = default_of(TARGET, name)
    value = {None: "null", True: "true", False: "false"}.get(default, default)
    if name in _POSITIONS:
        return "must be false: positions are applied by kernels.rope, in halves"
    if name in ENGINE_FIELDS:
        return f"needs backend=transformer_engine (mcore ignores it otherwise); use {value}"
    if name in LANGUAGE_FIELDS:
        return f"must be {value}: only the language model's layers read it"
    return f"must be {value}, mcore's default, or left out: nvmm's layers do not read it"


def _decodes(view: View) -> bool:
    """Return False for a bidirectional encoder, whose layers are no decoder's."""
    node = view.get(view.language) if view.language else None
    return not str((node or {}).get("_target_", "")).endswith(".BidirectionalEncoder")


def _language(view: View) -> str:
    return f"{view.language}.transformer"


def _ranges(view: View) -> Iterator[Problem]:
    """Numbers that no model can have; mcore builds some of them all the same."""
    for prefix in transformers(view):
        for key in (f"{prefix}.{name}" for name in _COUNTS):
            count = view.integer(key)
            if count is not None and count < 1:
                yield Problem(key, count, "must be at least 1")
        for key in (f"{prefix}.attention_dropout", f"{prefix}.hidden_dropout"):
            share = view.number(key)
            if share is not None and not 0 <= share < 1:
                yield Problem(key, share, "must be at least 0 and less than 1")
        for key in (f"{prefix}.init_method_std", f"{prefix}.layernorm_epsilon"):
            value = view.number(key)
            if value is not None and value < 0:
                yield Problem(key, value, "must not be negative")
        scale, function = (view.get(f"{prefix}.{n}") for n in ("softmax_scale", "activation_func"))
        if scale == 0:
            yield Problem(f"{prefix}.softmax_scale", scale, "must not be 0; null for the usual one")
        if function is not None and not isinstance(function, Mapping):
            example = "{_target_: hydra.utils.get_method, path: torch.nn.functional.silu}"
            yield Problem(f"{prefix}.activation_func", function, f"must be a function: {example}")
    if view.language is None:
        return
    base = view.number(f"{view.language}.rotary_base")
    if base is not None and base <= 0:
        yield Problem(f"{view.language}.rotary_base", base, "must be above 0")
    share = view.number(f"{view.language}.rotary_percent")
    if share is not None and not 0 < share <= 1:
        yield Problem(f"{view.language}.rotary_percent", share, "must be above 0 and at most 1")
    channels = view.integer(f"{_language(view)}.kv_channels")
    if channels is not None and channels % 2 and not rope.learned(view):
        allowed = "must be even: positions rotate pairs of channels"
        yield Problem(f"{_language(view)}.kv_channels", channels, allowed)


def _window(view: View) -> Iterator[Problem]:
    prefix = _language(view)
    size, skip = view.get(f"{prefix}.window_size"), view.get(f"{prefix}.window_attn_skip_freq")
    key = f"{prefix}.window_size"
    if size is not None:
        whole = isinstance(size, list) and all(type(number) is int for number in size)
        if not whole or len(size) != 2 or size[0] < 0 or size[1] != 0:
            allowed = "must be null or [n, 0]: the n keys before its own that a token sees, n >= 0"
            yield Problem(key, size, allowed)
        if view.get(f"{view.language}.causal") is False:
            yield Problem(key, size, f"must be null with {view.language}.causal=false")
    if skip is None:
        return
    key = f"{prefix}.window_attn_skip_freq"
    layers = view.integer(f"{prefix}.num_layers")
    if size is None:
        yield Problem(key, skip, f"needs {prefix}.window_size; use null")
    if isinstance(skip, list):
        if set(skip) - {0, 1} or 1 not in skip or layers not in (None, len(skip)):
            allowed = f"must have a 0 or 1 for each of the {layers} layers; 1 is one with a window"
            yield Problem(key, skip, allowed)
    elif not isinstance(skip, int) or skip < 2:
        yield Problem(key, skip, "must be null, a list, or N >= 2: every N-th layer sees all")


def _positions(view: View) -> Iterator[Problem]:
    key = f"{_language(view)}.no_rope_freq"
    skip, layers = view.get(key), view.integer(f"{_language(view)}.num_layers")
    if isinstance(skip, list) and (set(skip) - {0, 1} or layers not in (None, len(skip))):
        allowed = f"must have a 0 or 1 for each of the {layers} layers; 1 is one without positions"
        yield Problem(key, skip, allowed)
    elif isinstance(skip, int) and layers and (skip < 1 or layers % skip):
        yield Problem(key, skip, f"must divide num_layers={layers}; or give a list")


def _gates(view: View) -> Iterator[Problem]:
    for prefix in transformers(view):
        for name in ("glu_linear_offset", "activation_func_clamp_value"):
            value = view.get(f"{prefix}.{name}")
            if value and not view.get(f"{prefix}.gated_linear_unit"):
                yield Problem(f"{prefix}.{name}", value, "needs gated_linear_unit=true")


RULES = (_fields, _ranges, _window, _positions, _gates)
