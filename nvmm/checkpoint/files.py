"""Find checkpoints and read what their JSON says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvmm.checkpoint.contents import Contents
from nvmm.checkpoint.record import read_record

FILES = (".metadata", "metadata.json", "common.pt", "weights.json", "state.json")
"""The files that a complete checkpoint has."""

log = logging.getLogger("nvmm")


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


def run_tokenizer(path: Path) -> Path:
    """Return where the run of a checkpoint keeps its tokenizer's files, which move with it."""
    return path.parent.parent / "tokenizer"


def complete(directory: Path) -> list[Path]:
    """List the complete checkpoints of a directory in the order they were saved in.

    They have all their files and an intact state.json; the other files are not read.
    """
    return [path for _, path in sorted(_numbered(directory))]


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    found = []
    for path in directory.glob("step_*"):
        try:
            record = read_record(path)
        except (ValueError, OSError):
            continue
        if all((path / name).exists() for name in {*FILES, *record.get("files", ())}):
            found.append((record["number"], path))
    return found


def latest(directory: Path, besides: Set[Path] = frozenset()) -> Path | None:
    """Return the whole checkpoint saved last, which need not have the highest step; collective.

    Its small files are those that were saved, and its data are there; their bits are compared when
    they are read. What is left aside for damage is logged. Rank 0 looks for all, once there is a
    process group: file systems may show ranks other files.

    besides: checkpoints that are known to be damaged.
    """
    return _seen_by_first_rank(lambda: _newest_whole(directory, besides))


def any_checkpoint(directory: Path) -> Path | None:
    """Return a folder of a checkpoint, whole or not, None where there is none; collective."""
    return _seen_by_first_rank(lambda: next(iter(sorted(directory.glob("step_*"))), None))


def _seen_by_first_rank(look: Callable[[], Path | None]) -> Path | None:
    found: list[Path | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [look()]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _newest_whole(directory: Path, besides: Set[Path]) -> Path | None:
    paths = complete(directory)
    for path in sorted(set(directory.glob("step_*")) - set(paths)):
        log.warning("%s is left aside: %s", path, _problem(path) or "a file is missing")
    for path in reversed(paths):
        if path in besides:
            continue
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("%s is left aside: %s", path, problem)
    return None


def _problem(path: Path) -> str | None:
    """Return what keeps a checkpoint from being whole."""
    try:
        Contents.open(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read the state a checkpoint was saved with; nothing but its JSON is read."""
    state: dict[str, Any] = read_record(path)["state"]
    return state


def require_resumable(path: Path) -> None:
    """Raise ValueError when a checkpoint has weights alone, as an import has."""
    if read_record(path).get("optimizer") is None:
        raise ValueError(
            f"{path} holds weights alone, no state to resume; start from it with init_from={path}"
        )
