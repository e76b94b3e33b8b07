"""InternViT 300M and 6B in the names of Transformers (InternVLVisionModel), as InternVL has it.

The class token is dropped behind the last layer, which no norm follows. The norm of queries and
keys has an epsilon of 1e-6 built in, whatever that of the other norms is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import GELU, known, need, only, transformer, whole
from nvmm.convert.formats.internvit import NORMS
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, Reshape, Row, expand

MODEL_TYPE = "internvl_vision"
_QK_EPSILON = 1e-6
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "num_channels", "hidden_act", "norm_type", "layer_norm_eps"),
    *("attention_bias", "use_qk_norm", "use_mask_token", "use_mean_pooling"),
    *("use_absolute_position_embeddings", "layer_scale_init_value"),
    # Of training.
    *("hidden_dropout_prob", "projection_dropout"),
)


def _side(hf: Mapping[str, Any], key: str) -> int:
    """Return one number of a height and a width; ValueError where they differ."""
    sides = set(need(hf, key))
    if len(sides) != 1:
        raise ValueError(f"config.json: {key}={need(hf, key)} is not supported; it must be square")
    return int(sides.pop())


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    hf = standard({**hf, "model_type": MODEL_TYPE})
    only(hf, "hidden_act", "gelu")
    only(hf, "num_channels", 3)
    only(hf, "use_mask_token", False)
    # Without it a norm follows the last layer.
    only(hf, "use_mean_pooling", True)
    only(hf, "use_absolute_position_embeddings", True)
    if hf["use_qk_norm"]:
        only(hf, "layer_norm_eps", _QK_EPSILON)
    heads = need(hf, "num_attention_heads")
    return {
        "_target_": "nvmm.modules.encoders.vision.VisionTransformer",
        "_partial_": True,
        "transformer": transformer(
            num_layers=need(hf, "num_hidden_layers"),
            hidden_size=need(hf, "hidden_size"),
            num_attention_heads=heads,
            kv_channels=need(hf, "hidden_size") // heads,
            ffn_hidden_size=need(hf, "intermediate_size"),
            normalization=NORMS[only(hf, "norm_type", "layer_norm", "rms_norm")],
            layernorm_epsilon=hf["layer_norm_eps"],
            activation_func=GELU,
            add_bias_linear=True,
            add_qkv_bias=hf["attention_bias"],
            init_method_std=hf["initializer_range"],
        ),
        "image_size": _side(hf, "image_size"),
        "patch_size": _side(hf, "patch_size"),
        "qk_norm": "joint" if hf["use_qk_norm"] else None,
        "layer_scale": hf["layer_scale_init_value"],
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    if "patch_size" not in model:
        raise ValueError(f"--format {MODEL_TYPE} is an encoder; name it with --part vision")
    full = whole(model)
    config = full["transformer"]
    names = {ours: theirs for theirs, ours in NORMS.items()}
    hf = {
        "architectures": ["InternVLVisionModel"],
        "model_type": MODEL_TYPE,
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_channels": 3,
        "image_size": [full["image_size"]] * 2,
        "patch_size": [full["patch_size"]] * 2,
        "hidden_act": "gelu",
        "norm_type": names[config["normalization"]],
        "layer_norm_eps": config["layernorm_epsilon"],
        "attention_bias": config["add_qkv_bias"],
        "use_qk_norm": full["qk_norm"] == "joint",
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": full["layer_scale"],
        "initializer_range": config.get("init_method_std", 0.02),
    }
    if full["layer_scale"] is None:
        raise ValueError(f"--format {MODEL_TYPE} cannot express model.vision.layer_scale=None")
    decoder.expressible(model, to_model(hf), MODEL_TYPE)
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return config.json as it is."""
    return dict(hf)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder."""
    full = whole(model)
    config = full["transformer"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    layer, theirs = "decoder.layers.*.", "encoder.layer.*."
    attention = f"{layer}self_attention."
    patches = "embeddings.patch_embeddings.projection"
    # 1. The embeddings and LayerScale.
    rows = [
        Row("class_token", ("embeddings.cls_token",)),
        Row("conv1.weight", (f"{patches}.weight",)),
        Row("conv1.bias", (f"{patches}.bias",)),
        Row(
            "position_embeddings.weight",
            ("embeddings.position_embeddings",),
            Reshape((-1, width), (1, -1, width)),
        ),
        *(Row(f"{layer}ls{i}", (f"{theirs}lambda_{i}",)) for i in (1, 2)),
    ]
    # 2. The norms, under the names that mcore's have where they are fused with the next linear.
    for kind in ["weight"] if config["normalization"] == "RMSNorm" else ["weight", "bias"]:
        rows += [
            Row(f"{attention}linear_qkv.layer_norm_{kind}", (f"{theirs}layernorm_before.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.layer_norm_{kind}", (f"{theirs}layernorm_after.{kind}",)),
        ]
    # 3. Attention, then the MLP.
    qkv = QKV(heads, heads, config["kv_channels"])
    for kind in ["weight", "bias"] if config["add_qkv_bias"] else ["weight"]:
        names = tuple(f"{theirs}attention.{x}_proj.{kind}" for x in "qkv")
        rows.append(Row(f"{attention}linear_qkv.{kind}", names, qkv))
    if full["qk_norm"] == "joint":
        rows += [
            Row(f"{attention}{x}_norm.weight", (f"{theirs}attention.{x}_norm.weight",))
            for x in "qk"
        ]
    for kind in ("weight", "bias"):
        rows += [
            Row(f"{attention}linear_proj.{kind}", (f"{theirs}attention.projection_layer.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.{kind}", (f"{theirs}mlp.fc1.{kind}",)),
            Row(f"{layer}mlp.linear_fc2.{kind}", (f"{theirs}mlp.fc2.{kind}",)),
        ]
    return expand(rows, config["num_layers"])
