"""SigLIP's vision encoder, from a folder of the encoder alone or of the whole model.

Its pooling head is left out on import; an export says that it has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import clip, decoder
from nvmm.convert.mapping import Drop, Row

complete = clip.complete
_HEAD = (
    "probe",
    "attention.in_proj_weight",
    "attention.in_proj_bias",
    *(
        f"{part}.{kind}"
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
)


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config; features are normed, without the pooling head."""
    return clip.encoder(
        clip.vision_config(hf),
        class_token=False,
        post_layernorm=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json of the encoder alone."""
    hf = clip.encoder_fields(model, "siglip") | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    decoder.expressible(model, to_model(hf), "siglip")
    return hf


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder; everything else of a whole SigLIP is left out."""
    prefix = hf.get(clip.PREFIX, "vision_model.")
    rows = [Row("conv1.bias", (f"{prefix}embeddings.patch_embedding.bias",))]
    rows += [
        Row(f"decoder.final_layernorm.{kind}", (f"{prefix}post_layernorm.{kind}",))
        for kind in ("weight", "bias")
    ]
    rows += [Row(None, (f"{prefix}head.{name}",), Drop()) for name in _HEAD]
    return [*rows, *clip.layers(model, prefix), *clip.text_encoder_rows(hf)]
