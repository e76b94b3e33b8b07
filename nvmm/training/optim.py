"""Freezing, learning rates, decay groups, and megatron-core's distributed AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nvmm.config.choices import require

Schedule = Literal["cosine", "linear", "constant"]
MomentsDtype = Literal["fp32", "bf16"]
MOMENTS: dict[MomentsDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_BETA_OF_BF16 = 0.99
"""bfloat16 rounds away changes of less than 1/256: a mean that keeps more than 255/256 of itself
each step could not fall."""
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "clip_grad")
_GROUP_KEYS = ("pattern", "learning_rate", "min_learning_rate", "weight_decay")


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule, for all parameters and for groups of them.

    Patterns are shell patterns of global parameter names (`vision.*`); one that matches nothing is
    an error.

    Args:
        learning_rate: peak, reached after `warmup_steps` optimizer steps that rise linearly.
        min_learning_rate: the rate at the end of the decay, `decay_steps` steps from the start of
            training (None: the run's max_steps).
        schedule: cosine | linear | constant.
        betas, eps, weight_decay: AdamW's. Vectors (norms, biases) and names ending in .bias are
            not decayed, as in Megatron-LM, nor are those that `no_decay` matches.
        clip_grad: largest global L2 norm of the gradients; 0 does not clip.
        freeze: parameters that are not trained.
        groups: [{pattern, learning_rate, min_learning_rate?, weight_decay?}]: parameters with a
            learning rate of their own. min_learning_rate defaults to the same fraction of it as
            the default group's. A parameter may match one group only.
        moments_dtype: fp32 | bf16, of AdamW's two running means; the arithmetic is fp32. bf16 takes
            4 bytes a parameter instead of 8 and needs betas of at most 0.99.
    """

    learning_rate: float
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    decay_steps: int | None = None
    schedule: Schedule = "cosine"
    betas: Sequence[float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    no_decay: Sequence[str] = ()
    freeze: Sequence[str] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    moments_dtype: MomentsDtype = "fp32"

    def __post_init__(self) -> None:
        _check_rates("optim", self.learning_rate, self.min_learning_rate)
        require("optim.schedule", self.schedule, Schedule)
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} must exceed"
                f" optim.warmup_steps={self.warmup_steps}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        require("optim.moments_dtype", self.moments_dtype, MomentsDtype)
        if self.moments_dtype == "bf16" and max(self.betas) > MOST_BETA_OF_BF16:
            raise ValueError(
                f"optim.betas={self.betas} must be at most {MOST_BETA_OF_BF16} with"
                " optim.moments_dtype=bf16"
            )
        if self.eps <= 0:
            raise ValueError(f"optim.eps={self.eps} must be positive")
        _check_not_negative("optim", {k: getattr(self, k) for k in _NOT_NEGATIVE})
        for index, group in enumerate(self.groups):
            _check_group(f"optim.groups[{index}]", group)

    def rates(self, step: int, decay_steps: int) -> list[float]:
        """Return the learning rate of 0-based `step` for each of `param_groups`."""
        return [
            learning_rate(
                step,
                peak=group.learning_rate,
                floor=group.min_learning_rate,
                warmup_steps=self.warmup_steps,
                decay_steps=decay_steps,
                schedule=self.schedule,
            )
            for group in self.param_groups()
        ]

    def param_groups(self) -> list[Group]:
        """Return the default group and then one for each of `groups`."""
        groups = [Group(None, self.learning_rate, self.min_learning_rate, self.weight_decay)]
        for group in self.groups:
            peak = group["learning_rate"]
            floor, decay = group.get("min_learning_rate"), group.get("weight_decay")
            if floor is None:
                floor = self.min_learning_rate * peak / self.learning_rate
            decay = self.weight_decay if decay is None else decay
            groups.append(Group(group["pattern"], peak, floor, decay))
        return groups


@dataclass(frozen=True)
class Group:
    """Parameters of one learning rate.

    pattern: of their global names; None for all parameters that no other group names.
    """

    pattern: str | None
    learning_rate: float
    min_learning_rate: float
    weight_decay: float


def _check_rates(key: str, peak: float, floor: float) -> None:
    if not peak > 0:
        raise ValueError(f"{key}.learning_rate={peak} must be positive")
    if not 0 <= floor <= peak:
        raise ValueError(
            f"{key}.min_learning_rate={floor} must lie between 0 and {key}.learning_rate={peak}"
        )


def _check_not_negative(key: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{key}.{name}={value} must not be negative")


def _check_group(key: str, group: Mapping[str, Any]) -> None:
    for name in group:
        if name not in _GROUP_KEYS:
            raise ValueError(f"{key}.{name} does not exist; keys are {', '.join(_GROUP_KEYS)}")
    for name in ("pattern", "learning_rate"):
        if group.get(name) is None:
            raise ValueError(f"{key}.{name} is missing")
    _check_rates(key, group["learning_rate"], group.get("min_learning_rate") or 0.0)
    _check_not_negative(key, {"weight_decay": group.get("weight_decay") or 0.0})


def learning_rate(
    step: int,
    *,
    peak: float,
    floor: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int,
    schedule: Schedule = "cosine",
) -> float:
    """Return the learning rate of the 0-based optimizer step `step`.

    Step k of the warm-up uses peak * (k + 1) / warmup_steps, so that no step is lost to a rate of
    zero; the decay starts at the peak and is at `floor` from `decay_steps` on.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    share = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * share
