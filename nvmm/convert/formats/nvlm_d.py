"""NVLM-D as nvidia/NVLM-D-72B has it and vLLM reads it: language_model.*, vision_model.*, mlp1.*.

The encoder carries 7 dummy heads, all zero, after its real ones: vLLM builds it that way whatever
the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder, internvit, llama, qwen2
from nvmm.convert.formats.config import GELU, known, need, only, whole
from nvmm.convert.mapping import Row, prefixed

_DUMMY_HEADS = 7
_EPSILON = "projector_layernorm_eps"
"""A field of ours: the published code has nn.LayerNorm's 1e-5 built in."""
_FAMILIES: dict[str, ModuleType] = {"qwen2": qwen2, "llama": llama}

_FIELDS = (
    *("llm_config", "vision_config", "select_layer", "ps_version", "downsample_ratio", _EPSILON),
    *("force_image_size", "use_backbone_lora", "use_llm_lora"),
    # Of the preparation of data, which the experiment says here.
    *("dynamic_image_size", "max_dynamic_patch", "min_dynamic_patch", "use_thumbnail"),
    *("pad2square", "template"),
)


def _language(hf: Mapping[str, Any]) -> ModuleType:
    return _FAMILIES[only(need(hf, "llm_config"), "model_type", *_FAMILIES)]


def connector(ffn_hidden_size: int, epsilon: float = 1e-5, downsample: int = 2) -> dict[str, Any]:
    """Return our config of NVLM-D's projector in front of a decoder of this FFN width."""
    return {
        "_target_": "nvmm.modules.connector.MLPConnector",
        "_partial_": True,
        "downsample": downsample,
        "hidden_size": ffn_hidden_size,
        "layernorm": True,
        "layernorm_epsilon": epsilon,
        "bias": False,
        "activation_func": GELU,
        "init_method_std": 0.014,
    }


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    only(hf, "select_layer", -1)
    for name in ("use_backbone_lora", "use_llm_lora"):
        only(hf, name, 0)
    vision = internvit.to_model(need(hf, "vision_config"))
    only(hf, "force_image_size", vision["image_size"], None)
    only(hf, "ps_version", "v2")
    language = _language(hf).to_model(need(hf, "llm_config"))
    downsample = round(1 / hf.get("downsample_ratio", 0.5))
    width = language["transformer"]["ffn_hidden_size"]
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": vision,
        "connector": connector(width, hf.get(_EPSILON, 1e-5), downsample),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    if "language" not in model or "vision" not in model:
        raise ValueError("--format nvlm_d needs a model of language, vision and connector")
    full = whole(model)
    has_bias = full["language"]["transformer"]["add_qkv_bias"]
    language = (qwen2 if has_bias else llama).from_model(model["language"])
    image_size = full["vision"]["image_size"]
    hf = {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 1 / full["connector"]["downsample"],
        "dynamic_image_size": True,
        "force_image_size": image_size,
        "llm_config": language,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
        "vision_config": internvit.from_model(model["vision"])
        | {internvit.NUM_DUMMY_HEADS: _DUMMY_HEADS},
        _EPSILON: full["connector"]["layernorm_epsilon"],
    }
    decoder.expressible(model, to_model(hf), "nvlm_d")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the encoder's number of dummy heads to config.json."""
    vision = internvit.complete(need(hf, "vision_config"), spec, "vision_model.")
    return {**hf, "vision_config": vision}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts."""
    language = _language(hf).table(model["language"], hf["llm_config"])
    vision = internvit.table(model["vision"], hf["vision_config"])
    return [
        *prefixed(vision, "vision.", "vision_model."),
        Row("connector.linear_fc1.layer_norm_weight", ("mlp1.0.weight",)),
        Row("connector.linear_fc1.layer_norm_bias", ("mlp1.0.bias",)),
        Row("connector.linear_fc1.weight", ("mlp1.1.weight",)),
        Row("connector.linear_fc2.weight", ("mlp1.3.weight",)),
        *prefixed(language, "language.", "language_model."),
    ]
