"""The module of each format, and everything of a Hugging Face folder but its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from nvmm.config.nested import merged
from nvmm.convert.formats import (
    audio_flamingo3,
    bert,
    clap,
    clip,
    decoder,
    internvit,
    llama,
    llava,
    llava_next,
    megatron,
    mistral,
    mm_embed,
    nemotron,
    nv_embed,
    nvlm_d,
    opt,
    projector,
    qwen2,
    qwen3,
    reward,
    siglip,
    vila,
    vila15,
    whisper,
)

FORMATS: dict[str, ModuleType | reward.Reward] = {
    "qwen2": qwen2,
    "qwen3": qwen3,
    "llama": llama,
    "yi": llama,
    "mistral": mistral,
    "nemotron": nemotron,
    "opt": opt,
    "internvit": internvit,
    "clap": clap,
    "clip": clip,
    "siglip": siglip,
    "whisper": whisper,
    "nvlm_d": nvlm_d,
    "audio_flamingo3": audio_flamingo3,
    "llava": llava,
    "llava_next": llava_next,
    "vila": vila,
    "vila15": vila15,
    megatron.LEGACY: megatron,
    megatron.DISTRIBUTED: megatron,
    "nv_embed": nv_embed,
    "bert": bert,
    "mm_embed": mm_embed,
    "projector": projector,
    **reward.FORMATS,
}
_MODEL_TYPES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "opt": "opt",
    "intern_vit_6b": "internvit",
    "clap": "clap",
    "clap_audio_model": "clap",
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "whisper": "whisper",
    "NVLM_D": "nvlm_d",
    "audioflamingo3": "audio_flamingo3",
    "llava": "llava",
    "llava_next": "llava_next",
    "nvembed": "nv_embed",
    "bert": "bert",
    mm_embed.MODEL_TYPE: "mm_embed",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
# Fields that describe stored weights, or repeat another field that we write.
_STALE = ("torch_dtype", "dtype", "rope_parameters", "transformers_version", "auto_map")


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json. Raises ValueError when there is none or it is no object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} has no readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is not an object")
    return config


def detect(hf: Mapping[str, Any], folder: Path) -> str:
    """Return a folder's format by its class or model_type. Raises ValueError when that has no
    table."""
    for architecture in hf.get("architectures") or []:
        if architecture in reward.ARCHITECTURES:
            return reward.ARCHITECTURES[architecture]
    if mm_embed.is_released(hf):
        return "mm_embed"
    if vila15.FOLDERS["llm"] in hf:
        return "vila15"
    if vila.ARCHITECTURE in (hf.get("architectures") or []):
        return "vila"
    model_type = hf.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"{folder}/config.json: model_type={model_type!r} has no table; there are"
            f" {', '.join(_MODEL_TYPES)}"
        )
    return _MODEL_TYPES[model_type]


def weight_folders(format_name: str) -> dict[str, str]:
    """Return the folders of a format that holds its parts apart -> the field of config.json that
    has each one's own; empty for a format of one folder."""
    folders: dict[str, str] = getattr(FORMATS[format_name], "FOLDERS", {})
    return folders


def place_of(folder: Path, format_name: str, what: Literal["TOKENIZER", "PROCESSOR"]) -> Path:
    """Return where a format keeps its tokenizer or preprocessor_config.json within a folder."""
    name = getattr(FORMATS[format_name], what, None)
    return folder if name is None else folder / name


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer and processor files of a folder; return False if it has no tokenizer."""
    names = [name for name in (*_TOKENIZER_FILES, *_OTHER_FILES) if (source / name).is_file()]
    if not set(names) & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        models = [path.name for path in source.glob("*.model")]  # SentencePiece's, by any name
        if not models:
            return False
        names += models
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
    return True


def exported_config(
    derived: Mapping[str, Any], source: Mapping[str, Any] | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json of an export: the model's fields over those of an imported one."""
    derived = {key: value for key, value in derived.items() if key not in decoder.INTERNAL}
    config: dict[str, Any] = merged(source or {}, derived, drop=_STALE)
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    card: str,
    format_name: str,
    processor: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder but its weights; config.json, which makes it one, comes last."""
    recipe = place_of(folder, format_name, "PROCESSOR") / "preprocessor_config.json"
    if processor is not None and not recipe.exists():
        _write_json(recipe, processor)
    for name, field in weight_folders(format_name).items():
        _write_json(folder / name / "config.json", config[field])
    (folder / "README.md").write_text(card, encoding="utf-8")
    _write_json(folder / "config.json", config)


def write_processor(
    folder: Path, config: Mapping[str, Any], format_name: str, image_token: str
) -> None:
    """Write processor_config.json for a format whose class of Transformers reads one."""
    content = getattr(FORMATS[format_name], "processor_config", None)
    if content is not None and not (folder / "processor_config.json").exists():
        _write_json(folder / "processor_config.json", content(config, image_token))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
