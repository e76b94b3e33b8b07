"""MM-Embed as nvidia/MM-Embed has it: CLIP, LLaVA's projector, NV-Embed's decoder and pooling.

Names are the release's: vision_tower.*, multi_modal_projector.*, language_model.* without `model.`
and lm_head, latent_attention_model.*. Our export has the same names and a config.json of its own
(model_type mm_embed), which says the decoder's RoPE and the pooling's sizes itself.

The release's config.json is LLaVA-NeXT's. Its decoder is built from the config of `retriever`, not
from text_config, whose RoPE base (1,000,000) is another model's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nvmm.convert.formats import clip, nv_embed, projector
from nvmm.convert.formats.config import known, need, only, whole
from nvmm.convert.mapping import Drop, Row, prefixed

log = logging.getLogger("nvmm")
MODEL_TYPE, RELEASED = "mm_embed", "NVMMEmbedModel"
"""The model_type of our exports, and the class that the released config.json names."""
_ROPE = "retriever_rope_theta"
"""A field of ours: RoPE's base of a retriever that is not in _RETRIEVERS."""
_RETRIEVERS = {"nvidia/NV-Embed-v1": 10_000.0, "nvidia/NV-Embed-v2": 10_000.0}
"""RoPE's base of each retriever: Mistral-7B-v0.1's (unverified: from no config.json of theirs)."""
_EMBEDDER = ("text_config", "latent_attention_config", "causal", "hidden_size")
_FIELDS = (
    *(*_EMBEDDER, "max_position_embeddings", "vision_config", clip.FEATURE_LAYER),
    *("vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias"),
    *("global_image_patch_only", "retriever", _ROPE, "tie_word_embeddings", "vocab_size"),
    # The layout of a text and its picture, which data.train.build says here.
    *("instruction_masking", "image_token_index", "image_seq_length", "max_seq_length"),
    *("add_eos_token", "padding_side", "image_grid_pinpoints", "use_image_newline_parameter"),
    "ignore_index",
)
_LATENTS = "latent_attention_model."


def is_released(hf: Mapping[str, Any]) -> bool:
    """Return whether a LLaVA-NeXT's config.json is the released MM-Embed's."""
    return RELEASED in (hf.get("architectures") or [])


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add to config.json what only names and shapes tell, and what the released code has built in.

    Warns of what a released folder holds and our graph does not use. Raises ValueError for a
    retriever whose RoPE is not known.
    """
    hf = dict(hf)
    if is_released(hf):
        hf = _of_release(hf, spec)
    vision = {"model_type": "clip_vision_model", **need(hf, "vision_config")}
    return nv_embed.complete(hf, spec) | {"vision_config": clip.complete(vision, spec)}


def _of_release(hf: dict[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    text, name = dict(need(hf, "text_config")), need(hf, "retriever")
    base = hf.get(_ROPE, _RETRIEVERS.get(name))
    if base is None:
        raise ValueError(
            f"config.json: retriever={name!r} has a RoPE base that is not known here; add {_ROPE},"
            f" the rope_theta of its own config.json (known are {', '.join(_RETRIEVERS)})"
        )
    log.warning(
        "RoPE's base is %g, that of retriever=%s; text_config's (%s) is not the model's and is not"
        " read",
        base,
        name,
        text.get("rope_theta"),
    )
    for field in ("rope_scaling", "rope_parameters"):
        text.pop(field, None)
    text |= {"model_type": text.get("model_type", "mistral"), "rope_theta": base}
    if (rows := spec.get("language_model.embed_tokens.weight")) is not None:
        # text_config counts LLaVA's placeholder and padding, which have no rows.
        text["vocab_size"] = rows.shape[0]
    if "image_newline" in spec:
        log.warning(
            "image_newline is not used: a picture is its patches' tokens alone. Whether the"
            " released code puts it behind them depends on its version of Transformers (unverified)"
        )
    latent = dict(hf.get("latent_attention_config") or {})
    heads = latent.setdefault("num_cross_heads", 8)
    for key, part, rows_of in (
        ("num_latents_value", "latents", 1),
        ("cross_dim_head", "cross_attend_blocks.0.fn.to_q.weight", heads),
    ):
        if (tensor := spec.get(_LATENTS + part)) is not None:
            latent.setdefault(key, tensor.shape[0] // rows_of)
    return hf | {
        "text_config": text,
        "latent_attention_config": latent,
        clip.FEATURE_LAYER: hf.get(clip.FEATURE_LAYER, -2),
    }


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    only(hf, "vision_feature_select_strategy", "default")
    only(hf, "global_image_patch_only", True)
    only(hf, "tie_word_embeddings", False)
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": nv_embed.to_model(_embedder(hf)),
        "vision": clip.to_model(_tower(hf)),
        "connector": projector.to_model(hf),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for a part that it cannot express."""
    parts = ("language", "vision", "connector")
    if not all(model.get(part) for part in parts) or "pooling" not in model["language"]:
        raise ValueError(
            "--format mm_embed needs a model of vision, connector and an embedder as its language"
        )
    more = [name for name in model if model[name] and name not in (*parts, "_target_", "_partial_")]
    if more:
        raise ValueError(f"--format mm_embed cannot express model.{more[0]}={model[more[0]]}")
    full = whole(model["vision"])
    if [list(full["image_mean"]), list(full["image_std"])] != [clip.MEAN, clip.STD]:
        raise ValueError("--format mm_embed cannot express image_mean and image_std but CLIP's")
    embedder = nv_embed.from_model(model["language"])
    return {
        "architectures": ["MMEmbedModel"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_mm_embed.MMEmbedConfig",
            "AutoModel": "modeling_mm_embed.MMEmbedModel",
            "AutoProcessor": "processing_mm_embed.MMEmbedProcessor",
        },
        **{key: embedder[key] for key in (*_EMBEDDER, "max_position_embeddings")},
        **projector.from_model(model["connector"]),
        "vision_config": clip.from_model(model["vision"]),
        clip.FEATURE_LAYER: -1,
        "vision_feature_select_strategy": "default",
        "global_image_patch_only": True,
    }


def projector_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the projector alone is read from."""
    known(hf, *_FIELDS)
    return dict(hf)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of all parts; weights that ours does not have are left out."""
    tower = _tower(hf)
    # A folder's prefix is whole (`complete`); an export has the release's.
    tower.setdefault(clip.PREFIX, "vision_tower.vision_model.")
    embedder = nv_embed.table(model["language"], _embedder(hf))
    return [
        *prefixed(clip.table(model["vision"], tower), "vision.", ""),
        Row(None, ("image_newline",), Drop()),
        *prefixed(projector.table(model["connector"], hf), "connector.", projector.PREFIX),
        *prefixed([_renamed(row) for row in embedder], "language.", ""),
    ]


def _renamed(row: Row) -> Row:
    """Return NV-Embed's row with MM-Embed's name of the decoder."""
    return replace(
        row, theirs=tuple(n.replace("embedding_model.", "language_model.") for n in row.theirs)
    )


def _embedder(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {key: hf[key] for key in _EMBEDDER if key in hf}


def _tower(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**need(hf, "vision_config"), clip.FEATURE_LAYER: hf.get(clip.FEATURE_LAYER, -1)}
