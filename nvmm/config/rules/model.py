"""Rules of a config's model: shapes, vocabulary, backend, cross-attention. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from nvmm.config.choices import Backend
from nvmm.config.problem import Problem, View, divisors
from nvmm.config.rules.transformer import has_transformer_engine, transformers
from nvmm.config.signatures import class_attribute


def _transformer_shapes(view: View) -> Iterator[Problem]:
    for prefix in transformers(view):
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


def _backend(view: View) -> Iterator[Problem]:
    backend = view.get("backend")
    if backend is not None and backend not in get_args(Backend):
        yield Problem("backend", backend, f"must be one of {', '.join(get_args(Backend))}")
    if backend == "transformer_engine" and not has_transformer_engine(view):
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
    function = view.get(f"{prefix}.activation_func")
    if function is not None and view.get(f"{prefix}.ffn_hidden_size") is None:
        yield Problem(
            f"{prefix}.activation_func",
            function,
            f"needs {prefix}.ffn_hidden_size: the blocks have no feed-forward part without it",
        )


def _connector(view: View) -> Iterator[Problem]:
    key = "model.connector.activation_func"
    path = view.get(f"{key}.path")
    inherited = path in (None, "torch.nn.functional.gelu")  # as by default
    if not inherited and view.get("model.connector.hidden_size") is None:
        allowed = "needs model.connector.hidden_size: one layer has no activation"
        yield Problem(f"{key}.path", path, allowed)


def _scores(view: View) -> Iterator[Problem]:
    """A model with scores has an objective that learns them, as many as data and objective name."""
    objective = view.get("objective._target_")
    output = class_attribute(str(objective), "output")
    if view.language is None or objective is None or output is None:
        return
    key = f"{view.language}.num_outputs"
    outputs = view.integer(key)
    if output == "score" and outputs is None:
        target = view.get(f"{view.language}._target_")
        allowed = f"needs a model with num_outputs; {view.language}._target_={target} has none"
        yield Problem("objective._target_", objective, allowed)
    if outputs is None:
        return
    if output != "score":
        allowed = "needs an objective of scores, of nvmm.objectives.reward; objective._target_="
        yield Problem(key, outputs, f"{allowed}{objective} is none")
    for names in ("objective.attributes", "objective.weights", "data.train.build.attributes"):
        listed = view.get(names)
        if isinstance(listed, list) and len(listed) != outputs:
            yield Problem(key, outputs, f"must be {len(listed)}, as many as {names} lists")
    index = view.integer("objective.index", 0) or 0
    if index >= outputs:
        yield Problem("objective.index", index, f"must be below {key}={outputs}")


RULES = (
    _scores,
    _connector,
    _transformer_shapes,
    _vocabulary,
    _backend,
    _cross_attention,
)
