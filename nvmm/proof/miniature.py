"""The smallest config, and the smallest layouts, with the structure of full-size ones.

All that a layout depends on is kept: the ratio of heads to groups and of groups to tensor-parallel
ranks, heads that do not divide, gates, norms, biases, tied embeddings, freezing, packing,
objective, uneven stages. Sizes and paths are not. No torch.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvmm.config.nested import differences
from nvmm.config.tiles import of_grid

MAX_RANKS = 4
_KINDS = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "data": "DP",
}
_TENSOR, _PIPELINE, _CONTEXT, _DATA = _KINDS
_VIRTUAL = "virtual_pipeline_model_parallel_size"
_ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_KEYS = ("model", "lora", "objective", "optim", "kernels", "backend", "seed")
_VOCAB_SIZE = 509


@dataclass(frozen=True)
class Layout:
    """A parallel layout: its ranks and the overrides of the `parallel` group."""

    name: str
    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)


ONE_RANK = Layout("one rank")


@dataclass(frozen=True)
class Miniature:
    """A shrunk config and the layouts of at most 4 ranks that stand for its own.

    full: name of the layout that was asked for. changes: the differences, one line each.
    num_micro_batches: of a step over all data-parallel ranks, as all the layouts can deal them.
    """

    config: dict[str, Any]
    layouts: list[Layout]
    full: str
    changes: list[str]
    num_micro_batches: int


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink a resolved config to the smallest sizes that keep its structure.

    Dropout is 0; the precision is fp32, or fp64 with FP8.

    Data and tokenizer are left out: the batches are synthetic.
    """
    return miniature(config).config


def miniature(config: Mapping[str, Any], world_size: int | None = None) -> Miniature:
    """Shrink a resolved config and its layout.

    world_size: ranks of the full layout, of which the model's are a part; the rest is data
        parallel. None: the model's own ranks, or two data-parallel ranks where it takes one.

    Raises ValueError when the model's ranks do not divide the world size, and for a model whose
    media the synthetic batches do not have.
    """
    _require_drawn(config["model"])
    parallel = {k: v for k, v in (config.get("parallel") or {}).items() if k != "_target_"}
    sizes = _sizes(parallel, world_size)
    full = _name(sizes, parallel)
    small = {kind: _reduced(kind, sizes) for kind in sizes}
    keys = [key for key in _KEYS if config.get(key) is not None]
    shrunk = copy.deepcopy({key: config[key] for key in keys})
    if "cross_attention" in shrunk["model"]:
        shrunk["attended"] = _attended(config)
    language = shrunk["model"].get("language", shrunk["model"])
    full_layers = language["transformer"]["num_layers"]
    num_layers, stages = _layers(parallel, full_layers, sizes, small)
    _shrink_model(shrunk["model"], num_layers, sizes[_TENSOR], small[_TENSOR])
    _shrink_optim(shrunk["optim"], num_layers)
    if (lora := shrunk.get("lora")) is not None:
        # alpha / rank stays, so that the update has the same scale. Dropout's masks depend on the
        # layout, so there is none.
        scale = lora.get("alpha", 32.0) / lora.get("rank", 16)
        lora |= {"rank": 3, "alpha": 3 * scale, "dropout": 0.0}
        for key in ("targets", "train"):
            lora[key] = [_within(pattern, num_layers) for pattern in lora.get(key) or []]
    parallel |= {"variable_seq_lengths": True, "timeout_minutes": 5.0} | stages
    if parallel.get("recompute_num_layers") is not None:
        parallel["recompute_num_layers"] = min(parallel["recompute_num_layers"], 2)
    selections = _selections(small)
    layouts = [_layout(parallel, chosen) for chosen in selections]
    if (config.get("precision") or {}).get("fp8") is not None:
        keys.append("precision")
        _shrink_fp8(shrunk, config["precision"], layouts, num_layers)
    before = {key: config[key] for key in keys}
    changes = [
        f"{key}: {'default' if old is None else old} -> {new}"
        for key, old, new in differences(before, shrunk, in_lists=True)
        if not key.endswith("_target_")  # Precision's is left out, no other changes.
    ]
    # Ranks get as many micro-batches each, with virtual stages a multiple of the stages.
    units = [
        chosen[_DATA] * (chosen[_PIPELINE] if layout.parallel.get(_VIRTUAL) else 1)
        for chosen, layout in zip(selections, layouts, strict=True)
    ]
    unit = math.lcm(*units)
    return Miniature(shrunk, layouts, full, changes, unit * -(-4 // unit))


def _require_drawn(model: Mapping[str, Any]) -> None:
    """Raise ValueError for a model whose media `nvmm.proof.synthetic` does not draw: unseen parts
    would be equal over any layout."""
    others = [*(model.get("encoders") or {})]
    if others and ("vision" in model or others != ["audio"]):
        named = ", ".join([f"model.encoders.{name}" for name in others])
        named += " beside model.vision" * ("vision" in model)
        raise ValueError(
            f"the synthetic batches have pictures (model.vision) or sounds (model.encoders.audio),"
            f" not both and no others: they would leave out a part of {named}"
        )


def double(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shrunk config in double precision, where rounding cannot tip a decision.

    Kernels that are asked for by name know no double precision: they are "auto" there.
    """
    kernels = {k: "auto" if v == "fused" else v for k, v in config.get("kernels", {}).items()}
    precision = config.get("precision", {}) | {"dtype": "fp64", "grad_reduce_in_fp32": False}
    optim = config["optim"] | {"clip_grad": 0.0}  # the norm that clips is single precision
    return {**config, "precision": precision, "kernels": kernels, "optim": optim}


def _sizes(parallel: Mapping[str, Any], world_size: int | None) -> dict[str, int]:
    sizes = {kind: int(parallel.get(kind) or 1) for kind in _KINDS if kind != _DATA}
    model = sizes[_TENSOR] * sizes[_PIPELINE] * sizes[_CONTEXT]
    if world_size is None:
        world_size = model if model > 1 else 2
    if world_size % model:
        raise ValueError(
            f"--world-size {world_size} must be divisible by parallel.tensor_model_parallel_size x"
            f" pipeline_model_parallel_size x context_parallel_size = {model}"
        )
    return sizes | {_DATA: world_size // model}


def _reduced(kind: str, sizes: Mapping[str, int]) -> int:
    ranks = 1
    for size in sizes.values():
        ranks *= size
    return sizes[kind] if ranks <= MAX_RANKS else min(sizes[kind], 2)


def _selections(small: Mapping[str, int]) -> list[dict[str, int]]:
    """Choose subsets of the kinds that fit on 4 ranks and hold each kind at least once."""
    several = [kind for kind in small if small[kind] > 1]
    ranks = 1
    for size in small.values():
        ranks *= size
    if ranks <= MAX_RANKS:
        return [dict(small)]
    # All are 2 here. A last one without a partner goes with the first.
    pairs = [several[i : i + 2] for i in range(0, len(several), 2)]
    if len(pairs[-1]) == 1:
        pairs[-1].insert(0, several[0])
    return [{kind: small[kind] if kind in pair else 1 for kind in small} for pair in pairs]


def _layout(parallel: Mapping[str, Any], sizes: Mapping[str, int]) -> Layout:
    options = dict(parallel)
    options |= {kind: size for kind, size in sizes.items() if kind != _DATA}
    if sizes[_TENSOR] == 1 and options.get("sequence_parallel"):
        options["sequence_parallel"] = False
    if sizes[_PIPELINE] == 1:
        options |= {key: None for key in (_VIRTUAL, *_ENDS) if key in options}
    ranks = 1
    for size in sizes.values():
        ranks *= size
    return Layout(_name(sizes, options), ranks, options)


def _name(sizes: Mapping[str, int], parallel: Mapping[str, Any]) -> str:
    parts = [f"{short}{sizes[kind]}" for kind, short in _KINDS.items() if sizes[kind] > 1]
    if parallel.get(_VIRTUAL):
        parts.append(f"VPP{parallel[_VIRTUAL]}")
    name = "x".join(parts) or "one rank"
    if parallel.get("sequence_parallel"):
        name += "+SP"
    if sizes[_PIPELINE] > 1 and any(parallel.get(end) is not None for end in _ENDS):
        name += ", uneven stages"
    if parallel.get("encoder") == "sharded":
        name += ", sharded encoder"
    if parallel.get("recompute_granularity"):
        name += f", {parallel['recompute_granularity']} recompute"
    if parallel.get("overlap_grad_reduce"):
        name += ", overlapped"
    return name


def _layers(
    parallel: Mapping[str, Any],
    full_layers: int,
    sizes: Mapping[str, int],
    small: Mapping[str, int],
) -> tuple[int, dict[str, Any]]:
    """Return the layers of the small model, and its stages' keys of `parallel`.

    A first or last stage that is given a count of its own keeps being shorter or longer than the
    others: half as many layers, or half as many again.
    """
    pipeline = small[_PIPELINE]
    virtual = min(parallel.get(_VIRTUAL) or 1, 2)
    chunks = pipeline * virtual
    counts = {end: parallel[end] for end in _ENDS if parallel.get(end) is not None}
    stages: dict[str, Any] = {_VIRTUAL: virtual} if parallel.get(_VIRTUAL) else {}
    if pipeline == 1 or not counts:
        return chunks * max(1, 4 // chunks), stages
    others = sizes[_PIPELINE] - len(counts)
    typical = (full_layers - sum(counts.values())) / others if others else max(counts.values())
    for end, count in counts.items():
        stages[end] = virtual * (1 if count < typical else 2 if count == typical else 3)
    middle = pipeline - len(counts)
    return sum(stages[end] for end in counts) + 2 * virtual * middle, stages


def _shrink_model(model: dict[str, Any], num_layers: int, full: int, small: int) -> None:
    """Shrink a model's parts. full, small: tensor-parallel sizes before and after."""
    language = model.get("language", model)
    padded = math.lcm(4, small) * -(-_VOCAB_SIZE // math.lcm(4, small))
    language |= {"vocab_size": _VOCAB_SIZE, "padded_vocab_size": padded, "max_sequence_length": 256}
    heads, groups = _heads(language["transformer"], full, small)
    _shrink_kinds_of_layers(language["transformer"], num_layers)
    _shrink_transformer(language["transformer"], num_layers, heads, groups, small)
    if isinstance(language.get("rope_scaling"), dict):
        _shrink_rope(language)
    if "pooling" in language:
        _shrink_pooling(language["pooling"], _at_least_four(small))
    if "vision" in model:
        _shrink_vision(model, full, small)
    for parts in (model.get("encoders") or {}).values():
        _shrink_audio(model, parts, full, small)
    if "cross_attention" in model:
        _shrink_cross_attention(model["cross_attention"], num_layers, small)


def _shrink_vision(model: dict[str, Any], full: int, small: int) -> None:
    vision, connector = model["vision"], model["connector"]
    # An odd grid stays odd, and pixels behind the last patch stay behind it.
    grid = 2 * connector.get("downsample", 2) - bool(connector.get("pad_grid"))
    beside = vision["image_size"] % vision["patch_size"] > 0
    vision["image_size"] = grid * vision["patch_size"] + beside
    full_heads = vision["transformer"]["num_attention_heads"]
    heads = 5 if full_heads % 2 or full_heads % full else 4
    _shrink_transformer(vision["transformer"], 2, heads, heads, small)
    if connector.get("hidden_size") is not None:
        connector["hidden_size"] = 96
    if of_grid(connector) or "init_method_std" in connector:
        connector["init_method_std"] = 0.1


def _shrink_audio(model: dict[str, Any], parts: dict[str, Any], full: int, small: int) -> None:
    """Keep Whisper's kind, its pairs of tokens or one feature a window, or HTS-AT's."""
    encoder, connector = parts["encoder"], parts["connector"]
    attended = model.get("cross_attention")
    if "transformer" in encoder:
        positions, pool = encoder.get("max_source_positions", 1500), encoder.get("pool", 1)
        encoder |= {"num_mel_bins": 8, "max_source_positions": 7}
        encoder["pool"] = 7 if pool == positions else min(pool, 2)
        full_heads = encoder["transformer"]["num_attention_heads"]
        # As many heads as the decoder has at least, whose width holds the features.
        heads = 5 if full_heads % full and attended is None else 4
        _shrink_transformer(encoder["transformer"], 2, heads, heads, small)
        width = encoder["transformer"]["hidden_size"]
    else:
        width = 32
        encoder |= {"num_mel_bins": 16, "picture": 32, "hidden_size": 16, "depths": [2, 2]}
        encoder |= {"num_heads": [2, 4], "window_size": 4, "projection_size": width}
        encoder["init_method_std"] = 0.1
    if str(connector["_target_"]).endswith(".WindowTransformer"):
        connector |= {"num_heads": 4, "head_size": 8, "ffn_size": 48}
    elif connector.get("hidden_size") is not None:
        connector["hidden_size"] = 96
    connector["init_method_std"] = 0.1
    if attended is not None and attended.get("kv_size") is not None:
        attended["kv_size"] = width


def _shrink_kinds_of_layers(transformer: dict[str, Any], num_layers: int) -> None:
    """Keep layers with and without a window, shorter than the rows, and with and without RoPE."""
    if transformer.get("window_size") is not None:
        transformer["window_size"] = [3, 0]
    for name in ("window_attn_skip_freq", "no_rope_freq"):
        pattern = transformer.get(name)
        if isinstance(pattern, list):
            few = [pattern[i * len(pattern) // num_layers] for i in range(num_layers)]
            lost = set(pattern) - set(few)
            transformer[name] = [*few[:-1], lost.pop()] if lost and num_layers > 1 else few
        elif pattern is not None and name == "no_rope_freq":
            transformer[name] = pattern if num_layers % pattern == 0 else num_layers


def _shrink_rope(language: dict[str, Any]) -> None:
    """Let some rows be longer than the original length, and keep factors for the channels left."""
    scaling, width = language["rope_scaling"], language["transformer"]["kv_channels"]
    pairs = int(width * language.get("rotary_percent", 1.0)) // 2
    if not scaling["_target_"].endswith(".Linear"):
        scaling["original_max_position_embeddings"] = 12
    for name in ("short_factor", "long_factor"):
        if name in scaling:
            full = scaling[name]
            scaling[name] = [full[i * len(full) // pairs] for i in range(pairs)]


def _attended(config: Mapping[str, Any]) -> str:
    """Return the tiles that the data leave to cross-attention; a shrunk config names them."""
    if "attended" in config:
        return str(config["attended"])
    build = ((config.get("data") or {}).get("train") or {}).get("build") or {}
    return str(build.get("attended") or "none")


def _shrink_cross_attention(block: dict[str, Any], num_layers: int, small: int) -> None:
    """Put a block in every second layer, or in each as before, with gates that pass a gradient."""
    every = 1 if block.get("interval", 1) == 1 else min(2, num_layers)
    block |= {"interval": every, "initial_gate": 0.5}
    if block.get("offset") is not None:
        block["offset"] = min(block["offset"], every - 1)
    if block.get("kv_channels") is not None:
        block["kv_channels"] = 8
    if block.get("ffn_hidden_size") is not None:
        block["ffn_hidden_size"] = 96
    heads = block.get("num_attention_heads")
    if heads is not None:
        groups = block.get("num_query_groups") or heads
        block["num_attention_heads"] = small * min(heads // groups, 2)
        if block.get("num_query_groups") is not None:
            block["num_query_groups"] = small


def _shrink_pooling(pooling: dict[str, Any], heads: int) -> None:
    small = {"num_latents": 6, "num_heads": heads, "head_dim": 16, "ffn_hidden_size": 96}
    pooling |= {key: value for key, value in small.items() if key in pooling}
    if "init_method_std" in pooling:
        pooling["init_method_std"] = 0.1


def _heads(transformer: Mapping[str, Any], full: int, small: int) -> tuple[int, int]:
    """Return heads and groups of the same ratio, with fewer groups than TP ranks if so before."""
    heads = transformer["num_attention_heads"]
    groups = transformer.get("num_query_groups") or heads
    if groups == heads:
        return _at_least_four(small), _at_least_four(small)
    if groups < full:
        fewer = max(1, small // min(full // groups, small))
    else:
        fewer = max(min(groups, 2), small)
    ratio = min(heads // groups, 4)
    while fewer * ratio % small:
        ratio += 1
    return fewer * ratio, fewer


def _at_least_four(multiple: int) -> int:
    """Return the first multiple of a tensor-parallel size that is at least 4."""
    return multiple * -(-4 // multiple)


def _shrink_transformer(
    transformer: dict[str, Any], num_layers: int, heads: int, groups: int, small: int
) -> None:
    # Three ranks that share a group split its queries, keys and values.
    width = 24 if small == 3 else 16
    wide = transformer.get("kv_channels")
    differs = wide and wide * transformer["num_attention_heads"] != transformer["hidden_size"]
    if transformer.get("num_query_groups") is not None:
        transformer["num_query_groups"] = groups
    transformer |= {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "kv_channels": width,
        # As wide as all heads together, or not, as before.
        "hidden_size": width * heads + (32 if differs else 0),
        # 4 ranks and 3 divide 96, 128 only 4.
        "ffn_hidden_size": 96 if transformer.get("gated_linear_unit") or small == 3 else 128,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Larger than a real model's, so that every path carries a visible gradient.
        "init_method_std": 0.1,
    }


def _shrink_optim(optim: dict[str, Any], num_layers: int) -> None:
    optim |= {"learning_rate": 1e-3, "min_learning_rate": 0.0, "warmup_steps": 0}
    optim["decay_steps"] = None
    lengths = {"cooldown_steps", "warmup_tokens", "decay_tokens", "cooldown_tokens"}
    optim |= dict.fromkeys(optim.keys() & lengths)
    if optim.get("schedule") in ("exponential", "inverse_sqrt"):
        optim["schedule"] = "cosine"  # these need a minimum, or a warm-up
    groups = optim.get("groups") or []
    for group in groups:
        group |= {"learning_rate": 5e-4, "min_learning_rate": 0.0}
        group["pattern"] = _within(group["pattern"], num_layers)
    for key in ("freeze", "no_decay"):
        if optim.get(key):
            optim[key] = [_within(pattern, num_layers) for pattern in optim[key]]


def _shrink_fp8(
    shrunk: dict[str, Any], precision: Mapping[str, Any], layouts: list[Layout], num_layers: int
) -> None:
    """Keep FP8 in double precision, and make sizes that whole blocks of 128 divide on every rank.

    The norm that gradients are clipped by is single precision, so nothing is clipped. Tiles that
    are dealt over tensor-parallel ranks, or heads padded for them, have other blocks and scales
    than on one rank: there the encoder keeps its precision.
    """
    fp8 = copy.deepcopy(dict(precision["fp8"]))
    fp8["amax_history_len"] = min(fp8.get("amax_history_len", 1024), 3)
    fp8["exclude"] = [_within(pattern, num_layers) for pattern in fp8.get("exclude") or []]
    for end in ("start", "end"):
        key = f"num_layers_at_{end}_in_bf16"
        fp8[key] = min(fp8.get(key, 0), 1)
    model, blocks = shrunk["model"], fp8.get("recipe", "delayed") in ("blockwise", "mxfp8")
    language = model.get("language", model)
    thirds = any(layout.parallel[_TENSOR] == 3 for layout in layouts)
    for part in (language, model.get("vision")):
        if part is not None:
            for key in ("kv_channels", "hidden_size"):
                part["transformer"][key] *= 4
            part["transformer"]["ffn_hidden_size"] = 384 if thirds else 256
    if "ffn_hidden_size" in language.get("pooling", {}):
        language["pooling"]["ffn_hidden_size"] = 384 if thirds else 256
    rows = 1
    for layout in layouts:
        tensor, context = layout.parallel[_TENSOR], layout.parallel[_CONTEXT]
        if layout.parallel.get("sequence_parallel"):
            rows = max(rows, 128 * tensor * context)
        sharded = layout.parallel.get("encoder") == "sharded" and not blocks
        if "vision" in model and tensor > 1 and not sharded and "vision.*" not in fp8["exclude"]:
            fp8["exclude"].append("vision.*")
    shrunk["precision"] = {"dtype": "fp64", "grad_reduce_in_fp32": False, "fp8": fp8}
    shrunk["row_multiple"] = rows
    shrunk["optim"]["clip_grad"] = 0.0


def _within(pattern: str, num_layers: int) -> str:
    """Move a pattern that names a language layer which the small model lacks to its last one."""
    return re.sub(
        r"(?<!vision\.decoder\.)layers\.(\d+)",
        lambda found: f"layers.{min(int(found[1]), num_layers - 1)}",
        pattern,
    )
