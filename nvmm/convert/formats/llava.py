"""LLaVA as Transformers has it (LlavaForConditionalGeneration): LLaVA-1.5, and VILA's two layers.

A tower, linear - GELU - linear, Llama, Mistral or Qwen2. On import the tower's layer behind the one
whose output is taken, and its last norm, are left out; an export takes the output of the last layer
that there is (vision_feature_layer=-1) and writes the norm as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import clip, decoder, llama, mistral, projector, qwen2, towers
from nvmm.convert.formats.config import known, need, only, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Row, prefixed

PLACEHOLDER = "image_token_index"
"""The field of the token that stands for an image."""
_FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
_FIELDS = (
    *("text_config", "vision_config", clip.FEATURE_LAYER, "vision_feature_select_strategy"),
    *("projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings"),
    # Of the row of tokens, which data.train.build says here.
    *("image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size"),
)


def _part(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a nested config as it is given, with its type; Transformers' own where it is not."""
    filled = standard({"model_type": need(hf, "model_type")})[name]
    return {"model_type": filled["model_type"], **(filled if hf.get(name) is None else hf[name])}


def _language(hf: Mapping[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    text = _part(hf, "text_config")
    return _FAMILIES[only(text, "model_type", *_FAMILIES)], text


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config; every patch is a token."""
    known(hf, *_FIELDS)
    family, text = _language(hf)
    tower = _part(hf, "vision_config")
    hf = standard(hf)
    only(hf, "tie_word_embeddings", False)
    strategy = "default" if towers.has_class_token(tower) else "full"
    only(hf, "vision_feature_select_strategy", strategy)
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": family.to_model(text),
        "vision": towers.to_model(tower, only(hf, clip.FEATURE_LAYER, -2, -1)),
        "connector": projector.to_model({**hf, "text_config": text}),
    }


def projector_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the projector alone is read from."""
    known(hf, *_FIELDS)
    return {**standard(hf), "text_config": _language(hf)[1]}


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for what it cannot express."""
    parts = ("language", "vision", "connector")
    if not all(model.get(part) for part in parts):
        raise ValueError("--format llava needs a model of language, vision and connector")
    full = whole(model)
    family = qwen2 if full["language"]["transformer"]["add_qkv_bias"] else llama
    if full["language"]["transformer"]["window_size"] is not None:
        family = mistral
    vision = full["vision"]
    hf = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": family.from_model(model["language"]),
        "vision_config": towers.from_model(model["vision"]),
        **projector.from_model(model["connector"], "llava"),
        clip.FEATURE_LAYER: -1,
        "vision_feature_select_strategy": "default" if vision["class_token"] else "full",
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "tie_word_embeddings": False,
    }
    decoder.expressible(model, to_model(hf), "llava")
    return hf


def processor_config(hf: Mapping[str, Any], image_token: str) -> dict[str, Any]:
    """Return processor_config.json, by which Transformers expands a placeholder to an image's."""
    strategy = hf["vision_feature_select_strategy"]
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": hf["vision_config"]["patch_size"],
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),
    }


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the prefix of the encoder's names to config.json."""
    return {**hf, "vision_config": clip.complete(_part(hf, "vision_config"), spec)}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts; weights that ours does not have are left out."""
    family, text = _language(hf)
    tower = _part(hf, "vision_config")
    layer = hf.get(clip.FEATURE_LAYER, -2)
    vision = towers.table(model["vision"], tower, layer, "vision_tower.vision_model.")
    return [
        *prefixed(vision, "vision.", ""),
        *prefixed(projector.table(model["connector"], hf), "connector.", projector.PREFIX),
        *prefixed(family.table(model["language"], text), "language.", "language_model."),
    ]
