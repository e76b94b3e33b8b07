"""The fields of configs and rows of tables that the decoder-only families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
from nvmm.convert.mapping import QKV, Drop, GatedMLP, PadVocabulary, Rename, Row, Tied, expand

FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("tie_word_embeddings", "max_position_embeddings", "initializer_range"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
)
"""Fields of config.json that `to_language` reads."""
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""What each kind of RoPE reads beside its base."""
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of Llama 3's RoPE scaling that megatron-core has built in."""


def to_language(
    hf: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    longest: int,
    rotary_percent: float = 1.0,
    fields: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return our config of a SwiGLU, RMSNorm decoder without biases.

    Args:
        changes: of its TransformerConfig.
        longest: Transformers' default of max_position_embeddings.
        rotary_percent: its default of partial_rotary_factor, which is 1 where the family turns
            whole heads: then it may not be given otherwise.
        fields: what the family reads beside FIELDS.

    Raises ValueError for fields that nobody reads.
    """
    known(hf, *FIELDS, *fields)
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
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "gated_linear_unit": True,
        "activation_func": SILU,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "init_method_std": hf.get("initializer_range", 0.02),
    }
    return {
        "_target_": "nvmm.models.language.LanguageModel",
        "_partial_": True,
        "transformer": transformer(**(config | dict(changes or {}))),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded(vocab_size),
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
        "max_sequence_length": hf.get("max_position_embeddings", longest),
        **_rope(hf, rotary_percent),
    }


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
    if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
        hf["head_dim"] = config["kv_channels"]
    if model["rope_scaling"]:
        factor = model["rope_scaling_factor"]
        hf["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    elif model["seq_len_interpolation_factor"] is not None:
        factor = model["seq_len_interpolation_factor"]
        hf["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return hf


def expressible(model: Mapping[str, Any], back: Mapping[str, Any], family: str) -> None:
    """Raise ValueError naming the keys of `model` that `back`, its way through a format, lacks."""
    lines = mismatches(model, back, "this model", f"--format {family}")
    if lines:
        raise ValueError(f"--format {family} cannot express this model:\n  " + "\n  ".join(lines))


def _rope(hf: Mapping[str, Any], rotary_percent: float) -> dict[str, Any]:
    """Read RoPE as Transformers 5 does: `rope_scaling` alone where it is given.

    What those parameters lack, the outer rope_theta and partial_rotary_factor say.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    parameters: Mapping[str, Any] = hf.get(key) or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ROPE_FIELDS:
        raise ValueError(
            f"config.json: {key}.rope_type={rope_type!r} is not supported; it must be"
            " 'default', 'linear' or 'llama3'"
        )
    # Only Llama 3's kind reads the original length; Transformers writes it for others too.
    read = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[rope_type])
    for name, value in parameters.items():
        if name not in (*read, "original_max_position_embeddings") and value is not None:
            raise ValueError(
                f"config.json: {key}.{name}={value!r} would not be read with"
                f" rope_type={rope_type!r}"
            )
    base = parameters.get("rope_theta", hf.get("rope_theta", 10000.0))
    percent = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    percent = rotary_percent if percent is None else percent
    if rotary_percent == 1.0 != percent:
        place = f"{key}." if "partial_rotary_factor" in parameters else ""
        raise ValueError(
            f"config.json: {place}partial_rotary_factor={percent} is not supported; it must be 1.0"
        )
    out: dict[str, Any] = {"rotary_base": integral(base)}
    if rotary_percent != 1.0:
        out["rotary_percent"] = percent
    if rope_type == "llama3":
        for name, value in _LLAMA3.items():
            if need(parameters, name) != value:
                raise ValueError(
                    f"config.json: {key}.{name}={parameters[name]} is not supported;"
                    f" megatron-core has {value} built in"
                )
        out |= {"rope_scaling": True, "rope_scaling_factor": need(parameters, "factor")}
    elif rope_type == "linear":
        out["seq_len_interpolation_factor"] = need(parameters, "factor")
    return out


def layer_types(hf: Mapping[str, Any], windowed: list[bool]) -> list[bool]:
    """Return which layers have a window: as `layer_types` says, `windowed` where it is absent.

    Raises ValueError for kinds of layers that we do not have, and for another number of layers.
    """
    kinds = hf.get("layer_types")
    if kinds is None:
        return windowed
    names = ["full_attention", "sliding_attention"]
    if len(kinds) != len(windowed) or any(kind not in names for kind in kinds):
        raise ValueError(
            f"config.json: layer_types={kinds} is not supported; it must be {' or '.join(names)}"
            f" for each of the {len(windowed)} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def sliding_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields for Qwen's windows, which begin at a layer or are listed one by one."""
    size = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    by_number = [size is not None and i >= first for i in range(need(hf, "num_hidden_layers"))]
    windowed = layer_types(hf, by_number)
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


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return config.json as it is: shapes tell nothing more here."""
    return dict(hf)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a decoder in Llama's names, with whatever biases the config has."""
    model = whole(model)
    config = model["transformer"]
    vocabulary = PadVocabulary(model["padded_vocab_size"], need(hf, "vocab_size"))
    qkv = QKV(config["num_attention_heads"], config["num_query_groups"], config["kv_channels"])
    layer, theirs = "decoder.layers.*.", "model.layers.*."
    norm_kinds = ["weight"] if config["normalization"] == "RMSNorm" else ["weight", "bias"]
    qkv_kinds = ["weight", "bias"] if config["add_qkv_bias"] else ["weight"]
    kinds = ["weight", "bias"] if config["add_bias_linear"] else ["weight"]
    # 1. The embedding, then the norms, under mcore's names of norms fused with the next linear.
    rows = [Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
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
    # 3. The end: a tied output layer is only a copy of the embedding, which may be there.
    rows += [Row(f"decoder.final_layernorm.{kind}", (f"model.norm.{kind}",)) for kind in norm_kinds]
    if model["share_embeddings_and_output_weights"]:
        rows.append(Row(None, ("lm_head.weight",), Tied("model.embed_tokens.weight")))
    else:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), vocabulary))
    # Transformers saved these buffers before version 4.32.
    rows.append(Row(None, (f"{theirs}self_attn.rotary_emb.inv_freq",), Drop()))
    return expand(rows, config["num_layers"])


def activation(hf: Mapping[str, Any], key: str = "hidden_act") -> None:
    """Refuse an activation other than SwiGLU's."""
    only(hf, key, "silu", "swish")
