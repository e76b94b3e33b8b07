"""VILA 1.0 and LLaVA-1.5 as their own code writes them: one folder, Llama's names, mm_* fields.

Names: model.layers.*, model.mm_projector.*, model.vision_tower.vision_tower.vision_model.* (from
the released code, not from a released folder: unverified). config.json names the tower and does
not describe it: those of `_TOWERS` are known, and for another one our exports add `vision_config`,
which their code does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder, llama, towers, vila_projector
from nvmm.convert.formats.config import known, need, only, whole
from nvmm.convert.mapping import Row, prefixed

ARCHITECTURE = "LlavaLlamaForCausalLM"
_VISION, _PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
}
_OWN = "nvmm/vision_config"
"""The mm_vision_tower of a tower that `vision_config` describes."""
_OF_LLAMA = (*decoder.FIELDS, "attention_bias", "mlp_bias")
_FIELDS = (
    *("mm_vision_tower", vila_projector.TYPE, "mm_hidden_size", "vision_config"),
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end"),
    *("mm_use_im_patch_token", "mm_resampler_type"),
    # Of training and of the preparation of data, which the experiment says here.
    *("image_aspect_ratio", "image_grid_pinpoints", "tokenizer_padding_side", "use_mm_proj"),
    *("tokenizer_model_max_length", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
    *("mm_projector_lr", "unfreeze_mm_vision_tower", "max_sequence_length"),
)


def _text(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's fields."""
    return {k: v for k, v in hf.items() if k not in _FIELDS} | {"model_type": "llama"}


def _tower(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the tower that a folder names; ValueError for an unknown one."""
    if hf.get("vision_config") is not None:
        return dict(hf["vision_config"])
    name = need(hf, "mm_vision_tower")
    if name not in _TOWERS:
        raise ValueError(
            f"config.json: mm_vision_tower={name!r} is not known here (known are"
            f" {', '.join(_TOWERS)}); add vision_config, the tower's own config.json"
        )
    return dict(_TOWERS[name])


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_OF_LLAMA, *_FIELDS)
    tower = _tower(hf)
    only(hf, "mm_hidden_size", tower["hidden_size"])
    only(hf, "mm_vision_select_feature", "patch" if towers.has_class_token(tower) else "cls_patch")
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        only(hf, name, False)
    only(hf, "mm_resampler_type", None)
    language = llama.to_model(_text(hf))
    width = language["transformer"]["hidden_size"]
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": towers.to_model(tower, only(hf, "mm_vision_select_layer", -2, -1)),
        "connector": vila_projector.to_model(hf.get(vila_projector.TYPE, "linear"), width),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for what it cannot express.

    A tower that is known by its name has one layer more, whose output nobody takes: their code
    loads it from there.
    """
    if not all(model.get(part) for part in ("language", "vision", "connector")):
        raise ValueError("--format vila needs a model of language, vision and connector")
    language = llama.from_model(model["language"])
    described = towers.from_model(model["vision"], -2)
    name = next((n for n, own in _TOWERS.items() if own.items() <= described.items()), _OWN)
    vision = whole(model["vision"])
    hf = language | {
        "architectures": [ARCHITECTURE],
        "model_type": "llava_llama",
        "mm_vision_tower": name,
        "mm_hidden_size": vision["transformer"]["hidden_size"],
        "mm_vision_select_layer": -1 if name == _OWN else -2,
        "mm_vision_select_feature": "patch" if vision["class_token"] else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        vila_projector.TYPE: vila_projector.type_of(
            model["connector"], language["hidden_size"], "vila"
        ),
    }
    if name == _OWN:
        hf["vision_config"] = towers.from_model(model["vision"])
    decoder.expressible(model, to_model(hf), "vila")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return config.json with what the decoder's names say.

    Raises ValueError for a folder without its tower, which LLaVA's code loads from elsewhere.
    """
    if not any(name.startswith(_VISION) for name in spec):
        raise ValueError(
            f"it has no {_VISION}*: its tower is {hf.get('mm_vision_tower')}, a folder of its own."
            " Import a folder that has the tower, such as Transformers' (model_type llava)"
        )
    text = decoder.complete(_text(hf), spec)
    return {**hf, **{key: text[key] for key in text if key in decoder.INTERNAL}}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts; weights that ours does not have are left out."""
    kind, layer = hf.get(vila_projector.TYPE, "linear"), hf.get("mm_vision_select_layer", -2)
    vision = towers.table(model["vision"], _tower(hf), layer, _VISION)
    return [
        *prefixed(vision, "vision.", ""),
        *prefixed(vila_projector.table(kind), "connector.", _PROJECTOR),
        *prefixed(llama.table(model["language"], _text(hf)), "language.", ""),
    ]
