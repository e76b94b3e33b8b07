"""Whisper's encoder, from a folder of the encoder alone or of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import GELU, is_whisper, known, need, only, transformer, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, Drop, KeylessBias, Reshape, Row, expand

PREFIX = "tower_prefix"
"""A key that no config.json has; `complete` finds its value in the names."""
_EPSILON = 1e-5
"""nn.LayerNorm's own: Whisper's config.json does not name it."""
_KINDS = ("weight", "bias")
_MASKS = ("prob", "length", "min_masks")
_FIELDS = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins"),
    *("max_source_positions", "activation_function", PREFIX),
    # Of the decoder and other heads. Transformers' encoder keeps scale_embedding and reads it not.
    *("vocab_size", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"),
    *("max_target_positions", "scale_embedding", "tie_word_embeddings", "median_filter_width"),
    *("is_encoder_decoder", "num_hidden_layers", "use_weighted_layer_sum", "classifier_proj_size"),
    # Of training.
    *("encoder_layerdrop", "decoder_layerdrop", "apply_spec_augment"),
    *(f"mask_{kind}_{what}" for kind in ("time", "feature") for what in _MASKS),
)


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    hf = standard(hf)
    only(hf, "activation_function", "gelu")
    heads = need(hf, "encoder_attention_heads")
    return {
        "_target_": "nvmm.modules.encoders.audio.AudioEncoder",
        "_partial_": True,
        "transformer": transformer(
            num_layers=need(hf, "encoder_layers"),
            hidden_size=need(hf, "d_model"),
            num_attention_heads=heads,
            kv_channels=need(hf, "d_model") // heads,
            ffn_hidden_size=need(hf, "encoder_ffn_dim"),
            normalization="LayerNorm",
            layernorm_epsilon=_EPSILON,
            activation_func=GELU,
            add_bias_linear=True,
            add_qkv_bias=True,
            init_method_std=hf["init_std"],
        ),
        "num_mel_bins": hf["num_mel_bins"],
        "max_source_positions": hf["max_source_positions"],
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json of the encoder alone, Transformers' WhisperEncoder."""
    if not is_whisper(model):
        raise ValueError("--format whisper is Whisper's encoder, not this model")
    full = whole(model)
    config = full["transformer"]
    hf = {
        "architectures": ["WhisperEncoder"],
        "model_type": "whisper",
        "d_model": config["hidden_size"],
        "encoder_layers": config["num_layers"],
        "encoder_attention_heads": config["num_attention_heads"],
        "encoder_ffn_dim": config["ffn_hidden_size"],
        "num_mel_bins": full["num_mel_bins"],
        "max_source_positions": full["max_source_positions"],
        "activation_function": "gelu",
        "init_std": config.get("init_method_std", 0.02),
        "scale_embedding": False,
    }
    decoder.expressible(model, to_model(hf), "whisper")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the prefix of the encoder's names to config.json: none, encoder or model.encoder."""
    suffix = "conv1.weight"
    prefix = next((n.removesuffix(suffix) for n in spec if n.endswith(suffix)), "")
    return {**hf, PREFIX: prefix}


def unsaid(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of our config that a folder leaves open: what follows the last layer."""
    return ("pool",)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder; the decoder of a whole Whisper is left out."""
    full = whole(model)
    config = full["transformer"]
    width, heads, head_dim = (
        config[name] for name in ("hidden_size", "num_attention_heads", "kv_channels")
    )
    prefix = hf.get(PREFIX, "")
    layer, theirs = "decoder.layers.*.", f"{prefix}layers.*."
    attention = f"{layer}self_attention."
    inputs = {"conv1": full["num_mel_bins"], "conv2": width}
    # 1. Positions and attention, whose k has no bias.
    rows = [
        Row("position_embeddings.weight", (f"{prefix}embed_positions.weight",)),
        Row(
            f"{attention}linear_qkv.weight",
            tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"),
            QKV(heads, heads, head_dim),
        ),
        Row(
            f"{attention}linear_qkv.bias",
            tuple(f"{theirs}self_attn.{x}_proj.bias" for x in "qv"),
            KeylessBias(heads, head_dim),
        ),
    ]
    # 2. The convolutions: ours have the three taps of a channel side by side.
    for name, size in inputs.items():
        kernel = Reshape((width, size * 3), (width, size, 3))
        rows += [
            Row(f"{name}.weight", (f"{prefix}{name}.weight",), kernel),
            Row(f"{name}.bias", (f"{prefix}{name}.bias",)),
        ]
    # 3. Everything that has a weight and a bias.
    for kind in _KINDS:
        norm = f"{attention}linear_qkv.layer_norm_{kind}"
        rows += [
            Row(norm, (f"{theirs}self_attn_layer_norm.{kind}",)),
            Row(f"{attention}linear_proj.{kind}", (f"{theirs}self_attn.out_proj.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.layer_norm_{kind}", (f"{theirs}final_layer_norm.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.{kind}", (f"{theirs}fc1.{kind}",)),
            Row(f"{layer}mlp.linear_fc2.{kind}", (f"{theirs}fc2.{kind}",)),
            Row(f"decoder.final_layernorm.{kind}", (f"{prefix}layer_norm.{kind}",)),
        ]
    return [*expand(rows, config["num_layers"]), *_text_decoder(hf, prefix)]


def _text_decoder(hf: Mapping[str, Any], prefix: str) -> list[Row]:
    """Return rows that drop the decoder, which an encoder of audio has no use for."""
    if not prefix.endswith("encoder."):
        return []
    start = prefix.removesuffix("encoder.") + "decoder."
    layer = f"{start}layers.*."
    parts = [
        f"{kind}.{x}_proj" for kind in ("self_attn", "encoder_attn") for x in ("q", "v", "out")
    ]
    parts += ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "fc1", "fc2"]
    names = [f"{layer}{part}.{kind}" for part in parts for kind in _KINDS]
    names += [f"{layer}{kind}.k_proj.weight" for kind in ("self_attn", "encoder_attn")]
    names += [f"{start}layer_norm.{kind}" for kind in _KINDS]
    names += [f"{start}embed_tokens.weight", f"{start}embed_positions.weight", "proj_out.weight"]
    rows = [Row(None, (name,), Drop()) for name in names]
    return expand(rows, standard(hf)["decoder_layers"])
