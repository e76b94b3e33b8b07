"""state.json, which completes a checkpoint, and the seals of the small files beside it.

state.json has the SHA-256 of every file but the data (`files`) and of itself (`seal`), so that
nothing in them can change unnoticed. The data have digests of their own, in the sealed digests.json
(nvmm/checkpoint/contents.py).

A `format` is recorded since there are digests: without it a checkpoint is of before, and has
sums of its weights alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvmm.config.moved import renamed

FORMAT = 2
_KEYS = {"step", "layout", "optimizer", "state", "number"}
_SEALS = {"format", "files", "seal", "skipped"}


class DamagedError(ValueError):
    """A checkpoint, `path`, whose files are not those that were saved."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(path, what)
        self.path = path

    def __str__(self) -> str:
        return f"{self.args[0]} is damaged or incomplete: {self.args[1]}"


def read_record(path: Path) -> dict[str, Any]:
    """Return all of state.json. Raises DamagedError when there is none or it is not as saved."""
    record = _parsed(path)
    if record.keys() == _KEYS:  # of before there were digests
        if (path / "digests.json").is_file():
            raise DamagedError(path, "state.json has lost its format, files and seal")
    elif record.keys() != _KEYS | _SEALS:
        unlike = sorted(record.keys() ^ (_KEYS | _SEALS))
        raise DamagedError(path, f"state.json is not what was saved: its keys differ in {unlike}")
    # A checkpoint keeps the config that it was written with; constructors have moved since.
    record["state"] = renamed(record["state"])
    return record


def _parsed(path: Path) -> dict[str, Any]:
    """Return the content of state.json; where it has a seal, that is intact."""
    try:
        text = (path / "state.json").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DamagedError(path, "it has no state.json") from error
    except UnicodeDecodeError as error:
        raise DamagedError(path, f"state.json is no text: {error}") from error
    if not text.strip():
        raise DamagedError(path, "state.json is empty")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"state.json is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise DamagedError(path, f"state.json holds a {type(record).__name__}")
    if not _SEALS.isdisjoint(record):
        if type(record.get("format")) is int and record["format"] > FORMAT:
            raise ValueError(
                f"{path} has format {record['format']}, written by a newer nvmm than this one,"
                f" which reads up to {FORMAT}"
            )
        if _sealed(record) != text:
            raise DamagedError(path, "state.json is not what was saved")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write state.json for the files that the folder has, as the last one of a checkpoint.

    record: step, layout, optimizer, state, number, and the steps `skipped` since the checkpoint
    before, if any, of values that JSON can hold; what `read_record` gave, say.
    """
    files = {name: _sha(folder, name) for name in sorted(_small_files(folder))}
    kept = {key: value for key, value in record.items() if key in _KEYS}
    kept["skipped"] = record.get("skipped", 0)
    plain = json.loads(json.dumps({"format": FORMAT, **kept, "files": files}))
    (folder / "state.json").write_text(_sealed(plain))


def check_files(path: Path, record: dict[str, Any]) -> None:
    """Raise DamagedError for a small file that is missing or is not the one that was saved.

    record: what `read_record` gave.
    """
    for name, saved in record.get("files", {}).items():
        try:
            now = _sha(path, name)
        except OSError as error:
            raise DamagedError(path, f"{name} cannot be read: {error}") from error
        if now != saved:
            raise DamagedError(path, f"{name} is not what was saved")


def _sealed(record: dict[str, Any]) -> str:
    """Return the text of a record with its seal: the SHA-256 of the text without it."""
    unsealed = json.dumps(record | {"seal": ""}, indent=1)
    seal = hashlib.sha256(unsealed.encode()).hexdigest()
    return json.dumps(record | {"seal": seal}, indent=1)


def _sha(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def _small_files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the names of all files but state.json and the data, those of folders included."""
    for entry in folder.glob("*"):
        if entry.is_dir():
            yield from _small_files(entry, f"{prefix}{entry.name}/")
        elif prefix or not (entry.name == "state.json" or entry.name.endswith(".distcp")):
            yield prefix + entry.name
