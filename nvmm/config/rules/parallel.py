"""Rules of a config's parallel layout: sizes that must divide, keys that need others. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nvmm.config.problem import Problem, View, divisors
from nvmm.config.rules import precision


def _attention_heads(view: View) -> Iterator[Problem]:
    tensor = view.size("tensor")
    if view.language is None:
        return
    prefix = f"{view.language}.transformer"
    heads = view.integer(f"{prefix}.num_attention_heads")
    groups = view.integer(f"{prefix}.num_query_groups", heads)
    if heads and heads % tensor:
        yield _uneven_heads(f"{prefix}.num_attention_heads", heads, tensor)
    elif groups and groups % tensor and tensor % groups:
        yield Problem(
            f"{prefix}.num_query_groups",
            groups,
            f"must be a multiple or a divisor of parallel.tensor_model_parallel_size={tensor}",
        )
    elif heads and groups and groups < tensor:
        # Ranks that share a group split one matrix of queries, keys and values between them.
        hidden = view.integer(f"{prefix}.hidden_size") or 0
        width = view.integer(f"{prefix}.kv_channels") or hidden // heads
        if width * (heads + 2 * groups) % tensor:
            yield Problem(
                f"{prefix}.num_query_groups",
                groups,
                f"is less than parallel.tensor_model_parallel_size={tensor}, which must then divide"
                f" (num_attention_heads + 2 x num_query_groups) x kv_channels ="
                f" {width * (heads + 2 * groups)}",
            )


def _widths(view: View) -> Iterator[Problem]:
    """Check what column-parallel linears give out: every rank gets as many features."""
    tensor = view.size("tensor")
    language = f"{view.language}.transformer"
    hidden = view.integer(f"{language}.hidden_size") if view.language else None
    widths: dict[str, int | None] = {}
    if hidden:
        widths[f"{language}.ffn_hidden_size"] = 4 * hidden
    if hidden and view.get("model.pooling") is not None:
        widths["model.pooling.ffn_hidden_size"] = 4 * hidden
    widths["model.cross_attention.ffn_hidden_size"] = None
    encoders = {"model.vision": "model.connector"}
    others = view.get("model.encoders")
    for modality in others if isinstance(others, Mapping) else ():
        part = f"model.encoders.{modality}"
        encoders[f"{part}.encoder"] = f"{part}.connector"
    for encoder, connector in encoders.items():
        if view.get(connector) is not None:
            # A connector of one layer gives out the language model's width.
            widths[f"{connector}.hidden_size"] = hidden
        size = view.integer(f"{encoder}.transformer.hidden_size")
        if size and view.get("parallel.encoder") == "sharded":
            widths[f"{encoder}.transformer.ffn_hidden_size"] = 4 * size
    for key, default in widths.items():
        width = view.integer(key) or default
        if width and width % tensor:
            yield Problem(
                key, width, f"must be divisible by parallel.tensor_model_parallel_size={tensor}"
            )


def _pooling_heads(view: View) -> Iterator[Problem]:
    tensor = view.size("tensor")
    for key in ("model.pooling.num_heads", "model.language.pooling.num_heads"):
        heads = view.integer(key)
        if heads and heads % tensor:
            yield _uneven_heads(key, heads, tensor)


def _uneven_heads(key: str, heads: int, tensor: int) -> Problem:
    return Problem(
        key,
        heads,
        f"must be divisible by parallel.tensor_model_parallel_size={tensor};"
        f" use a size of {divisors(heads)}",
    )


def _pipeline_layers(view: View) -> Iterator[Problem]:
    # 1. Virtual stages, and ends with a count of their own, need a pipeline.
    pipeline = view.size("pipeline")
    virtual = view.integer("parallel.virtual_pipeline_model_parallel_size")
    if virtual is not None and pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            virtual,
            "needs parallel.pipeline_model_parallel_size > 1; use null",
        )
        return
    key = f"{view.language}.transformer.num_layers"
    layers = view.integer(key) if view.language else None
    chunks = virtual or 1
    ends = {
        f"parallel.num_layers_in_{end}_pipeline_stage": view.integer(
            f"parallel.num_layers_in_{end}_pipeline_stage"
        )
        for end in ("first", "last")
    }
    stage_layers = {name: count for name, count in ends.items() if count is not None}
    for name, count in stage_layers.items():
        if pipeline == 1:
            yield Problem(name, count, "needs parallel.pipeline_model_parallel_size > 1; use null")
        elif count % chunks:
            yield Problem(name, count, f"must be divisible by the {chunks} virtual stages")
    if layers is None or pipeline == 1:
        return
    # 2. The stages in the middle share what the ends leave, evenly over their chunks.
    middle, stages = layers - sum(stage_layers.values()), pipeline - len(stage_layers)
    if middle < 0 or bool(middle) != bool(stages):
        yield Problem(key, layers, f"leaves {middle} layers for the {stages} stages in the middle")
    elif stages and middle % (stages * chunks):
        counted = (
            f"minus the {sum(stage_layers.values())} of the first and last stages "
            if stage_layers
            else ""
        )
        yield Problem(
            key,
            layers,
            f"{counted}must be divisible by {stages} pipeline stages x {chunks} virtual stages"
            f" = {stages * chunks}",
        )


def _sequence_parallel(view: View) -> Iterator[Problem]:
    if view.get("parallel.sequence_parallel") is not True:
        return
    tensor = view.size("tensor")
    if tensor == 1:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            "needs parallel.tensor_model_parallel_size > 1; use false",
        )


def _sequence_length(view: View) -> Iterator[Problem]:
    length = view.integer("data.sequence_length")
    context = max(1, view.integer("parallel.context_parallel_size", 1) or 1)
    chunks = 2 * context if context > 1 else 1
    split = view.size("tensor") if view.get("parallel.sequence_parallel") is True else 1
    block = precision.row_multiple(view) if split > 1 else 1
    multiple = math.lcm(chunks, context * split * block)
    if not length or length % multiple == 0:
        return
    reasons = []
    if context > 1:
        reasons.append(f"two chunks on each of parallel.context_parallel_size={context}")
    if split > 1:
        reasons.append(
            f"parallel.tensor_model_parallel_size={split} with parallel.sequence_parallel"
        )
    if block > 1:
        reasons.append(f"blocks of {block} tokens with precision.fp8")
    yield Problem(
        "data.sequence_length",
        length,
        f"must be divisible by {multiple} ({' and '.join(reasons)})",
    )


def _context_parallel(view: View) -> Iterator[Problem]:
    key = "parallel.context_parallel_size"
    size = view.integer(key, 1) or 1
    if size > 1 and view.get("backend") == "transformer_engine":
        yield Problem(key, size, "must be 1 with backend=transformer_engine; use backend=native")


def _overlap(view: View) -> Iterator[Problem]:
    if view.get("parallel.overlap_param_gather") is True:
        if view.get("parallel.overlap_grad_reduce") is not True:
            yield Problem(
                "parallel.overlap_param_gather", True, "needs parallel.overlap_grad_reduce=true"
            )


def _recompute(view: View) -> Iterator[Problem]:
    if view.get("parallel.recompute_granularity") == "full":
        return
    for key in ("parallel.recompute_method", "parallel.recompute_num_layers"):
        if view.get(key) is not None:
            yield Problem(key, view.get(key), "needs parallel.recompute_granularity=full; use null")


def _batches(view: View) -> Iterator[Problem]:
    global_batch = view.integer("trainer.global_batch_size")
    sizes = [("trainer.global_batch_size", global_batch)]
    ramp = view.get("trainer.batch_ramp")
    for index, stage in enumerate(ramp if isinstance(ramp, list) else []):
        key = f"trainer.batch_ramp[{index}].global_batch_size"
        if isinstance(stage, Mapping):
            sizes.insert(-1, (key, View(stage).integer("global_batch_size")))
    micro = view.integer("trainer.micro_batch_size", 1)
    pipeline = view.size("pipeline")
    context = view.integer("parallel.context_parallel_size", 1) or 1
    model = view.size("tensor") * pipeline * max(1, context)
    # 1. Without a world size, as in a check on one machine, one data-parallel rank is assumed.
    data_parallel = 1
    if view.world_size is not None:
        if view.world_size % model:
            yield Problem(
                "WORLD_SIZE",
                view.world_size,
                "must be divisible by parallel.tensor_model_parallel_size x"
                f" pipeline_model_parallel_size x context_parallel_size = {model};"
                f" launch a multiple of {model} ranks",
            )
            return
        data_parallel = view.world_size // model
    if not micro or micro < 1:
        return
    # 2. Every rank gets as many micro-batches, with virtual stages a multiple of the stages.
    virtual = view.integer("parallel.virtual_pipeline_model_parallel_size")
    ranks = f" x {data_parallel} data-parallel ranks" if view.world_size is not None else ""
    for key, size in sizes:
        micro_batches, rest = divmod(size or 0, micro * data_parallel)
        if size is None or size < 1:
            continue
        if rest:
            yield Problem(
                key,
                size,
                f"must be divisible by trainer.micro_batch_size={micro}{ranks}"
                f" = {micro * data_parallel}",
            )
        elif view.world_size is not None and virtual is not None and micro_batches % pipeline:
            yield Problem(
                key,
                size,
                f"gives {micro_batches} micro-batches a rank, which must be divisible by"
                f" parallel.pipeline_model_parallel_size={pipeline} with virtual stages",
            )


RULES = (
    _attention_heads,
    _pooling_heads,
    _widths,
    _pipeline_layers,
    _sequence_parallel,
    _sequence_length,
    _context_parallel,
    _overlap,
    _recompute,
    _batches,
)
