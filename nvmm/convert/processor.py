"""preprocessor_config.json, the recipe that turns images or sound into an encoder's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvmm.convert.formats.config import is_whisper, whole

_BICUBIC = 3
_SAMPLING_RATE, _HOP = 16_000, 160  # Whisper's: 100 frames a second, two frames a position


def processor(
    model: Mapping[str, Any], format_name: str, pad: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """Return the content for a model's encoder; None for a model without one.

    pad: the colour that images were filled up to a square with (data.train.build.pad). Transformers
    has it for LLaVA alone, with the mean colour: ValueError for another one.
    """
    if "depths" in model:
        # CLAP's front end is a choice of the data, which a checkpoint of an encoder lacks.
        return None
    if is_whisper(model):
        return _whisper(model)
    if format_name == "audio_flamingo3":
        # Its processor leaves out the silence behind a sound.
        return {**_whisper(model["encoders"]["audio"]["encoder"]), "return_attention_mask": True}
    vision = model if "patch_size" in model else model.get("vision")
    if vision is None:
        return None
    full = whole(vision)
    side = full["image_size"]
    siglip = format_name == "siglip" or not full["class_token"]
    processor_type = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
    padding = {}
    if pad is not None:
        processor_type, padding = "LlavaImageProcessor", {"do_pad": True}
        if list(pad) != [int(255 * mean) for mean in full["image_mean"]]:
            raise ValueError(
                f"data.train.build.pad={list(pad)}: {processor_type} pads with the mean colour"
                f" {[int(255 * mean) for mean in full['image_mean']]} alone"
            )
    return {
        "image_processor_type": processor_type,
        **padding,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(full["image_mean"]),
        "image_std": list(full["image_std"]),
    }


def _whisper(encoder: Mapping[str, Any]) -> dict[str, Any]:
    full = whole(encoder)
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": full["num_mel_bins"],
        "sampling_rate": _SAMPLING_RATE,
        "hop_length": _HOP,
        "n_fft": 400,
        "chunk_length": full["max_source_positions"] * 2 * _HOP // _SAMPLING_RATE,
    }
