"""Cross-field rules of a config: pure functions over the resolved config, no torch.

Each rule yields every violation it sees. A key that is missing or of another type makes the rules
that need it silent: `nvmm.config.check` reports those by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nvmm.config.problem import Problem, View
from nvmm.config.rules import data, model, parallel, precision, rope, sound, training, transformer


def violations(config: Mapping[str, Any], world_size: int | None = None) -> list[Problem]:
    """Return a problem for every cross-field rule that `config` (resolved, plain) breaks."""
    view = View(config, world_size)
    return [problem for rule in RULES for problem in rule(view)]


RULES: tuple[Callable[[View], Iterator[Problem]], ...] = (
    *training.RULES,
    *parallel.RULES,
    *transformer.RULES,
    *rope.RULES,
    *model.RULES,
    *precision.RULES,
    *data.RULES,
    *sound.RULES,
)
