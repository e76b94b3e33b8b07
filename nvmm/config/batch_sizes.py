"""The global batch size of every step: one size, or the stages of a ramp and then that size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvmm.config.problem import Problem

RAMP = "trainer.batch_ramp"
_KEYS = ("global_batch_size", "steps", "tokens")


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size of each step, a function of the step's number alone.

    last: samples of a step after the ramp (packs where the data are packed). stages: samples of a
    step, and number of steps, of each stage of the ramp. sequence_length: tokens of a full row;
    a sample counts as so many tokens, whatever it has, so that counts are known in advance.
    """

    last: int
    stages: tuple[tuple[int, int], ...] = ()
    sequence_length: int | None = None

    @staticmethod
    def of(size: int | BatchSizes) -> BatchSizes:
        """Return `size` itself, or the sizes of a run that has that one."""
        return size if isinstance(size, BatchSizes) else BatchSizes(size)

    @staticmethod
    def read(
        last: int, ramp: Sequence[Mapping[str, Any]], sequence_length: int | None
    ) -> BatchSizes:
        """Return the sizes of `trainer.global_batch_size` and `trainer.batch_ramp`.

        A stage given in tokens has the number of steps that comes nearest to them.

        Raises ValueError for a stage that `ramp_problems` refuses.
        """
        for problem in ramp_problems(ramp, sequence_length):
            raise ValueError(str(problem))
        stages = []
        for stage in ramp:
            size, steps = stage["global_batch_size"], stage.get("steps")
            if steps is None:
                step = BatchSizes(size, (), sequence_length).tokens_before(1)
                steps = (2 * stage["tokens"] + step) // (2 * step)
            stages.append((size, steps))
        return BatchSizes(last, tuple(stages), sequence_length)

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> BatchSizes:
        """Return the sizes of a resolved config. Raises as `read`, and KeyError without a size."""
        trainer, data = config["trainer"], config.get("data") or {}
        ramp = trainer.get("batch_ramp") or ()
        return BatchSizes.read(trainer["global_batch_size"], ramp, data.get("sequence_length"))

    def at(self, step: int) -> int:
        """Return the samples of 0-based `step`."""
        for size, steps in self.stages:
            if step < steps:
                return size
            step -= steps
        return self.last

    def before(self, step: int) -> int:
        """Return the samples of all steps before 0-based `step`."""
        samples = 0
        for size, steps in self.stages:
            samples += size * min(step, steps)
            step -= min(step, steps)
        return samples + self.last * step

    def steps_of(self, samples: int) -> int:
        """Return the whole steps that so many samples make, from step 0 on."""
        done = 0
        for size, steps in self.stages:
            whole = min(steps, samples // size)
            done, samples = done + whole, samples - whole * size
            if whole < steps:
                return done
        return done + samples // self.last

    def tokens_before(self, step: int) -> int:
        """Return `before(step)` in tokens. Raises ValueError without a sequence length."""
        if self.sequence_length is None:
            raise ValueError("tokens of a step need data.sequence_length")
        return self.before(step) * self.sequence_length

    @property
    def all(self) -> list[tuple[str, int]]:
        """The key and the value of every size, in the order of the steps."""
        stages = [
            (f"{RAMP}[{index}].global_batch_size", size)
            for index, (size, _) in enumerate(self.stages)
        ]
        return [*stages, ("trainer.global_batch_size", self.last)]

    def __str__(self) -> str:
        end, parts = 0, []
        for size, steps in self.stages:
            end += steps
            parts.append(f"{size} to step {end}")
        return ", ".join([*parts, f"{self.last}{' from there on' if parts else ''}"])


def ramp_problems(ramp: Any, sequence_length: int | None) -> Iterator[Problem]:
    """Yield what is wrong with `trainer.batch_ramp`.

    sequence_length: `data.sequence_length`; None where it is not known yet.
    """
    if not isinstance(ramp, Sequence) or isinstance(ramp, str):
        yield Problem(RAMP, ramp, "must be a list of {global_batch_size, steps or tokens}")
        return
    for index, stage in enumerate(ramp):
        key = f"{RAMP}[{index}]"
        if not isinstance(stage, Mapping):
            yield Problem(key, stage, "must be {global_batch_size: ..., steps or tokens: ...}")
            continue
        unknown = [name for name in stage if name not in _KEYS]
        for name in unknown:
            yield Problem(f"{key}.{name}", stage[name], f"is unknown; use {', '.join(_KEYS)}")
        lengths = [name for name in ("steps", "tokens") if stage.get(name) is not None]
        if not unknown and len(lengths) != 1:
            yield Problem(key, dict(stage), "must have a length: either steps or tokens")
            continue
        wrong = [
            name for name in ("global_batch_size", *lengths) if not _at_least_one(stage.get(name))
        ]
        for name in wrong:
            allowed = "must be a whole number of at least 1"
            yield Problem(f"{key}.{name}", stage.get(name), allowed)
        if unknown or wrong or lengths != ["tokens"] or not sequence_length:
            continue
        step = stage["global_batch_size"] * sequence_length
        if stage["tokens"] < step:
            allowed = f"must be at least the {step} tokens of one step"
            yield Problem(f"{key}.tokens", stage["tokens"], allowed)


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
