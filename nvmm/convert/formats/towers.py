"""The vision tower of a composite in LLaVA's manner: CLIP or SigLIP, the features of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from nvmm.convert.formats import clip, siglip
from nvmm.convert.formats.config import need, only, whole
from nvmm.convert.mapping import Row

_FAMILIES: dict[str, ModuleType] = {"clip_vision_model": clip, "siglip_vision_model": siglip}


def family(hf: Mapping[str, Any]) -> ModuleType:
    """Return the module of a tower's config.json; ValueError for another kind."""
    return _FAMILIES[only({"model_type": None, **hf}, "model_type", *_FAMILIES)]


def has_class_token(hf: Mapping[str, Any]) -> bool:
    """Return whether features of this tower begin with a class token, which our model drops."""
    return family(hf) is clip


def to_model(hf: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Turn a tower's config.json into our config: the layers up to `layer`, -1 or -2."""
    model: dict[str, Any] = family(hf).to_model({**hf, clip.FEATURE_LAYER: layer})
    return model


def from_model(model: Mapping[str, Any], layer: int = -1) -> dict[str, Any]:
    """Turn our config into the config.json of a tower; with layer=-2 it says one layer more.

    Raises ValueError for another mean and deviation of pixels than the family's own.
    """
    family = clip if whole(model)["class_token"] else siglip
    hf = clip.from_model(model) if family is clip else siglip.from_model(model, -1)
    own, full = family.to_model({**hf, clip.FEATURE_LAYER: -1}), whole(model)
    for key in ("image_mean", "image_std"):
        if list(full[key]) != list(own[key]):
            raise ValueError(
                f"model.vision.{key}={list(full[key])}: this format has {own[key]} built in"
            )
    need(hf, "num_hidden_layers")
    return hf | {"num_hidden_layers": hf["num_hidden_layers"] - 1 - layer}


def table(model: Mapping[str, Any], hf: Mapping[str, Any], layer: int, prefix: str) -> list[Row]:
    """Return the rows of the tower. prefix: of its names, where `hf` was not completed by them."""
    return list(family(hf).table(model, {clip.PREFIX: prefix, **hf, clip.FEATURE_LAYER: layer}))
