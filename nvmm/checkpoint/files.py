"""Find checkpoints and read what their JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvmm.config.moved import renamed

FILES = (".metadata", "metadata.json", "common.pt", "weights.json", "state.json")
"""The files that a complete checkpoint has."""


def find(name: str | Path) -> Path:
    """Return the checkpoint `name`, or the newest one of run directory `name`; collective.

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
    """List the complete checkpoints of a directory in the order they were saved in."""
    paths = [p for p in directory.glob("step_*") if all((p / f).exists() for f in FILES)]
    return sorted(paths, key=lambda path: read_record(path)["number"])


def latest(directory: Path) -> Path | None:
    """Return the complete checkpoint saved last, which need not have the highest step.

    Rank 0 looks for all, once there is a process group: file systems may show ranks other files.
    """
    newest: list[Path | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        newest = [None, *complete(directory)][-1:]
    if dist.is_initialized():
        dist.broadcast_object_list(newest, src=0)
    return newest[0]


def read_state(path: Path) -> dict[str, Any]:
    """Read the state a checkpoint was saved with; nothing but its JSON is read."""
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
