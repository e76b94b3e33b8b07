"""The builders of a blend: an entry may say only what differs from data.train.build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.config.nested import merged


def with_whole_builders(config: dict[str, Any]) -> dict[str, Any]:
    """Return a plain config in which every `build` of data.blend is a whole builder.

    One without `_target_` is laid over data.train.build, dict by dict; see `nested.merged`.
    """
    data = config.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("blend"), list):
        return config
    train = data.get("train")
    base = train.get("build") if isinstance(train, Mapping) else None
    if not isinstance(base, Mapping):
        return config
    return {**config, "data": {**data, "blend": _whole(data["blend"], base)}}


def _whole(entries: list[Any], base: Mapping[str, Any]) -> list[Any]:
    result = []
    for entry in entries:
        if isinstance(entry, Mapping):
            build = entry.get("build")
            if isinstance(build, Mapping) and "_target_" not in build:
                entry = {**entry, "build": merged(base, build)}
            if isinstance(entry.get("blend"), list):
                entry = {**entry, "blend": _whole(entry["blend"], base)}
        result.append(entry)
    return result
