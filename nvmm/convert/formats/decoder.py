"""The fields of configs and rows of tables that the decoder-only families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.config.rules import rope
from nvmm.config.signatures import completed, signature
from nvmm.convert.formats.config import (
    SILU,
    integral,
    known,
    layer_windows,
    mismatches,
    need,
    only,
    padded,
    transformer,
    whole,
    windows,
)
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, Drop, GatedMLP, PadVocabulary, Rename, Row, Tied, expand

PREFIX, EMBEDDING, HEAD = "decoder_prefix", "embedding_name", "output_layer_name"
"""Keys that no config.json has; `complete` finds their values in the names."""
POOLING = "sentence_pooling"
"""A key that no config.json has: the one pooling of a folder's sentence-transformers files."""
INTERNAL = frozenset({PREFIX, EMBEDDING, HEAD, POOLING})
POOLINGS = {"mean": "Mean", "lasttoken": "EOS"}
"""sentence-transformers' names of our poolings that need no weights."""
_POOLING_CLASSES = "nvmm.modules.pooling."
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("tie_word_embeddings", "max_position_embeddings", "initializer_range"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    "original_max_position_embeddings",
    *(PREFIX, EMBEDDING, HEAD, POOLING, "is_causal"),
)
"""Fields of config.json that every family reads."""
# Some kinds read the original length; Transformers writes it for others too.
_EVERY_ROPE = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    "original_max_position_embeddings",
)
_ROPE_KINDS = {
    "linear": "Linear",
    "llama3": "Llama3",
    "yarn": "YaRN",
    "dynamic": "DynamicNTK",
    "longrope": "LongRoPE",
}
"""Transformers' rope_type -> our class, whose parameters have the names of its fields."""
_ORIGINAL = "original_max_position_embeddings"


def read(hf: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    """Return a decoder's config.json with its class's defaults.

    fields: what its family reads beside FIELDS. Raises ValueError for fields that nobody reads.
    """
    known(hf, *FIELDS, *fields)
    return standard(hf)


def to_language(
    hf: Mapping[str, Any], changes: Mapping[str, Any] | None = None, *, partial_rotary: bool = False
) -> dict[str, Any]:
    """Return our config of a SwiGLU, RMSNorm decoder without biases.

    Args:
        hf: what `read` gave.
        changes: of its TransformerConfig.
        partial_rotary: whether the family may turn a part of each head alone.
    """
    heads = need(hf, "num_attention_heads")
    vocab_size = need(hf, "vocab_size")
    config = {
        "num_layers": need(hf, "num_hidden_layers"),
        "hidden_size": need(hf, "hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or need(hf, "hidden_size") // heads,
        "ffn_hidden_size": need(hf, "intermediate_size"),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps"),
        "gated_linear_unit": True,
        "activation_func": SILU,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "init_method_std": hf["initializer_range"],
    }
    language = {
        "_target_": "nvmm.models.language.LanguageModel",
        "_partial_": True,
        "transformer": transformer(**(config | dict(changes or {}))),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded(vocab_size),
        "share_embeddings_and_output_weights": bool(hf["tie_word_embeddings"]),
        "max_sequence_length": need(hf, "max_position_embeddings"),
    }
    language |= _rope(hf, partial_rotary, config["kv_channels"])
    if hf.get(POOLING) is not None:
        return _embedder(language, hf[POOLING], only(hf, "is_causal", True, False))
    if not only(hf, "is_causal", True, False):
        raise ValueError(
            "config.json: is_causal=False is an embedder's, and its folder has no modules.json that"
            " says how it pools"
        )
    return language


def _embedder(language: Mapping[str, Any], pooling: str, causal: bool) -> dict[str, Any]:
    """Return a decoder's config as that of an embedder. Raises ValueError for what it cannot be."""
    if (percent := language.get("rotary_percent", 1.0)) != 1.0:
        raise ValueError(f"config.json: an embedder has no partial_rotary_factor={percent}")
    if not causal and language["transformer"].get("window_size") is not None:
        raise ValueError("config.json: is_causal=False and a sliding_window contradict each other")
    # An embedder has no output layer for the embedding to be tied to.
    left_out = ("share_embeddings_and_output_weights", "rotary_percent")
    return {
        **{key: value for key, value in language.items() if key not in left_out},
        "_target_": "nvmm.models.embedder.EmbeddingModel",
        "pooling": {"_target_": _POOLING_CLASSES + POOLINGS[pooling], "_partial_": True},
        "causal": causal,
    }


def pooling_name(model: Mapping[str, Any], family: str) -> str:
    """Return sentence-transformers' name of an embedder's pooling; ValueError where it has none."""
    kind = model["pooling"]["_target_"].removeprefix(_POOLING_CLASSES)
    for name, ours in POOLINGS.items():
        if ours == kind:
            return name
    raise ValueError(
        f"--format {family} cannot express model.pooling={kind}; it can"
        f" {', '.join(POOLINGS.values())}"
    )


def from_language(model: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return the fields that all families' config.json have."""
    model = whole(model)
    if "vocab_size" not in model:
        raise ValueError(f"--format {family} is a language model; name its part with --part")
    config = model["transformer"]
    hf: dict[str, Any] = {
        "vocab_size": model["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_query_groups"],
        "max_position_embeddings": model.get("max_sequence_length", 4096),
        "rope_theta": float(model["rotary_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": model["share_embeddings_and_output_weights"],
        "initializer_range": config.get("init_method_std", 0.02),
        "use_cache": True,
    }
    if "pooling" in model:
        # The names of a base model, which has no output layer.
        hf |= {PREFIX: "", HEAD: None, "tie_word_embeddings": False}
        hf |= {POOLING: pooling_name(model, family), "is_causal": model.get("causal", False)}
    if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
        hf["head_dim"] = config["kv_channels"]
    if model["rope_scaling"] is not None:
        hf |= _scaling_fields(model["rope_scaling"])
    return hf


def expressible(model: Mapping[str, Any], back: Mapping[str, Any], family: str) -> None:
    """Raise ValueError naming the keys of `model` that `back`, its way through a format, lacks."""
    lines = mismatches(model, back, "this model", f"--format {family}")
    if lines:
        raise ValueError(f"--format {family} cannot express this model:\n  " + "\n  ".join(lines))


def _rope(hf: Mapping[str, Any], partial: bool, channels: int) -> dict[str, Any]:
    """Return our keys of RoPE, which turns heads of so many channels, or a part of them."""
    given = need(hf, "rope_parameters")
    if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise ValueError(f"{_WHERE} for each kind of layer ({nested[0]}) is not supported")
    out: dict[str, Any] = {"rotary_base": integral(need(given, "rope_theta"))}
    percent = given.get("partial_rotary_factor")
    if partial:
        percent = out["rotary_percent"] = need(given, "partial_rotary_factor")
    elif percent not in (None, 1.0):
        # Transformers ignores it in these families, or cannot scale with it.
        raise ValueError(
            f"{_WHERE}: partial_rotary_factor={percent} is not supported; it must be 1.0"
        )
    scaling = _scaling(hf, given, int(channels * (percent or 1.0)))
    if scaling is None:
        return out
    if given["rope_type"] == "dynamic":
        # Transformers takes longer sequences than this; ours would be refused.
        out["max_sequence_length"] = int(scaling["factor"] * scaling[_ORIGINAL])
    return out | {"rope_scaling": scaling}


_WHERE = "config.json: RoPE (rope_scaling, rope_parameters)"


def _scaling(hf: Mapping[str, Any], given: Mapping[str, Any], dim: int) -> dict[str, Any] | None:
    """Return our rope_scaling of `rope_parameters` for heads of which `dim` channels turn."""
    kind = given["rope_type"]
    if kind not in ("default", *_ROPE_KINDS):
        raise ValueError(
            f"{_WHERE}: rope_type={kind!r} is not supported; it must be default,"
            f" {', '.join(_ROPE_KINDS)}"
        )
    target = rope.ROOM + _ROPE_KINDS.get(kind, "")
    names = () if kind == "default" else tuple(signature(target).parameters)
    for name, value in given.items():
        if name not in (*_EVERY_ROPE, *names) and value is not None:
            raise ValueError(
                f"{_WHERE}: {name}={value!r} would not be read with rope_type={kind!r}"
            )
    if kind == "default":
        return None
    fields = {name: given[name] for name in names if given.get(name) is not None}
    if kind == "dynamic":
        fields[_ORIGINAL] = need(hf, "max_position_embeddings")
    if kind == "longrope" and not fields.keys() & {"factor", "attention_factor"}:
        fields["factor"] = need(hf, "max_position_embeddings") / need(fields, _ORIGINAL)
    scaling = {"_target_": target, **fields}
    for name, value, allowed in rope.faults(scaling, dim):
        raise ValueError(f"{_WHERE}: {name}={value} {allowed}")
    return scaling


def _scaling_fields(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for our rope_scaling, all with their values."""
    stated = {k: v for k, v in completed(scaling).items() if v is not None and k != "_target_"}
    names = {rope.ROOM + ours: theirs for theirs, ours in _ROPE_KINDS.items()}
    kind = names[scaling["_target_"]]
    fields: dict[str, Any] = {}
    if kind == "dynamic":
        fields["max_position_embeddings"] = stated.pop(_ORIGINAL)
    return fields | {"rope_scaling": {"rope_type": kind, **stated}}


def layer_types(hf: Mapping[str, Any]) -> list[bool]:
    """Return which layers have a window.

    Raises ValueError for kinds of layers that we do not have, and for another number of layers.
    """
    kinds, count = need(hf, "layer_types"), need(hf, "num_hidden_layers")
    names = ["full_attention", "sliding_attention"]
    if len(kinds) != count or any(kind not in names for kind in kinds):
        raise ValueError(
            f"config.json: layer_types={kinds} is not supported; it must be {' or '.join(names)}"
            f" for each of the {count} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def sliding_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields for Qwen's windows; Transformers lists the layers that have one.

    hf: what `read` gave. Raises ValueError for a window without a size.
    """
    size, windowed = hf.get("sliding_window"), layer_types(hf)
    if size is None and any(windowed):
        raise ValueError("config.json: layer_types has sliding_attention without a sliding_window")
    return windows(size, windowed)


def window_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return Qwen's fields for our windows; older readers know max_window_layers alone."""
    config = model["transformer"]
    windowed = layer_windows(config)
    if not any(windowed):
        return {"use_sliding_window": False}
    kinds = ["sliding_attention" if flag else "full_attention" for flag in windowed]
    return {
        "use_sliding_window": True,
        "sliding_window": config["window_size"][0] + 1,
        "max_window_layers": windowed.index(True),
        "layer_types": kinds,
    }


def complete(
    hf: Mapping[str, Any],
    spec: Mapping[str, Tensor],
    *,
    decoder: str = "",
    norm: str = "input_layernorm",
) -> dict[str, Any]:
    """Add the tie to config.json, and what differs in the names that folders have.

    A base model's have no `model.` and no lm_head; a tied model may hold lm_head alone.
    decoder, norm: how a family names its decoder within the base model, and a layer's first norm.
    """
    tied = bool(standard(hf)["tie_word_embeddings"])
    layer, causal = f"layers.0.{norm}.weight", f"model.{decoder}"
    is_base = f"{decoder}{layer}" in spec and f"{causal}{layer}" not in spec
    prefix = decoder if is_base else causal
    embedding, head = f"{prefix}embed_tokens.weight", "lm_head.weight"
    if tied and embedding not in spec and head in spec:
        embedding = head
    has_head = head in spec or not is_base
    names = {PREFIX: prefix, EMBEDDING: embedding, HEAD: head if has_head else None}
    return {**hf, "tie_word_embeddings": tied, **names}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a decoder in Llama's names, with whatever biases the config has."""
    model = whole(model)
    config = model["transformer"]
    vocabulary = PadVocabulary(model["padded_vocab_size"], standard(hf)["vocab_size"])
    qkv = QKV(config["num_attention_heads"], config["num_query_groups"], config["kv_channels"])
    prefix, head = hf.get(PREFIX, "model."), hf.get(HEAD, "lm_head.weight")
    embedding = hf.get(EMBEDDING, f"{prefix}embed_tokens.weight")
    layer, theirs = "decoder.layers.*.", f"{prefix}layers.*."
    norm_kinds = ["weight"] if config["normalization"] == "RMSNorm" else ["weight", "bias"]
    qkv_kinds = ["weight", "bias"] if config["add_qkv_bias"] else ["weight"]
    kinds = ["weight", "bias"] if config["add_bias_linear"] else ["weight"]
    # 1. The embedding, then the norms, under mcore's names of norms fused with the next linear.
    rows = [Row("embedding.word_embeddings.weight", (embedding,), vocabulary)]
    for kind in norm_kinds:
        rows += [
            Row(
                f"{layer}self_attention.linear_qkv.layer_norm_{kind}",
                (f"{theirs}input_layernorm.{kind}",),
            ),
            Row(
                f"{layer}mlp.linear_fc1.layer_norm_{kind}",
                (f"{theirs}post_attention_layernorm.{kind}",),
            ),
        ]
        if config["qk_layernorm"]:
            rows += [
                Row(
                    f"{layer}self_attention.{x}_layernorm.{kind}",
                    (f"{theirs}self_attn.{x}_norm.{kind}",),
                )
                for x in "qk"
            ]
    # 2. The linears of attention and MLP, with the biases that the family has.
    for kind in qkv_kinds:
        names = tuple(f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        rows.append(Row(f"{layer}self_attention.linear_qkv.{kind}", names, qkv))
    for kind in kinds:
        up = f"{theirs}mlp.up_proj.{kind}"
        gate = f"{theirs}mlp.gate_proj.{kind}"
        rows += [
            Row(f"{layer}self_attention.linear_proj.{kind}", (f"{theirs}self_attn.o_proj.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.{kind}", (gate, up), GatedMLP())
            if config["gated_linear_unit"]
            else Row(f"{layer}mlp.linear_fc1.{kind}", (up,), Rename()),
            Row(f"{layer}mlp.linear_fc2.{kind}", (f"{theirs}mlp.down_proj.{kind}",)),
        ]
    # 3. The end.
    rows += [
        Row(f"decoder.final_layernorm.{kind}", (f"{prefix}norm.{kind}",)) for kind in norm_kinds
    ]
    rows += output_rows(model, head, embedding, vocabulary)
    # Transformers saved these buffers before version 4.32.
    rows.append(Row(None, (f"{theirs}self_attn.rotary_emb.inv_freq",), Drop()))
    return expand(rows, config["num_layers"])


def output_rows(
    model: Mapping[str, Any], head: str | None, embedding: str, vocabulary: PadVocabulary
) -> list[Row]:
    """Return the row of the output layer, whose name `head` is null where the folder has none.

    A tied one is only a copy of the embedding, which may be there; an embedder has none.
    """
    if not head:
        return []
    if "pooling" in model:
        return [Row(None, (head,), Drop())]
    if not model["share_embeddings_and_output_weights"]:
        return [Row("output_layer.weight", (head,), vocabulary)]
    return [Row(None, (head,), Tied(embedding))] if head != embedding else []


def activation(hf: Mapping[str, Any], key: str = "hidden_act") -> None:
    """Refuse an activation other than SwiGLU's."""
    only(hf, key, "silu", "swish")
