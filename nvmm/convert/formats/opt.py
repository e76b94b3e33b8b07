"""OPT: learned positions, ReLU, LayerNorm before each part, biases, a tied output layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import RELU, known, need, only, padded, transformer, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, PadVocabulary, Row, expand

complete = functools.partial(decoder.complete, decoder="decoder.", norm="self_attn_layer_norm")

_OFFSET = 2
"""Rows of the table of positions that lie in front of position 0's; Transformers reads the second
of them at padding, which nobody sees."""
_EPSILON = 1e-5
"""nn.LayerNorm's own: OPT's config.json does not name it."""
_ONE_WAY = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "activation_function": "relu",
}
"""Fields with the one value that our decoder has: opt-350m's and Galactica's are others."""
_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
    *("max_position_embeddings", "word_embed_proj_dim", "tie_word_embeddings", *_ONE_WAY),
    *(decoder.PREFIX, decoder.EMBEDDING, decoder.HEAD),
    "layerdrop",  # of training
)


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    hf = standard(hf)
    for name, value in _ONE_WAY.items():
        only(hf, name, value)
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    only(hf, "word_embed_proj_dim", width)
    return {
        "_target_": "nvmm.models.language.LanguageModel",
        "_partial_": True,
        "transformer": transformer(
            num_layers=need(hf, "num_hidden_layers"),
            hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=heads,
            kv_channels=width // heads,
            ffn_hidden_size=need(hf, "ffn_dim"),
            normalization="LayerNorm",
            layernorm_epsilon=_EPSILON,
            gated_linear_unit=False,
            activation_func=RELU,
            add_bias_linear=True,
            add_qkv_bias=True,
            init_method_std=hf["init_std"],
        ),
        "vocab_size": need(hf, "vocab_size"),
        "padded_vocab_size": padded(need(hf, "vocab_size")),
        "position_embedding_type": "learned_absolute",
        "position_offset": _OFFSET,
        "share_embeddings_and_output_weights": bool(hf["tie_word_embeddings"]),
        "max_sequence_length": need(hf, "max_position_embeddings"),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    full = whole(model)
    if "vocab_size" not in full:
        raise ValueError("--format opt is a language model; name its part with --part")
    config = full["transformer"]
    hf = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": full["vocab_size"],
        "hidden_size": config["hidden_size"],
        "word_embed_proj_dim": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_dim": config["ffn_hidden_size"],
        "max_position_embeddings": full.get("max_sequence_length", 4096),
        "tie_word_embeddings": full["share_embeddings_and_output_weights"],
        "init_std": config.get("init_method_std", 0.02),
        "use_cache": True,
        **_ONE_WAY,
    }
    decoder.expressible(model, to_model(hf), "opt")
    return hf


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the decoder."""
    full = whole(model)
    config = full["transformer"]
    prefix = hf.get(decoder.PREFIX, "model.decoder.")
    embedding = hf.get(decoder.EMBEDDING, f"{prefix}embed_tokens.weight")
    vocabulary = PadVocabulary(full["padded_vocab_size"], standard(hf)["vocab_size"])
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    ours, theirs = "decoder.layers.*.", f"{prefix}layers.*."
    attention = f"{ours}self_attention."
    rows = [
        Row("embedding.word_embeddings.weight", (embedding,), vocabulary),
        Row("embedding.position_embeddings.weight", (f"{prefix}embed_positions.weight",)),
    ]
    for kind in ("weight", "bias"):
        names = tuple(f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        norms = {
            f"{attention}linear_qkv.layer_norm_{kind}": "self_attn_layer_norm",
            f"{ours}mlp.linear_fc1.layer_norm_{kind}": "final_layer_norm",
        }
        linears = {
            f"{attention}linear_proj.{kind}": "self_attn.out_proj",
            f"{ours}mlp.linear_fc1.{kind}": "fc1",
            f"{ours}mlp.linear_fc2.{kind}": "fc2",
        }
        rows.append(Row(f"{attention}linear_qkv.{kind}", names, QKV(heads, heads, head_dim)))
        rows += [Row(x, (f"{theirs}{y}.{kind}",)) for x, y in {**norms, **linears}.items()]
        rows.append(Row(f"decoder.final_layernorm.{kind}", (f"{prefix}final_layer_norm.{kind}",)))
    head = hf.get(decoder.HEAD, "lm_head.weight")
    rows += decoder.output_rows(full, head, embedding, vocabulary)
    return expand(rows, config["num_layers"])
