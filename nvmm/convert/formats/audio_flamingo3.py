"""Audio Flamingo 3 as Transformers has it (AudioFlamingo3ForConditionalGeneration).

Whisper's encoder with the mean of two tokens in front of its last norm, linear - GELU - linear,
Qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder, projector, qwen2, whisper
from nvmm.convert.formats.config import is_whisper, known, need, only
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Row, prefixed

PLACEHOLDER = "audio_token_id"
"""The field of the token that stands for a sound."""
_FIELDS = (
    *("audio_config", "text_config", "projector_hidden_act", "projector_bias"),
    "tie_word_embeddings",
    # Of the row of tokens, which data.train.build says here.
    *("audio_token_id", "audio_token_index"),
)
_SIZES = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}
"""Whisper's names of an encoder's sizes -> Audio Flamingo 3's; a folder may have either."""
_ALIKE = ("num_mel_bins", "max_source_positions", "activation_function")
_POOL = 2
"""Tokens of a mean; Transformers has no field for it."""


def _language(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's config as it is given, with its type."""
    text = {"model_type": "qwen2", **(hf.get("text_config") or {})}
    only(text, "model_type", "qwen2")
    only(text, "tie_word_embeddings", False)
    return text


def _encoder(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's config under the names of Whisper's."""
    given = {"model_type": "audioflamingo3_encoder", **(hf.get("audio_config") or {})}
    only(given, "model_type", "audioflamingo3_encoder")
    # Transformers keeps scale_embedding and does not read it.
    training = ("layerdrop", "encoder_layerdrop", "scale_embedding")
    known(given, *_SIZES, *_SIZES.values(), *_ALIKE, *training)
    filled = standard(given)
    return {
        "model_type": "whisper",
        **{ours: need(filled, theirs) for ours, theirs in _SIZES.items()},
        **{name: filled[name] for name in _ALIKE},
        "init_std": given.get("initializer_range", 0.02),
        whisper.PREFIX: "audio_tower.",
    }


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    text, audio = _language(hf), _encoder(hf)
    hf = standard(hf)
    only(hf, "tie_word_embeddings", False)
    fields = {**hf, "multimodal_projector_bias": hf["projector_bias"], "text_config": text}
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": qwen2.to_model(text),
        "encoders": {
            "audio": {
                "encoder": {**whisper.to_model(audio), "pool": _POOL},
                "connector": projector.to_model(fields),
            }
        },
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for what it cannot express."""
    audio = (model.get("encoders") or {}).get("audio") or {}
    encoder = audio.get("encoder") or {}
    if not model.get("language") or model.get("vision") or not is_whisper(encoder):
        raise ValueError("--format audio_flamingo3 needs a model of language and Whisper's encoder")
    if encoder.get("pool", 1) != _POOL:
        raise ValueError(
            f"--format audio_flamingo3 cannot express model.encoders.audio.encoder.pool="
            f"{encoder.get('pool', 1)}; it has {_POOL}"
        )
    theirs = whisper.from_model({k: v for k, v in encoder.items() if k != "pool"})
    fields = projector.from_model(audio["connector"], "audio_flamingo3")
    hf = {
        "architectures": ["AudioFlamingo3ForConditionalGeneration"],
        "model_type": "audioflamingo3",
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            **{name: theirs[ours] for ours, name in _SIZES.items()},
            **{name: theirs[name] for name in _ALIKE},
            "initializer_range": theirs["init_std"],
        },
        "text_config": qwen2.from_model(model["language"]),
        "projector_hidden_act": fields["projector_hidden_act"],
        "projector_bias": fields["multimodal_projector_bias"],
    }
    decoder.expressible(model, to_model(hf), "audio_flamingo3")
    return hf


def processor_config(hf: Mapping[str, Any], audio_token: str) -> dict[str, Any]:
    """Return processor_config.json, by which Transformers expands a placeholder to a sound's."""
    return {"processor_class": "AudioFlamingo3Processor", "audio_token": audio_token}


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return config.json as it is."""
    return dict(hf)


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the three parts."""
    audio = model["encoders"]["audio"]
    encoder = whisper.table(audio["encoder"], _encoder(hf))
    return [
        *prefixed(encoder, "audio.", ""),
        *prefixed(projector.table(audio["connector"], hf), "audio_connector.", projector.PREFIX),
        *prefixed(qwen2.table(model["language"], _language(hf)), "language.", "language_model."),
    ]
