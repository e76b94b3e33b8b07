"""Which part of a model a config is of. This imports the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OWN_KEYS = {"language": "vocab_size", "vision": "patch_size"}
"""Part of a model -> a key that only the config of such a part has."""


def part_alone(model: Mapping[str, Any]) -> str | None:
    """Return `language` or `vision` for the config of such a part alone, None for other models."""
    return next((part for part, key in _OWN_KEYS.items() if key in model), None)
