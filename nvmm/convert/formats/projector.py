"""LLaVA's projector alone, out of a whole model's folder: two linears with GELU between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import GELU, need, only, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Row

PREFIX = "multi_modal_projector."
"""Its names begin so in the whole model's folder, and are without it here."""


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the whole model's config.json into our connector's config."""
    only(hf, "projector_hidden_act", "gelu")
    return {
        "_target_": "nvmm.modules.connector.MLPConnector",
        "_partial_": True,
        "downsample": 1,
        "hidden_size": need(standard(need(hf, "text_config")), "hidden_size"),
        "layernorm": False,
        "bias": only(hf, "multimodal_projector_bias", True, False),
        "activation_func": GELU,
    }


def from_model(model: Mapping[str, Any], family: str = "mm_embed") -> dict[str, Any]:
    """Turn our connector's config into the whole model's fields; ValueError for another one."""
    fields = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": whole(model)["bias"],
    }
    sizes = {"model_type": "llama", "hidden_size": model.get("hidden_size")}
    sizes["num_attention_heads"] = 1  # Transformers' own number divides few sizes.
    if model.get("hidden_size") is None:
        raise ValueError(f"--format {family} cannot express model.connector.hidden_size=None")
    decoder.expressible(model, to_model({**fields, "text_config": sizes}), family)
    return fields


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return config.json as it is."""
    return dict(hf)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of both linears."""
    kinds = ("weight", "bias") if whole(model)["bias"] else ("weight",)
    return [Row(f"linear_fc{i}.{kind}", (f"linear_{i}.{kind}",)) for i in (1, 2) for kind in kinds]
