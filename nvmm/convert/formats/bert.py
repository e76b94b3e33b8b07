"""BERT's encoder, from a BertModel's folder or one with heads, alone or in sentence-transformers.

The pooler and the heads do not act on the vectors: they are left out on import, which lists them.
The pooler, which BertModel has, is written as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.config.signatures import value_of
from nvmm.convert.formats import decoder
from nvmm.convert.formats.clip import activation, activation_name
from nvmm.convert.formats.config import known, need, only, padded, transformer, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, Drop, PadVocabulary, Row, Unused, expand

TARGET = "nvmm.models.bidirectional.BidirectionalEncoder"
MODULES = "sentence_transformers_modules"
"""A key that no config.json has: what `sentence_encoders.read` finds beside it."""
PREFIX, OLD_NORMS = "encoder_prefix", "old_names_of_norms"
"""Keys that no config.json has; `complete` finds their values in the names."""
POOLINGS = {"cls": "CLS", "mean": "Mean", "lasttoken": "EOS"}
"""sentence-transformers' names of the poolings -> classes of nvmm.modules.pooling."""
_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size"),
    *("layer_norm_eps", "position_embedding_type", MODULES, PREFIX, OLD_NORMS),
    # Dropout is the experiment's; a classifier's head is not read.
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("gradient_checkpointing", "tie_word_embeddings"),
)
_HEADS = (
    *("predictions.bias", "predictions.decoder.weight", "predictions.decoder.bias"),
    *(f"predictions.transform.dense.{kind}" for kind in ("weight", "bias")),
    *(f"predictions.transform.LayerNorm.{k}" for k in ("weight", "bias", "gamma", "beta")),
    *(f"seq_relationship.{kind}" for kind in ("weight", "bias")),
)


def unsaid(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of our config a folder without modules.json does not tell.

    `to_model` gives those of Dragon's BertModels then.
    """
    return () if hf.get(MODULES) else ("pooling", "normalize")


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json, and sentence-transformers' files beside it, into our model config."""
    known(hf, *_FIELDS)
    modules = hf.get(MODULES) or {"pooling": "cls", "normalize": False}
    hf = standard(hf)
    only(hf, "position_embedding_type", "absolute")
    heads, size = need(hf, "num_attention_heads"), need(hf, "hidden_size")
    return {
        "_target_": TARGET,
        "_partial_": True,
        "transformer": transformer(
            num_layers=need(hf, "num_hidden_layers"),
            hidden_size=size,
            num_attention_heads=heads,
            kv_channels=size // heads,
            ffn_hidden_size=need(hf, "intermediate_size"),
            normalization="LayerNorm",
            layernorm_epsilon=need(hf, "layer_norm_eps"),
            activation_func=activation(hf),
            add_bias_linear=True,
            init_method_std=hf["initializer_range"],
        ),
        "vocab_size": need(hf, "vocab_size"),
        "padded_vocab_size": padded(need(hf, "vocab_size")),
        "max_sequence_length": need(hf, "max_position_embeddings"),
        "num_token_types": need(hf, "type_vocab_size"),
        "pooling": {
            "_target_": f"nvmm.modules.pooling.{POOLINGS[modules['pooling']]}",
            "_partial_": True,
        },
        "normalize": modules["normalize"],
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for a model that BERT cannot express."""
    if model.get("_target_") != TARGET:
        raise ValueError("--format bert is a post-norm encoder with a pooling, not this model")
    config = whole(model)["transformer"]
    hf = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": model["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["ffn_hidden_size"],
        "hidden_act": activation_name(config),
        "max_position_embeddings": setting(model, "max_sequence_length"),
        "type_vocab_size": setting(model, "num_token_types"),
        "layer_norm_eps": config["layernorm_epsilon"],
        "hidden_dropout_prob": config.get("hidden_dropout", 0.1),
        "attention_probs_dropout_prob": config.get("attention_dropout", 0.1),
        "initializer_range": config.get("init_method_std", 0.02),
    }
    modules = {"pooling": pooling_name(model), "normalize": setting(model, "normalize")}
    decoder.expressible(model, to_model({**hf, MODULES: modules}), "bert")
    return hf


def setting(model: Mapping[str, Any], name: str) -> Any:
    """Return a value of our model config, its constructor's default where it says nothing."""
    return value_of(model, name)


def pooling_name(model: Mapping[str, Any]) -> str:
    """Return sentence-transformers' name of a model's pooling; ValueError where it has none."""
    kind = model["pooling"]["_target_"].rpartition(".")[2]
    for name, ours in POOLINGS.items():
        if ours == kind:
            return name
    choices = ", ".join(POOLINGS.values())
    raise ValueError(f"--format bert cannot express model.pooling={kind}; it can {choices}")


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add to config.json the prefix of the names, none or `bert.`, and whether norms have old ones.

    TensorFlow's norms had gamma and beta, as bert-base-uncased's folder has still.
    """
    suffix = "embeddings.word_embeddings.weight"
    prefix = next((n.removesuffix(suffix) for n in spec if n.endswith(suffix)), "")
    old = f"{prefix}embeddings.LayerNorm.gamma" in spec
    return {**hf, PREFIX: prefix, OLD_NORMS: old}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder, and of what its vectors do not need."""
    config = whole(model)["transformer"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    prefix = hf.get(PREFIX, "")
    norms = {"weight": "gamma", "bias": "beta"} if hf.get(OLD_NORMS) else {}
    size = hf.get("vocab_size", model["vocab_size"])
    vocabulary = PadVocabulary(model["padded_vocab_size"], size)
    ours, theirs, tables = "decoder.layers.*.", f"{prefix}encoder.layer.*.", f"{prefix}embeddings."
    # 1. The embedding.
    rows = [
        Row("embedding.word_embeddings.weight", (f"{tables}word_embeddings.weight",), vocabulary),
        Row("embedding.position_embeddings.weight", (f"{tables}position_embeddings.weight",)),
        # A buffer that Transformers saved before version 4.31.
        Row(None, (f"{tables}position_ids",), Drop()),
    ]
    if setting(model, "num_token_types"):
        types = f"{tables}token_type_embeddings.weight"
        rows.append(Row("embedding.tokentype_embeddings.weight", (types,)))
    # 2. The layers: linears and norms have a weight and a bias.
    for kind, shape in (("weight", (width, width)), ("bias", (width,))):
        norm = norms.get(kind, kind)
        qkv = tuple(f"{theirs}attention.self.{x}.{kind}" for x in ("query", "key", "value"))
        mapping = QKV(heads, heads, width // heads)
        names = {
            "self_attention.linear_proj": "attention.output.dense",
            "mlp.linear_fc1": "intermediate.dense",
            "mlp.linear_fc2": "output.dense",
        }
        rows += [
            Row("embedding.layernorm." + kind, (f"{tables}LayerNorm.{norm}",)),
            Row(f"{ours}self_attention.linear_qkv.{kind}", qkv, mapping),
            *(Row(f"{ours}{a}.{kind}", (f"{theirs}{b}.{kind}",)) for a, b in names.items()),
            Row(
                f"{ours}post_self_attn_layernorm.{kind}",
                (f"{theirs}attention.output.LayerNorm.{norm}",),
            ),
            Row(f"{ours}post_mlp_layernorm.{kind}", (f"{theirs}output.LayerNorm.{norm}",)),
            # 3. What stands behind the encoder.
            Row(None, (f"{prefix}pooler.dense.{kind}",), Unused(shape, 0.0)),
        ]
    rows += [Row(None, (f"cls.{name}",), Drop()) for name in _HEADS]
    return expand(rows, config["num_layers"])
