"""Cross-field rules of a config: pure functions over the resolved config, no torch.

Each rule yields every violation it sees. A key that is missing or of another type makes the rules
that need it silent: `nvmm.config.check` reports those by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nvmm.config.problem import Problem, View
from nvmm.config.rules import data, model, parallel, precision, training

_CHOICES = {
    **precision.CHOICES,
    **data.CHOICES,
    "backend": ("native", "transformer_engine"),
    "parallel.encoder": ("replicated", "sharded"),
    "parallel.recompute_granularity": ("full", "selective"),
    "parallel.recompute_method": ("uniform", "block"),
    **{
        f"kernels.{name}": ("auto", "eager", "fused")
        for name in (
            *("norm", "activation", "gated_residual", "linear_cross_entropy"),
            *("rope", "merge", "pixel_shuffle"),
            *("joint_norm", "adamw", "multi_tensor"),
        )
    },
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.moments_dtype": ("fp32", "bf16"),
    "checkpoint.optimizer": ("fully_reshardable", "dp_reshardable"),
    "trainer.on_nonfinite": ("stop", "skip"),
}


def violations(config: Mapping[str, Any], world_size: int | None = None) -> list[Problem]:
    """Every cross-field rule that `config` (resolved, plain) breaks."""
    view = View(config, world_size)
    return [problem for rule in RULES for problem in rule(view)]


def _choices(view: View) -> Iterator[Problem]:
    for key, choices in _CHOICES.items():
        value = view.get(key)
        if value is not None and value not in choices:
            yield Problem(key, value, f"must be one of {', '.join(choices)}")


RULES: tuple[Callable[[View], Iterator[Problem]], ...] = (
    *training.RULES,
    *parallel.RULES,
    _choices,
    *model.RULES,
    *precision.RULES,
    *data.RULES,
)
