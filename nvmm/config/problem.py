"""A problem of a config, and typed look-ups in one. This imports the standard library alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nvmm.config.signatures import value_of

MISSING = "???"
"""OmegaConf's mark of a value that the user must give."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config. allowed: a clause that says what the key must be."""

    key: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        value = "null" if self.value is None else self.value
        return f"{self.key}={value} {self.allowed}"


@dataclass(frozen=True)
class View:
    """Typed look-ups by dotted key in a resolved config.

    world_size: number of ranks, or None where it is not known yet.
    """

    config: Mapping[str, Any]
    world_size: int | None = None

    def get(self, key: str) -> Any:
        """Return the value at `key`, or its constructor's default where it is absent.

        Returns None when it is null or not set yet, or no constructor has it.
        """
        node: Any = self.config
        for part in key.split("."):
            node = value_of(node, part) if isinstance(node, Mapping) else None
        return None if node == MISSING else node

    def integer(self, key: str, default: int | None = None) -> int | None:
        """Return the whole number at `key`, else `default`."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def number(self, key: str) -> float | None:
        """Return the number at `key`, else None."""
        value = self.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def size(self, name: str) -> int:
        """Return a parallel size; 1 when it is not given or is no positive number."""
        return max(1, self.integer(f"parallel.{name}_model_parallel_size", 1) or 1)

    @property
    def language(self) -> str | None:
        """The key of the language model: `model`, or `model.language` of a model with encoders."""
        for key in ("model.language", "model"):
            if isinstance(self.get(f"{key}.transformer"), Mapping):
                return key
        return None

    @property
    def max_sequence_length(self) -> int | None:
        """The longest sequence that the language model takes; None without such a model."""
        return self.integer(f"{self.language}.max_sequence_length") if self.language else None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name most like `name`, or None when none is."""
    candidates = sorted(set(names))
    similar = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if not similar:
        similar = [c for c in candidates if len(name) > 2 and (name in c or c in name)]
    return similar[0] if similar else None


def divisors(number: int) -> str:
    """Return every whole number that divides `number`, as a message lists them."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
