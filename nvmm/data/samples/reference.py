"""Log-probabilities that job=score gave to the texts of preference samples."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Outputs of job=score, as one.

    rows: key of a sample -> log-probability and number of supervised tokens of each text, or what
    was wrong with the sample. builder: digest of the builder that made the samples.
    """

    rows: dict[str, list[tuple[float, int]] | str]
    builder: str


def read(folders: str | Sequence[str]) -> Scores:
    """Read the outputs in these folders, once a process.

    Raises ValueError for an output that is not whole or is of something else, for outputs of
    several checkpoints or builders, and for a key that has several rows.
    """
    return _read((folders,) if isinstance(folders, str) else tuple(folders))


@functools.cache
def _read(folders: tuple[str, ...]) -> Scores:
    rows: dict[str, list[tuple[float, int]] | str] = {}
    origins: dict[tuple[str, str], str] = {}
    for name in folders:
        folder = Path(name).expanduser()
        manifest = _manifest(folder)
        made_by = manifest["identity"]["checkpoint"]
        origins[made_by["weights"], made_by["builder"]] = name
        for number, digest in enumerate(manifest["parts"]):
            for row in _rows(folder / f"part-{number:05d}.arrow", digest):
                if row["key"] in rows:
                    raise ValueError(
                        f"build.reference={name}: two samples have the key {row['key']}; keys must"
                        " differ over all shards"
                    )
                rows[row["key"]] = row["error"] or _scored(row)
    if len(origins) > 1:
        listed = ", ".join(origins.values())
        raise ValueError(f"build.reference: {listed} are of several checkpoints or builders")
    return Scores(rows, next(iter(origins))[1])


def _scored(row: dict[str, Any]) -> list[tuple[float, int]] | str:
    """Return log-probability and tokens of each text, or what is wrong with them."""
    if not all(map(math.isfinite, row["log_probabilities"])):
        return f"log-probabilities {row['log_probabilities']} are not finite"
    return list(zip(row["log_probabilities"], row["tokens"], strict=True))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a whole output of job=score over samples of several texts."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        job, made_by = manifest["identity"]["job"], manifest["identity"]["checkpoint"]
        _ = made_by["weights"], made_by["builder"]
        scored = job["_target_"].endswith(".Score") and not job.get("continuations")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"build.reference={folder} is no output of job=score ({error!r})"
        ) from error
    if not scored:
        raise ValueError(f"build.reference={folder} is the output of another job than job=score")
    if manifest["parts"] is None:
        raise ValueError(f"build.reference={folder} is not whole: run its job again, which goes on")
    return manifest


def _rows(path: Path, digest: str) -> list[dict[str, Any]]:
    """Return the rows of a part, if it has the bytes that were written."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"{error}: build.reference needs pip install 'nvmm[jobs]'") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path} is damaged")
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    wanted = {"key", "log_probabilities", "tokens", "error"}
    if not wanted <= set(table.column_names):
        raise ValueError(
            f"{path} has no log-probability of each text; score with job.preferences=drop"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
