"""What is wrong with a config, and how checks look into one. Standard library alone."""

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
        """The value at `key`, which has its constructor's default where it is absent; None when it
        is null or not set yet, or no constructor has it."""
        node: Any = self.config
        for part in key.split("."):
            node = value_of(node, part) if isinstance(node, Mapping) else None
        return None if node == MISSING else node

    def integer(self, key: str, default: int | None = None) -> int | None:
        """The whole number at `key`, else `default`."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def number(self, key: str) -> float | None:
        """The number at `key`, else None."""
        value = self.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def size(self, name: str) -> int:
        """A parallel size; 1 when it is not given or is no positive number."""
        return max(1, self.integer(f"parallel.{name}_model_parallel_size", 1) or 1)

    @property
    def language(self) -> str | None:
        """Key of the language model: `model`, or `model.language` of a model with encoders."""
        for key in ("model.language", "model"):
            if isinstance(self.get(f"{key}.transformer"), Mapping):
                return key
        return None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when none is."""
    candidates = sorted(set(names))
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if not found:
        found = [c for c in candidates if len(name) > 2 and (name in c or c in name)][:1]
    return found[0] if found else None


def divisors(number: int) -> str:
    """Every whole number that divides `number`, as a message lists them."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
