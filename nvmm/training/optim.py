"""Freezing, learning rates, decay groups, and megatron-core's distributed AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nvmm.config.batch_sizes import BatchSizes
from nvmm.config.choices import require

Schedule = Literal["cosine", "linear", "minus_sqrt", "exponential", "inverse_sqrt", "constant"]
MomentsDtype = Literal["fp32", "bf16"]
MOMENTS: dict[MomentsDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_BETA_OF_BF16 = 0.99
"""bfloat16 rounds away changes of less than 1/256: a mean that keeps more than 255/256 of itself
each step could not fall."""
ENDLESS = ("inverse_sqrt", "constant")
"""Schedules that have no end, and so no decay_steps and no cooldown_steps."""
_LENGTHS = ("warmup", "decay", "cooldown")
_NOT_NEGATIVE = ("weight_decay", "clip_grad")
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
        schedule: the shape of the decay from peak to minimum: cosine | linear | minus_sqrt (one
            minus the root of the progress) | exponential (by the same factor each step; the minimum
            must be above 0) | inverse_sqrt (peak x sqrt(warmup / step), not below the minimum) |
            constant.
        cooldown_steps: the decay takes these last steps alone and the rate stays at its peak before
            them: warm-up, stable, decay (None: the decay begins behind the warm-up).
        warmup_tokens, decay_tokens, cooldown_tokens: the same lengths in tokens. The schedule then
            runs over the tokens of steps (`nvmm.config.batch_sizes`), which a batch ramp makes
            unequal. A schedule has lengths in steps or in tokens, not both.
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
    cooldown_steps: int | None = None
    warmup_tokens: int | None = None
    decay_tokens: int | None = None
    cooldown_tokens: int | None = None
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
        self._check_lengths()

    def _check_lengths(self) -> None:
        unit, other = ("tokens", "steps") if self.by_tokens else ("steps", "tokens")
        for name in _LENGTHS:
            if getattr(self, f"{name}_{other}"):
                raise ValueError(
                    f"optim.{name}_{other} stands beside lengths in {unit}; use one of both"
                )
        warmup, decay, cooldown = (getattr(self, f"{name}_{unit}") for name in _LENGTHS)
        for name, value in (("decay", decay), ("cooldown", cooldown)):
            if value is not None and value < 1:
                raise ValueError(f"optim.{name}_{unit}={value} must be at least 1")
            if value is not None and self.schedule in ENDLESS:
                raise ValueError(
                    f"optim.{name}_{unit} needs another optim.schedule than {self.schedule}"
                )
        warmup = warmup or 0
        _check_not_negative("optim", {f"warmup_{unit}": warmup})
        if decay is not None and decay <= warmup:
            raise ValueError(f"optim.decay_{unit}={decay} must exceed optim.warmup_{unit}={warmup}")
        if decay is not None and cooldown is not None and cooldown > decay - warmup:
            raise ValueError(
                f"optim.cooldown_{unit}={cooldown} must be at most the {decay - warmup} between"
                f" optim.warmup_{unit} and optim.decay_{unit}"
            )
        if self.schedule == "inverse_sqrt" and not warmup:
            raise ValueError(f"optim.warmup_{unit}=0 must be above 0 with schedule=inverse_sqrt")
        if self.schedule == "exponential":
            for group in self.param_groups():
                if group.min_learning_rate == 0:
                    where = "optim" if group.pattern is None else f"optim.groups: {group.pattern}"
                    raise ValueError(
                        f"{where}.min_learning_rate=0 must be above 0 with schedule=exponential"
                    )

    @property
    def by_tokens(self) -> bool:
        """True where the schedule's lengths are given in tokens."""
        return any(getattr(self, f"{name}_tokens") is not None for name in _LENGTHS)

    def end(self, max_steps: int, batch_sizes: BatchSizes | None = None) -> int:
        """Return where the decay ends, in steps or in tokens of the run."""
        if self.by_tokens:
            assert batch_sizes is not None, "a schedule by tokens has the run's batch sizes"
            return self.decay_tokens or batch_sizes.tokens_before(max_steps)
        return self.decay_steps or max_steps

    def rates(
        self, step: int, max_steps: int, batch_sizes: BatchSizes | None = None
    ) -> list[float]:
        """Return the learning rate of 0-based `step` for each of `param_groups`.

        max_steps, batch_sizes: of the run; a schedule by tokens needs the latter.
        """
        done, size = step, 1
        warmup, cooldown = self.warmup_steps, self.cooldown_steps
        end = self.end(max_steps, batch_sizes)
        if self.by_tokens and batch_sizes is not None:
            done = batch_sizes.tokens_before(step)
            size = batch_sizes.tokens_before(step + 1) - done
            warmup, cooldown = self.warmup_tokens or 0, self.cooldown_tokens
        return [
            learning_rate(
                done,
                peak=group.learning_rate,
                floor=group.min_learning_rate,
                warmup_steps=warmup,
                decay_steps=end,
                cooldown_steps=cooldown,
                schedule=self.schedule,
                step_size=size,
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
    cooldown_steps: int | None = None,
    schedule: Schedule = "cosine",
    step_size: int = 1,
) -> float:
    """Return the learning rate of the 0-based optimizer step `step`.

    Step k of the warm-up uses peak * (k + 1) / warmup_steps, so that no step is lost to a rate of
    zero; the decay starts at the peak and is at `floor` from `decay_steps` on.

    step_size: 1; of a schedule by tokens the tokens of this step, and all else is in tokens too:
    `step` those before it.
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + step_size) / warmup_steps)
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(warmup_steps / step))
    start = warmup_steps if cooldown_steps is None else decay_steps - cooldown_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, decay_steps - start)))
    if schedule == "exponential":
        return float(peak * (floor / peak) ** progress)
    return floor + (peak - floor) * _SHARES[schedule](progress)


_SHARES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""What is left of the way from peak to floor, at a progress from 0 to 1."""
