"""InternVL 1.5 to 3.5 as Transformers has it (InternVLForConditionalGeneration).

InternViT, pixel shuffle, LayerNorm - linear - GELU - linear, and Qwen2, Qwen3 or Llama. A picture
is cut into tiles of one size and a thumbnail, as NVLM-D's, without tags between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder, internvl_vision, llama, qwen2, qwen3
from nvmm.convert.formats.config import GELU, known, need, only, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Row, prefixed

PLACEHOLDER = "image_token_id"
"""The field of the token that stands for an image."""
_FAMILIES: dict[str, ModuleType] = {"qwen2": qwen2, "qwen3": qwen3, "llama": llama}
_FIELDS = (
    *("text_config", "vision_config", "downsample_ratio", "projector_hidden_act"),
    *("vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings"),
    *(decoder.EMBEDDING, decoder.HEAD),
    # Of the row of tokens, which data.train.build says here.
    *("image_token_id", "image_seq_length"),
)
_EPSILON = 1e-5
"""The projector's norm has it built in."""
_LANGUAGE = "language_model."
_PROJECTOR = "multi_modal_projector."
IMAGE_START, IMAGE_END = "<img>", "</img>"
"""The tokens around a picture in the published folders."""
MARKER = "{token}\n"
"""What a chat template writes for a picture, with the token of its features."""


def _text(hf: Mapping[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """Return the decoder's family and config.json, with the whole model's tie of embeddings."""
    text = {"model_type": "qwen2", **need(hf, "text_config")}
    tie = standard({**hf, "model_type": "internvl"})["tie_word_embeddings"]
    return _FAMILIES[only(text, "model_type", *_FAMILIES)], text | {"tie_word_embeddings": tie}


def _vision(hf: Mapping[str, Any]) -> dict[str, Any]:
    vision = {"model_type": internvl_vision.MODEL_TYPE, **(hf.get("vision_config") or {})}
    only(vision, "model_type", internvl_vision.MODEL_TYPE)
    return vision


def connector(hidden_size: int, downsample: int = 2) -> dict[str, Any]:
    """Return our config of InternVL's projector in front of a decoder of this width."""
    return {
        "_target_": "nvmm.modules.connector.MLPConnector",
        "_partial_": True,
        "downsample": downsample,
        "hidden_size": hidden_size,
        "layernorm": True,
        "layernorm_epsilon": _EPSILON,
        "bias": True,
        "activation_func": GELU,
    }


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    family, text = _text(hf)
    only(hf, "projector_hidden_act", "gelu")
    only(hf, "vision_feature_layer", -1)
    only(hf, "vision_feature_select_strategy", "default")
    ratio = hf.get("downsample_ratio", 0.5)
    downsample = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not downsample or downsample * ratio != 1:
        raise ValueError(f"config.json: downsample_ratio={ratio} must be 1/n of a whole n")
    language = family.to_model(text)
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": internvl_vision.to_model(_vision(hf)),
        "connector": connector(language["transformer"]["hidden_size"], downsample),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for what it cannot express."""
    if not all(model.get(part) for part in ("language", "vision", "connector")):
        raise ValueError("--format internvl needs a model of language, vision and connector")
    full = whole(model)
    config = full["language"]["transformer"]
    family = qwen3 if config["qk_layernorm"] else qwen2 if config["add_qkv_bias"] else llama
    text, vision = family.from_model(model["language"]), full["vision"]
    downsample = full["connector"].get("downsample")
    if not isinstance(downsample, int):
        raise ValueError(f"--format internvl cannot express {full['connector'].get('_target_')}")
    hf = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": internvl_vision.from_model(model["vision"]),
        "downsample_ratio": 1 / downsample,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (vision["image_size"] // vision["patch_size"] // downsample) ** 2,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    decoder.expressible(model, to_model(hf), "internvl")
    return hf


def processor_config(hf: Mapping[str, Any], image_token: str) -> dict[str, Any]:
    """Return processor_config.json, by which Transformers expands a placeholder to an image's."""
    return {"processor_class": "InternVLProcessor", "image_seq_length": hf["image_seq_length"]}


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add to config.json what the names tell: the tie, and the two tensors that it is of."""
    family, text = _text(hf)
    names = {k.removeprefix(_LANGUAGE): v for k, v in spec.items() if k.startswith(_LANGUAGE)}
    text = family.complete(text, names)
    ends = {key: text[key] and _LANGUAGE + text[key] for key in (decoder.EMBEDDING, decoder.HEAD)}
    return {**hf, **ends, "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts."""
    family, text = _text(hf)
    rows = [
        Row(f"linear_fc1.layer_norm_{kind}", (f"layer_norm.{kind}",)) for kind in ("weight", "bias")
    ]
    rows += [
        Row(f"linear_fc{i}.{kind}", (f"linear_{i}.{kind}",))
        for i in (1, 2)
        for kind in ("weight", "bias")
    ]
    return [
        *prefixed(internvl_vision.table(model["vision"], _vision(hf)), "vision.", "vision_tower."),
        *prefixed(rows, "connector.", _PROJECTOR),
        *prefixed(family.table(model["language"], text), "language.", _LANGUAGE),
    ]
