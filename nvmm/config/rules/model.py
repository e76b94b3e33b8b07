"""Rules of a config's model: shapes, vocabulary, backend, fields decided elsewhere. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from nvmm.config.choices import Backend
from nvmm.config.problem import Problem, View, divisors
from nvmm.config.rules import precision

# TransformerConfig fields that the trainer fills in -> the key that decides them.
_DECIDED_ELSEWHERE = {
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


def _transformer_shapes(view: View) -> Iterator[Problem]:
    for prefix in _transformers(view):
        heads = view.integer(f"{prefix}.num_attention_heads")
        groups = view.integer(f"{prefix}.num_query_groups")
        hidden = view.integer(f"{prefix}.hidden_size")
        if heads and groups and heads % groups:
            yield Problem(
                f"{prefix}.num_query_groups",
                groups,
                f"must divide num_attention_heads={heads}; use one of {divisors(heads)}",
            )
        if heads and hidden and not view.integer(f"{prefix}.kv_channels") and hidden % heads:
            yield Problem(
                f"{prefix}.hidden_size",
                hidden,
                f"must be divisible by num_attention_heads={heads} where kv_channels is not given",
            )


def _vocabulary(view: View) -> Iterator[Problem]:
    if view.language is None:
        return
    key = f"{view.language}.padded_vocab_size"
    padded, tokens = view.integer(key), view.integer(f"{view.language}.vocab_size")
    if padded is None:
        return
    if tokens is not None and padded < tokens:
        yield Problem(key, padded, f"must be at least {view.language}.vocab_size={tokens}")
    if padded % view.size("tensor"):
        yield Problem(
            key,
            padded,
            f"must be divisible by parallel.tensor_model_parallel_size={view.size('tensor')}",
        )


def _transformer_fields(view: View) -> Iterator[Problem]:
    for prefix in _transformers(view):
        node = view.get(prefix)
        for name, key in _DECIDED_ELSEWHERE.items():
            if name in node:
                yield Problem(f"{prefix}.{name}", node[name], f"must not be given here; set {key}")
        for name in ("rotary_interleaved", "fused_single_qkv_rope", "flash_decode"):
            if node.get(name):
                allowed = "must be false: positions are applied by kernels.rope, in halves"
                yield Problem(f"{prefix}.{name}", node[name], allowed)
        for name in node:
            low = str(name).startswith(("fp8_", "fp4")) and name not in _DECIDED_ELSEWHERE
            if low and node[name] and not _transformer_engine(view):
                yield Problem(
                    f"{prefix}.{name}",
                    node[name],
                    "needs backend=transformer_engine (mcore ignores it otherwise); use null",
                )


def _backend(view: View) -> Iterator[Problem]:
    backend = view.get("backend")
    if backend is not None and backend not in get_args(Backend):
        yield Problem("backend", backend, f"must be one of {', '.join(get_args(Backend))}")
    if backend == "transformer_engine" and not _transformer_engine(view):
        yield Problem(
            "backend",
            "transformer_engine",
            "needs the transformer-engine package, which is not installed; use native",
        )


def _cross_attention(view: View) -> Iterator[Problem]:
    prefix, language = "model.cross_attention", f"{view.language}.transformer"
    if view.get(prefix) is None:
        return
    heads = view.integer(f"{prefix}.num_attention_heads")
    groups = view.integer(f"{prefix}.num_query_groups", heads)
    key = f"{prefix}.num_query_groups"
    if groups is None:
        key = f"{language}.num_query_groups"
        groups = view.integer(key, view.integer(f"{language}.num_attention_heads"))
    heads = heads or view.integer(f"{language}.num_attention_heads")
    tensor = view.size("tensor")
    if groups and groups % tensor:
        yield Problem(
            key,
            groups,
            f"must be divisible by parallel.tensor_model_parallel_size={tensor} with"
            " cross-attention",
        )
    if groups and heads and heads % groups:
        yield Problem(key, groups, f"must divide the {heads} heads of cross-attention")
    interval, layers = view.integer(f"{prefix}.interval", 1), view.integer(f"{language}.num_layers")
    if interval and layers and not 1 <= interval <= layers:
        yield Problem(
            f"{prefix}.interval", interval, f"must be in 1..{layers}, the decoder's layers"
        )


def _transformers(view: View) -> list[str]:
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


def _transformer_engine(view: View) -> bool:
    return (
        view.get("backend") == "transformer_engine"
        and importlib.util.find_spec("transformer_engine") is not None
    )


RULES = (
    _transformer_shapes,
    _vocabulary,
    _transformer_fields,
    _backend,
    _cross_attention,
)
