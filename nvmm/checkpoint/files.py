"""Find checkpoints and read what their JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvmm.config.moved import renamed

FILES = (".metadata", "metadata.json", "common.pt", "weights.json", "state.json")
"""What a complete checkpoint has."""


def find(name: str | Path) -> Path:
    """The checkpoint `name`, or the newest one of run directory `name`; collective.

    Raises ValueError when there is none.
    """
    path = Path(name).expanduser()
    folder = path / "checkpoints"
    if not folder.is_dir():
        if (path / "state.json").is_file():
            return path
        raise ValueError(f"{name} is neither a complete checkpoint nor a run directory with one")
    newest = latest(folder)
    if newest is None:
        raise ValueError(f"{name} has no complete checkpoint in {folder}")
    return newest


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints of a directory in the order they were saved in."""
    paths = [p for p in directory.glob("step_*") if all((p / f).exists() for f in FILES)]
    return sorted(paths, key=lambda path: read_record(path)["number"])


def latest(directory: Path) -> Path | None:
    """The complete checkpoint saved last (not the highest step: a run may have gone back).

    As rank 0 sees it, once there is a process group.
    """
    found: list[Path | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [None, *complete(directory)][-1:]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def read_state(path: Path) -> dict[str, Any]:
    """The state a checkpoint was saved with: JSON, nothing else of it is read."""
    return read_record(path)["state"]


def require_resumable(path: Path) -> None:
    """Raise ValueError when a checkpoint has weights alone, as an import has."""
    if read_record(path).get("optimizer") is None:
        raise ValueError(
            f"{path} holds weights alone, no state to resume; start from it with init_from={path}"
        )


def read_record(path: Path) -> dict[str, Any]:
    """All of state.json. Raises ValueError when the checkpoint has none."""
    try:
        record = json.loads((path / "state.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a complete checkpoint: it has no state.json") from error
    # A checkpoint keeps the config that it was written with; constructors have moved since.
    record["state"] = renamed(record["state"])
    return record
