"""Cross-field rules of a config: pure functions over the resolved config, no torch.

Each rule yields every violation it sees. A key that is missing or of another type makes the rules
that need it silent: `nvmm.config` reports those by themselves.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nvmm import data_rules, precision_rules
from nvmm.problems import Problem, View, divisors

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
    **dict.fromkeys(precision_rules.FIELDS, "precision.fp8"),
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

_GROUP_KEYS = {"pattern", "learning_rate", "min_learning_rate", "weight_decay"}
_CHOICES = {
    **precision_rules.CHOICES,
    **data_rules.CHOICES,
    "backend": ("native", "transformer_engine"),
    "parallel.encoder": ("replicated", "sharded"),
    "parallel.recompute_granularity": ("full", "selective"),
    "parallel.recompute_method": ("uniform", "block"),
    **{
        f"kernels.{name}": ("auto", "eager", "fused")
        for name in (
            *("norm", "activation", "gated_residual", "linear_cross_entropy"),
            *("rope", "merge", "pixel_shuffle"),
            *("joint_norm", "adamw", "multi_tensor"),
        )
    },
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.moments_dtype": ("fp32", "bf16"),
    "checkpoint.optimizer": ("fully_reshardable", "dp_reshardable"),
    "trainer.on_nonfinite": ("stop", "skip"),
}


def violations(config: Mapping[str, Any], world_size: int | None = None) -> list[Problem]:
    """Every cross-field rule that `config` (resolved, plain) breaks."""
    view = View(config, world_size)
    return [problem for rule in RULES for problem in rule(view)]


def _positive_sizes(view: View) -> Iterator[Problem]:
    for key in (
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.context_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.num_layers_in_first_pipeline_stage",
        "parallel.num_layers_in_last_pipeline_stage",
        "trainer.max_steps",
        "trainer.global_batch_size",
        "trainer.micro_batch_size",
        "trainer.log_interval",
        "trainer.validation_interval",
        "trainer.validation_batches",
        "checkpoint.save_interval",
        "checkpoint.keep_last",
        "data.sequence_length",
        "data.window",
        "data.train.local_window",
    ):
        value = view.integer(key)
        if value is not None and value < 1:
            yield Problem(key, value, "must be at least 1")


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


def _pooling_heads(view: View) -> Iterator[Problem]:
    key, tensor = "model.pooling.num_heads", view.size("tensor")
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


def _pipeline_layers(view: View) -> Iterator[Problem]:
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
    given = {name: count for name, count in ends.items() if count is not None}
    for name, count in given.items():
        if pipeline == 1:
            yield Problem(name, count, "needs parallel.pipeline_model_parallel_size > 1; use null")
        elif count % chunks:
            yield Problem(name, count, f"must be divisible by the {chunks} virtual stages")
    if layers is None or pipeline == 1:
        return
    middle, stages = layers - sum(given.values()), pipeline - len(given)
    if middle < 0 or bool(middle) != bool(stages):
        yield Problem(key, layers, f"leaves {middle} layers for the {stages} stages in the middle")
    elif stages and middle % (stages * chunks):
        counted = f"minus the {sum(given.values())} of the first and last stages " if given else ""
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
    block = precision_rules.row_multiple(view) if split > 1 else 1
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


def _seed(view: View) -> Iterator[Problem]:
    seed = view.get("seed")
    if seed is not None and (view.integer("seed") is None or seed < 0):
        yield Problem("seed", seed, "must be a whole number of at least 0")


def _choices(view: View) -> Iterator[Problem]:
    for key, choices in _CHOICES.items():
        value = view.get(key)
        if value is not None and value not in choices:
            yield Problem(key, value, f"must be one of {', '.join(choices)}")


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


def _batches(view: View) -> Iterator[Problem]:
    whole = view.integer("trainer.global_batch_size")
    micro = view.integer("trainer.micro_batch_size", 1)
    pipeline = view.size("pipeline")
    context = view.integer("parallel.context_parallel_size", 1) or 1
    model = view.size("tensor") * pipeline * max(1, context)
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
    if not whole or not micro or whole < 1 or micro < 1:
        return
    if whole % (micro * data_parallel):
        ranks = f" x {data_parallel} data-parallel ranks" if view.world_size is not None else ""
        yield Problem(
            "trainer.global_batch_size",
            whole,
            f"must be divisible by trainer.micro_batch_size={micro}{ranks}"
            f" = {micro * data_parallel}",
        )
        return
    virtual = view.integer("parallel.virtual_pipeline_model_parallel_size")
    micro_batches = whole // (micro * data_parallel)
    if view.world_size is not None and virtual is not None and micro_batches % pipeline:
        yield Problem(
            "trainer.global_batch_size",
            whole,
            f"gives {micro_batches} micro-batches a rank, which must be divisible by"
            f" parallel.pipeline_model_parallel_size={pipeline} with virtual stages",
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
    if view.get("backend") == "transformer_engine" and not _transformer_engine(view):
        yield Problem(
            "backend",
            "transformer_engine",
            "needs the transformer-engine package, which is not installed; use native",
        )


def _schedule(view: View) -> Iterator[Problem]:
    groups = view.get("optim.groups")
    prefixes = ["optim"]
    flat = {"optim": view.get("optim") or {}}
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, Mapping):
            prefixes.append(f"optim.groups[{index}]")
            flat[prefixes[-1]] = group
    for prefix in prefixes[1:]:
        for name in flat[prefix].keys() - _GROUP_KEYS:
            allowed = f"is unknown; use {', '.join(sorted(_GROUP_KEYS))}"
            yield Problem(f"{prefix}.{name}", flat[prefix][name], allowed)
    for prefix in prefixes:
        low, high = flat[prefix].get("min_learning_rate"), flat[prefix].get("learning_rate")
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            yield Problem(
                f"{prefix}.min_learning_rate", low, f"must be at most learning_rate={high}"
            )
    warmup, steps = view.integer("optim.warmup_steps"), view.integer("trainer.max_steps")
    if warmup is not None and steps is not None and warmup > steps:
        yield Problem("optim.warmup_steps", warmup, f"must be at most trainer.max_steps={steps}")
    decay = view.integer("optim.decay_steps")
    if warmup is not None and decay is not None and decay < warmup:
        yield Problem("optim.decay_steps", decay, f"must be at least optim.warmup_steps={warmup}")
    betas = view.get("optim.betas")
    if view.get("optim.moments_dtype") == "bf16" and isinstance(betas, list):
        if any(isinstance(beta, int | float) and beta > 0.99 for beta in betas):
            yield Problem(
                "optim.betas", betas, "must be at most 0.99 with optim.moments_dtype=bf16"
            )


def _lora(view: View) -> Iterator[Problem]:
    lora = view.get("lora")
    if lora is None:
        return
    if not isinstance(lora, Mapping) or "_target_" not in lora:
        yield Problem("lora", lora, "must be one of its options; add lora=default")
        return
    for key in ("targets", "train"):
        patterns = lora.get(key)
        if isinstance(patterns, list) and not all(isinstance(p, str) for p in patterns):
            yield Problem(f"lora.{key}", patterns, "must be a list of patterns")
    if lora.get("targets") == []:
        yield Problem("lora.targets", [], "must name at least one linear")
    rank, alpha, dropout = (view.number(f"lora.{key}") for key in ("rank", "alpha", "dropout"))
    if rank is not None and rank < 1:
        yield Problem("lora.rank", rank, "must be at least 1")
    if alpha is not None and alpha <= 0:
        yield Problem("lora.alpha", alpha, "must be positive")
    if dropout is not None and not 0 <= dropout < 1:
        yield Problem("lora.dropout", dropout, "must be at least 0 and less than 1")
    if view.get("backend") == "transformer_engine":
        yield Problem("lora", lora["_target_"], "needs backend=native")


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


def _profile(view: View) -> Iterator[Problem]:
    profile = view.get("trainer.profile")
    if profile is None:
        return
    steps = profile if isinstance(profile, list) and len(profile) == 2 else [1, 0]
    if not all(isinstance(s, int) for s in steps) or steps[0] >= steps[1]:
        yield Problem("trainer.profile", profile, "must be [start, stop], start < stop, or null")


RULES: tuple[Callable[[View], Iterator[Problem]], ...] = (
    _positive_sizes,
    _attention_heads,
    _pooling_heads,
    _transformer_shapes,
    _pipeline_layers,
    _sequence_parallel,
    _sequence_length,
    _context_parallel,
    _overlap,
    _recompute,
    _seed,
    _choices,
    _vocabulary,
    _batches,
    _transformer_fields,
    precision_rules.fp8,
    precision_rules.double,
    _backend,
    _schedule,
    _lora,
    _cross_attention,
    data_rules.vision,
    data_rules.attended,
    data_rules.blend,
    _profile,
)


def _transformers(view: View) -> list[str]:
    """Keys of every TransformerConfig in the model."""
    found = []

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            if str(node.get("_target_", "")).endswith("TransformerConfig"):
                found.append(key)
            for name, child in node.items():
                walk(child, f"{key}.{name}")

    walk(view.get("model"), "model")
    return found


def _transformer_engine(view: View) -> bool:
    return (
        view.get("backend") == "transformer_engine"
        and importlib.util.find_spec("transformer_engine") is not None
    )
