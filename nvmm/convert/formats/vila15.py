"""VILA 1.5 as its code writes it: folders llm/, vision_tower/, mm_projector/, a config in each.

A config.json above them holds the three (llm_cfg, vision_tower_cfg, mm_projector_cfg) and says
which layer of the tower is taken. Here a name begins with its folder's, and the three config.json
are read in place of what the one above says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import clip, decoder, llama, mistral, qwen2, towers, vila_projector
from nvmm.convert.formats.config import known, need, only, whole
from nvmm.convert.mapping import Row, prefixed

FOLDERS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
"""Folder -> the field of config.json that holds its own."""
TOKENIZER = "llm"
PROCESSOR = "vision_tower"
"""The folders of the tokenizer and of preprocessor_config.json."""
_FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
_FIELDS = (
    *(*FOLDERS.values(), "hidden_size", "mm_hidden_size", "mm_vision_select_layer"),
    *("mm_vision_select_feature", "mm_use_im_start_end", "mm_use_im_patch_token", "s2"),
    # Of training and of the preparation of data, which the experiment says here.
    *("image_aspect_ratio", "interpolate_mode", "mm_projector_lr", "model_dtype", "resume_path"),
    *("num_video_frames", "s2_max_split_size", "s2_scales", "tune_language_model"),
    *("tune_mm_projector", "tune_vision_tower", "vision_resolution", "_flash_attn_2_enabled"),
)


def _language(hf: Mapping[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    text = dict(need(hf, "llm_cfg"))
    # Lengths of VILA's own, beside Transformers' fields.
    for name in ("model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"):
        text.pop(name, None)
    return _FAMILIES[only(text, "model_type", *_FAMILIES)], text


def _kind(hf: Mapping[str, Any]) -> str:
    projector = need(hf, "mm_projector_cfg")
    known(projector, vila_projector.TYPE)
    return str(need(projector, vila_projector.TYPE))


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    family, text = _language(hf)
    tower = need(hf, "vision_tower_cfg")
    only(hf, "s2", False)
    only(hf, "mm_hidden_size", tower["hidden_size"])
    # SigLIP has no class token that "cls_patch" could mean.
    features = ("patch",) if towers.has_class_token(tower) else ("cls_patch", "patch")
    only({"mm_vision_select_feature": features[0], **hf}, "mm_vision_select_feature", *features)
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        only(hf, name, False)
    language = family.to_model(text)
    width = only(hf, "hidden_size", language["transformer"]["hidden_size"])
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": towers.to_model(tower, only(hf, "mm_vision_select_layer", -2, -1)),
        "connector": vila_projector.to_model(_kind(hf), width),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for what it cannot express."""
    if not all(model.get(part) for part in ("language", "vision", "connector")):
        raise ValueError("--format vila15 needs a model of language, vision and connector")
    full = whole(model)
    family = qwen2 if full["language"]["transformer"]["add_qkv_bias"] else llama
    if full["language"]["transformer"]["window_size"] is not None:
        family = mistral
    width = full["language"]["transformer"]["hidden_size"]
    kind = vila_projector.type_of(model["connector"], width, "vila15")
    hf = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": family.from_model(model["language"]),
        "vision_tower_cfg": towers.from_model(model["vision"]),
        "mm_projector_cfg": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            vila_projector.TYPE: kind,
        },
        "hidden_size": width,
        "mm_hidden_size": full["vision"]["transformer"]["hidden_size"],
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch" if full["vision"]["class_token"] else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": False,
    }
    decoder.expressible(model, to_model(hf), "vila15")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the prefix of the encoder's names to config.json."""
    return {**hf, "vision_tower_cfg": clip.complete(need(hf, "vision_tower_cfg"), spec)}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts; weights that ours does not have are left out."""
    family, text = _language(hf)
    layer = hf.get("mm_vision_select_layer", -2)
    vision = towers.table(
        model["vision"], hf["vision_tower_cfg"], layer, "vision_tower.vision_model."
    )
    return [
        *prefixed(vision, "vision.", ""),
        *prefixed(vila_projector.table(_kind(hf)), "connector.", "mm_projector.layers."),
        *prefixed(family.table(model["language"], text), "language.", "llm."),
    ]
