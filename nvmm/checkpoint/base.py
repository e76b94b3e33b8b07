"""The checkpoint whose frozen weights a LoRA run's checkpoints leave out, and name instead.

A LoRA run saves what it trains, and what its base (`init_from`) did not give; the rest is bit for
bit the base's. `state.json` holds the base's path and the digest of its weights, and loading
refuses any other weights in its place. A base may be a LoRA checkpoint with a base of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.checkpoint.contents import read_table
from nvmm.checkpoint.record import DamagedError, check_files, read_record


@dataclass(frozen=True)
class BaseCheckpoint:
    """A checkpoint that is known by its weights.

    path: its directory. digest: SHA-256 of its weights' names, shapes, dtypes and checksums.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: Path) -> BaseCheckpoint:
        """Return a checkpoint as a base. Raises DamagedError when its checksums are not whole."""
        return cls(str(path.resolve()), _digest(path))

    @classmethod
    def saved(cls, state: Mapping[str, Any]) -> BaseCheckpoint | None:
        """Return the base that a checkpoint's state names, None where it names none."""
        return cls(**state["base"]) if state.get("base") else None

    def located(
        self, moved: Path | None = None, what: str = "the base of this LoRA checkpoint"
    ) -> BaseCheckpoint:
        """Find the same weights where they lie now.

        They are looked for at the path, at `moved`, and in the checkpoints of `moved` where that is
        a run directory. Raises ValueError when they are in none of these; the message begins with
        `what` they are.
        """
        candidates = [Path(self.path)]
        if moved is not None:
            candidates += [moved, *sorted(moved.glob("checkpoints/step_*"))]
        damage = ""
        for path in candidates:
            try:
                if (path / "state.json").is_file() and _digest(path) == self.digest:
                    return BaseCheckpoint(str(path.resolve()), self.digest)
            except DamagedError as error:
                damage += f"; {error}"
        raise ValueError(
            f"{what}, weights of digest {self.digest[:12]}, is not at"
            f" {' or '.join(map(str, candidates))}; name the checkpoint that has them (init_from="
            f" in training, base= in evaluation and generation, --base in nvmm convert){damage}"
        )

    def names(self) -> set[str]:
        """Return the names of every weight it gives, those of its own base included."""
        return set(_weights(Path(self.path)))


def _weights(path: Path) -> dict[str, Any]:
    """Return name -> dtype, shape and checksum, as loading `path` gives them."""
    record = read_record(path)
    check_files(path, record)
    weights = read_table(path, "weights.json")
    base = BaseCheckpoint.saved(record["state"])
    return weights if base is None else _weights(Path(base.located().path)) | weights


def _digest(path: Path) -> str:
    content = json.dumps(_weights(path), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
