"""The model config of a folder, for whoever composes a run from it (`nvmm.config.folders`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvmm.checkpoint.files import find, read_state
from nvmm.convert.models import open_folder
from nvmm.inference.trust import require_trusted

_MARKS = {"language": "vocab_size", "vision": "patch_size", "audio": "num_mel_bins"}
"""Part -> a key that only the config of such a part has."""
_ADVICE = (
    "if you trust whoever wrote it, copy the model of its state.json into a YAML of your own, and"
    " name that"
)


def described(folder: Path, group: str) -> dict[str, Any]:
    """Return our model config of a Hugging Face folder, a checkpoint or a run directory.

    group: `model` for the whole model, language, vision or audio for that part of it.

    Raises ValueError for a folder that is neither, for one without that part, and for a checkpoint
    whose config would run code of others.
    """
    config: Any
    if (folder / "state.json").is_file() or (folder / "checkpoints").is_dir():
        config = (read_state(find(folder)).get("config") or {}).get("model")
        if not isinstance(config, Mapping):
            raise ValueError(f"{folder} has no model config in its state.json")
        require_trusted(config, folder, _ADVICE)
    else:
        config = open_folder(folder).model()
    if group == "model":
        return dict(config)
    other = (config.get("encoders") or {}).get(group) or {}
    part = config.get(group) or other.get("encoder") or config
    if not isinstance(part, Mapping) or _MARKS[group] not in part:
        raise ValueError(f"{folder} is a model ({config.get('_target_')}) without {group}")
    return dict(part)
