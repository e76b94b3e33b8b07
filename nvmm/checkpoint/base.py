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


@dataclass(frozen=True)
class Base:
    """path: of the checkpoint. digest: SHA-256 of its weights' names, shapes, dtypes, checksums."""

    path: str
    digest: str

    @classmethod
    def of(cls, path: Path) -> Base:
        """The base that a checkpoint is. Raises ValueError when it has no checksums."""
        return cls(str(path.resolve()), _digest(path))

    @classmethod
    def saved(cls, state: Mapping[str, Any]) -> Base | None:
        """The base that a checkpoint's state names."""
        return cls(**state["base"]) if state.get("base") else None

    def located(
        self, moved: Path | None = None, what: str = "the base of this LoRA checkpoint"
    ) -> Base:
        """The same weights where they lie now: at the path, at `moved`, or, where that is a run
        directory, at one of its checkpoints.

        Raises ValueError when they are in none of these; `what` they are begins the message.
        """
        places = [Path(self.path)]
        if moved is not None:
            places += [moved, *sorted(moved.glob("checkpoints/step_*"))]
        for place in places:
            if (place / "state.json").is_file() and _digest(place) == self.digest:
                return Base(str(place.resolve()), self.digest)
        raise ValueError(
            f"{what}, weights of digest {self.digest[:12]}, is not at"
            f" {' or '.join(map(str, places))}; name the checkpoint that has them (init_from= in"
            " training, base= in evaluation and generation, --base in tools/convert.py)"
        )

    def names(self) -> set[str]:
        """Every weight it gives, those of its own base included."""
        return set(_weights(Path(self.path)))


def _weights(path: Path) -> dict[str, Any]:
    """Name -> dtype, shape and checksum, as loading `path` gives them."""
    try:
        own = json.loads((path / "weights.json").read_text())
        state = json.loads((path / "state.json").read_text())["state"]
    except OSError as error:
        raise ValueError(f"{path} has no checksums to know its weights by: {error}") from error
    base = Base.saved(state)
    return own if base is None else _weights(Path(base.located().path)) | own


def _digest(path: Path) -> str:
    content = json.dumps(_weights(path), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
