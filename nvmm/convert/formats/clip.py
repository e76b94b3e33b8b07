"""CLIP's vision encoder, from a folder of the encoder alone or of the whole model.

Its last norm acts on the pooled class token, which our encoder does not compute: it is left out on
import and written as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import (
    GELU,
    GELU_TANH,
    QUICK_GELU,
    known,
    need,
    only,
    transformer,
    whole,
)
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import QKV, Drop, Rename, Reshape, Row, Unused, expand

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
PREFIX = "tower_prefix"
"""A key that no config.json has; `complete` finds its value in the names."""
FEATURE_LAYER = "vision_feature_layer"
"""LLaVA's name of the layer whose output is taken: -1 (where it is not given) or -2, the one before
the last. The layer behind it is left out."""
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "quick_gelu": QUICK_GELU,
    "gelu": GELU,
    "gelu_pytorch_tanh": GELU_TANH,
}
_PARTS = ("weight", "bias")
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps"),
    # Of pooled features, which our encoder does not compute, and of LLaVA's folders.
    *("projection_dim", "vision_use_head", "vocab_size"),
    *(PREFIX, FEATURE_LAYER),
)
_WHOLE = (
    *("vision_config", "vision_config_dict", PREFIX, FEATURE_LAYER),
    # Of the text encoder and of pooled features.
    *("text_config", "text_config_dict", "projection_dim", "logit_scale_init_value"),
)


def activation(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return our name of an encoder's hidden_act. Raises ValueError for one that we do not have."""
    name = need(hf, "hidden_act")
    if name not in _ACTIVATIONS:
        choices = ", ".join(_ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act={name!r} is not supported; use one of {choices}")
    return _ACTIVATIONS[name]


def activation_name(config: Mapping[str, Any]) -> str:
    """Return their name of our TransformerConfig's activation."""
    for name, target in _ACTIVATIONS.items():
        if target == config["activation_func"]:
            return name
    raise ValueError(f"activation_func={config['activation_func']} has no name in a config.json")


def vision_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the vision encoder's part of a config.json, with its class's defaults.

    Raises ValueError for fields that nobody reads, in a whole model's config and in the part.
    """
    if need(hf, "model_type").endswith("_vision_model"):
        known(hf, *_FIELDS)
        return standard(hf)
    known(hf, *_WHOLE)
    for name in ("vision_config", "vision_config_dict"):
        known(hf.get(name) or {}, *_FIELDS)
    part: Mapping[str, Any] = standard(hf)["vision_config"]
    return part


def encoder(hf: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return our config of a pre-norm LayerNorm ViT with biases.

    hf: what `vision_config` gave. more: fields in which the encoders differ.
    """
    only(hf, "num_channels", 3)
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
            normalization="LayerNorm",
            layernorm_epsilon=need(hf, "layer_norm_eps"),
            activation_func=activation(hf),
            add_bias_linear=True,
            add_qkv_bias=True,
            init_method_std=hf.get("initializer_range", 0.02),
        ),
        "image_size": need(hf, "image_size"),
        "patch_size": need(hf, "patch_size"),
        **more,
    }


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config: the layers up to FEATURE_LAYER, without the norm."""
    model = encoder(
        vision_config(hf),
        patch_bias=False,
        pre_layernorm=True,
        image_mean=MEAN,
        image_std=STD,
    )
    model["transformer"]["num_layers"] += 1 + only(hf, FEATURE_LAYER, -1, -2)
    return model


def encoder_fields(model: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return the fields that both encoders' config.json have."""
    if "patch_size" not in model:
        raise ValueError(f"--format {family} is an image encoder; name it with --part vision")
    full = whole(model)
    config = full["transformer"]
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_channels": 3,
        "image_size": full["image_size"],
        "patch_size": full["patch_size"],
        "hidden_act": activation_name(config),
        "layer_norm_eps": config["layernorm_epsilon"],
        "attention_dropout": 0.0,
        "initializer_range": config.get("init_method_std", 0.02),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json of the encoder alone."""
    hf = encoder_fields(model, "clip") | {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
    }
    decoder.expressible(model, to_model(hf), "clip")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the prefix of the encoder's names to config.json: none, or vision_model."""
    suffix = "embeddings.patch_embedding.weight"
    prefix = next((n.removesuffix(suffix) for n in spec if n.endswith(suffix)), "")
    return {**hf, PREFIX: prefix}


def layers(model: Mapping[str, Any], prefix: str) -> list[Row]:
    """Return the rows of positions, patches and layers of either encoder."""
    full = whole(model)
    config = full["transformer"]
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    layer, theirs = "decoder.layers.*.", f"{prefix}encoder.layers.*."
    attention, theirs_attention = f"{layer}self_attention.", f"{theirs}self_attn."
    rows = [
        Row("conv1.weight", (f"{prefix}embeddings.patch_embedding.weight",)),
        Row("position_embeddings.weight", (f"{prefix}embeddings.position_embedding.weight",)),
        # A buffer that Transformers saved before version 4.31.
        Row(None, (f"{prefix}embeddings.position_ids",), Drop()),
    ]
    for kind in _PARTS:
        names = tuple(f"{theirs_attention}{x}_proj.{kind}" for x in "qkv")
        rows += [
            Row(f"{attention}linear_qkv.{kind}", names, QKV(heads, heads, head_dim)),
            Row(f"{attention}linear_qkv.layer_norm_{kind}", (f"{theirs}layer_norm1.{kind}",)),
            Row(
                f"{attention}linear_proj.{kind}", (f"{theirs_attention}out_proj.{kind}",), Rename()
            ),
            Row(f"{layer}mlp.linear_fc1.layer_norm_{kind}", (f"{theirs}layer_norm2.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.{kind}", (f"{theirs}mlp.fc1.{kind}",)),
            Row(f"{layer}mlp.linear_fc2.{kind}", (f"{theirs}mlp.fc2.{kind}",)),
        ]
    return expand(rows, config["num_layers"])


def text_encoder_rows(hf: Mapping[str, Any]) -> list[Row]:
    """Return rows that drop the text encoder, which an encoder of images has no use for."""
    text = standard(hf).get("text_config")
    if text is None:
        return []
    layer, count = "text_model.encoder.layers.*.", need(text, "num_hidden_layers")
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    parts = (*linears, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    names = [f"{layer}{part}.{kind}" for part in parts for kind in _PARTS]
    names += [f"text_model.final_layer_norm.{kind}" for kind in _PARTS]
    names += [f"text_model.head.{kind}" for kind in _PARTS]
    names += [f"text_model.embeddings.{x}_embedding.weight" for x in ("token", "position")]
    names += ["text_model.embeddings.position_ids", "logit_scale", "logit_bias"]
    names += ["text_projection.weight", "visual_projection.weight"]
    return expand([Row(None, (name,), Drop()) for name in names], count)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder; everything else of a whole CLIP is left out."""
    prefix = hf.get(PREFIX, "vision_model.")
    width = model["transformer"]["hidden_size"]
    token = Reshape((1, 1, width), (width,))
    rows = [Row("class_token", (f"{prefix}embeddings.class_embedding",), token)]
    for kind, value in (("weight", 1.0), ("bias", 0.0)):
        rows += [
            Row(f"ln_pre.{kind}", (f"{prefix}pre_layrnorm.{kind}",)),
            Row(None, (f"{prefix}post_layernorm.{kind}",), Unused((width,), value)),
        ]
    # Folders of CLIPVisionModelWithProjection have it too.
    others = text_encoder_rows(hf) or [Row(None, ("visual_projection.weight",), Drop())]
    return [*rows, *layers(model, prefix), *behind(model, hf, prefix), *others]


def behind(model: Mapping[str, Any], hf: Mapping[str, Any], prefix: str) -> list[Row]:
    """Return rows that drop the layer behind the one whose output is taken."""
    if hf.get(FEATURE_LAYER) in (None, -1):
        return []
    linears = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    layer = f"{prefix}encoder.layers.{model['transformer']['num_layers']}"
    return [
        Row(None, (f"{layer}.{part}.{kind}",), Drop())
        for part in (*linears, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        for kind in _PARTS
    ]
