"""SigLIP's vision encoder, from a folder of the encoder alone or of the whole model.

Its pooling head is left out on import; an export says that it has none. Where a composite names the
layer whose output is taken (clip.FEATURE_LAYER), the last norm is left out too, as CLIP's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import clip, decoder
from nvmm.convert.formats.config import only, whole
from nvmm.convert.mapping import Drop, Row, Unused

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
    """Turn config.json into our model config, without the pooling head.

    Features are normed; with FEATURE_LAYER they are those of that layer, and are not.
    """
    layer = only(hf, clip.FEATURE_LAYER, None, -1, -2)
    model = clip.encoder(
        clip.vision_config(hf),
        class_token=False,
        post_layernorm=layer is None,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    model["transformer"]["num_layers"] += 0 if layer is None else 1 + layer
    return model


def from_model(model: Mapping[str, Any], layer: int | None = None) -> dict[str, Any]:
    """Turn our model config into config.json of the encoder alone.

    layer: FEATURE_LAYER of the composite that it is written into.
    """
    hf = clip.encoder_fields(model, "siglip") | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    decoder.expressible(model, to_model({**hf, clip.FEATURE_LAYER: layer}), "siglip")
    return hf


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder; everything else of a whole SigLIP is left out."""
    prefix = hf.get(clip.PREFIX, "vision_model.")
    full = whole(model)
    width = full["transformer"]["hidden_size"]
    rows = [Row("conv1.bias", (f"{prefix}embeddings.patch_embedding.bias",))]
    for kind, value in (("weight", 1.0), ("bias", 0.0)):
        theirs = (f"{prefix}post_layernorm.{kind}",)
        if full["post_layernorm"]:
            rows.append(Row(f"decoder.final_layernorm.{kind}", theirs))
        else:
            rows.append(Row(None, theirs, Unused((width,), value)))
    rows += [Row(None, (f"{prefix}head.{name}",), Drop()) for name in _HEAD]
    more = [*clip.behind(model, hf, prefix), *clip.text_encoder_rows(hf)]
    return [*rows, *clip.layers(model, prefix), *more]
