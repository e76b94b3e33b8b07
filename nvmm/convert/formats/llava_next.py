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

from nvmm.convert.formats import clip, llama, mistral
from nvmm.convert.formats.config import GELU, known, need, only, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Drop, Row, prefixed

_FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral}
_KINDS = ("weight", "bias")
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
    vision = clip.to_model(_part(hf, "vision_config"))
    hf = standard(hf)
    only(hf, "tie_word_embeddings", False)
    only(hf, "vision_feature_layer", -2)
    only(hf, "vision_feature_select_strategy", "default")
    only(hf, "projector_hidden_act", "gelu")
    language = family.to_model(text)
    layers = vision["transformer"]["num_layers"]
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": vision | {"transformer": vision["transformer"] | {"num_layers": layers - 1}},
        "connector": {
            "_target_": "nvmm.modules.connector.MLPConnector",
            "_partial_": True,
            "downsample": 1,
            "hidden_size": language["transformer"]["hidden_size"],
            "layernorm": False,
            "bias": only(hf, "multimodal_projector_bias", True, False),
            "activation_func": GELU,
        },
    }


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
    prefix = hf["vision_config"][clip.PREFIX]
    vision = clip.table(model["vision"], hf["vision_config"])
    last = model["vision"]["transformer"]["num_layers"]
    linears = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    parts = (*linears, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    left_out = [f"{prefix}encoder.layers.{last}.{part}.{k}" for part in parts for k in _KINDS]
    rows = [
        Row(f"connector.linear_fc{i}.{kind}", (f"multi_modal_projector.linear_{i}.{kind}",))
        for i in (1, 2)
        for kind in (_KINDS if whole(model)["connector"]["bias"] else _KINDS[:1])
    ]
    return [
        *prefixed(vision, "vision.", ""),
        *(Row(None, (name,), Drop()) for name in [*left_out, "image_newline"]),
        *rows,
        *prefixed(family.table(model["language"], text), "language.", "language_model."),
    ]
