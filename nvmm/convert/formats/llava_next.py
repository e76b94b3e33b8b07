"""LLaVA-NeXT (LLaVA 1.6) as Transformers has it: CLIP, a two-layer projector, Llama or Mistral.

Read only. Our graph takes the features that LLaVA takes (CLIP's layer before the last, without the
class token), but lays images out as tiles in a row. `image_newline`, which LLaVA puts between the
rows of an image that it unpads, the last CLIP layer and CLIP's last norm have no place in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from nvmm.convert.formats import clip, llama, mistral, projector
from nvmm.convert.formats.config import known, need, only
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Drop, Row, prefixed

_FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral}
_FIELDS = (
    *("text_config", "vision_config", "vision_feature_layer", "vision_feature_select_strategy"),
    *("projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings"),
    # Of how images are laid out in a row, which is another one here; the module says so.
    *("image_token_index", "image_token_id", "image_grid_pinpoints", "image_seq_length"),
    *("use_image_newline_parameter", "ignore_index", "vocab_size"),
)


def _language(hf: Mapping[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    text = _part(hf, "text_config")
    return _FAMILIES[only(text, "model_type", *_FAMILIES)], text


def _part(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a nested config as it is given, with its type; Transformers' own where it is not."""
    filled = standard({"model_type": need(hf, "model_type")})[name]
    return {"model_type": filled["model_type"], **(filled if hf.get(name) is None else hf[name])}


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config: native tiles, in which every patch is a token."""
    known(hf, *_FIELDS)
    family, text = _language(hf)
    language = family.to_model(text)
    tower = _part(hf, "vision_config")
    hf = standard(hf)
    only(hf, "tie_word_embeddings", False)
    only(hf, "vision_feature_select_strategy", "default")
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": clip.to_model(tower | {clip.FEATURE_LAYER: only(hf, clip.FEATURE_LAYER, -2)}),
        "connector": projector.to_model(projector_config(hf)),
    }


def projector_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the projector alone is read from."""
    known(hf, *_FIELDS)
    return {**standard(hf), "text_config": _language(hf)[1]}


def from_model(model: Mapping[str, Any]) -> NoReturn:
    """Raise ValueError: the export would lack the weights that the import leaves out."""
    raise ValueError(
        "--format llava_next can only be imported: image_newline, the last CLIP layer and CLIP's"
        " last norm are no part of our model; export --part language or --part vision"
    )


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the prefix of the encoder's names to config.json."""
    return {**hf, "vision_config": clip.complete(_part(hf, "vision_config"), spec)}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts; weights that ours does not have are left out."""
    family, text = _language(hf)
    tower = hf["vision_config"] | {clip.FEATURE_LAYER: -2}
    return [
        *prefixed(clip.table(model["vision"], tower), "vision.", ""),
        Row(None, ("image_newline",), Drop()),
        *prefixed(projector.table(model["connector"], hf), "connector.", projector.PREFIX),
        *prefixed(family.table(model["language"], text), "language.", "language_model."),
    ]
