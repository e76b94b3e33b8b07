"""preprocessor_config.json, the recipe that turns images or sound into an encoder's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvmm.convert.formats.config import is_whisper, whole
from nvmm.data.samples.tokenizer import Tokenizer

MOST_TILES = 12
"""InternVL's class cuts a picture to so many where nothing else is said."""
_VIDEO_TOKENS = ("<video>", "<|video_pad|>")
_BICUBIC = 3
_SAMPLING_RATE, _HOP = 16_000, 160  # Whisper's: 100 frames a second, two frames a position


def processor(
    model: Mapping[str, Any], format_name: str, build: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the content for a model's encoder; None for a model without one.

    build: data.train.build of a whole model. Its `pad` is the colour that images were filled up to
    a square with: Transformers has it for LLaVA alone, with the mean colour.

    Raises ValueError for what the class of Transformers does otherwise.
    """
    build = build or {}
    pad: Sequence[int] | None = build.get("pad")
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
    padding: dict[str, Any] = {}
    if format_name == "internvl":
        processor_type, padding = "GotOcr2ImageProcessor", _tiles(full, build)
    elif pad is not None:
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


def _tiles(vision: Mapping[str, Any], build: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields by which InternVL's class cuts a picture as the builder does.

    Raises ValueError naming the keys of data.train.build that it does otherwise.
    """
    most = build.get("max_tiles", MOST_TILES if not build else 6)
    wanted = {
        "pad": (None,),
        "attended": ("none",),
        "use_thumbnail": (True,) if most > 1 else (True, False),
        "tile_size": (vision["image_size"],),
    }
    problems = [
        f"data.train.build.{key}={build[key]!r} must be {' or '.join(map(repr, allowed))}"
        for key, allowed in wanted.items()
        if key in build and build[key] not in allowed
    ]
    if problems:
        raise ValueError(
            "GotOcr2ImageProcessor prepares pictures otherwise: " + "; ".join(problems)
        )
    return {
        "crop_to_patches": True,
        "min_patches": build.get("min_tiles", 1),
        "max_patches": most,
    }


def named_tokens(build: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokens that InternVL's processor asks of a tokenizer by name.

    Raises ValueError for tags between tiles, and for texts around a picture that are no token.
    """
    tags = build.get("tags") or {}
    names = {
        "start_image_token": tags.get("image_start", "<Image>"),
        "end_image_token": tags.get("image_end", "</Image>"),
        "context_image_token": tokenizer.image_token,
    }
    problems = [
        f"{name}={text!r} must be a token of {tokenizer.path}"
        for name, text in names.items()
        if tokenizer.token_id(text) is None
    ]
    if tags.get("variant", "1d") != "none":
        problems.append(f"data.train.build.tags.variant={tags.get('variant', '1d')} must be none")
    if problems:
        raise ValueError(
            "InternVL's processor writes a picture as start, features and end: "
            + "; ".join(problems)
        )
    # It asks for a token of videos too, which our models do not read: where there is none
    # Transformers adds it behind the vocabulary.
    known = (token for token in _VIDEO_TOKENS if tokenizer.token_id(token) is not None)
    return names | {"video_token": next(known, _VIDEO_TOKENS[0])}
