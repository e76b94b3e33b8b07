"""The comparison of a checkpoint's config with the current one: which keys may have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvmm.config.nested import differences
from nvmm.config.problem import View
from nvmm.config.signatures import value_of

FREE = (
    "parallel",
    "logger",
    "run",
    "resume",
    "checkpoint",
    "debug",
    "kernels",
    "model.max_sequence_length",
    "model.language.max_sequence_length",
    "data.num_workers",
    "data.on_error",
    "data.max_bad_fraction",
    "data.log_samples",
    "data.train.index_dir",
    "data.train.storage",
    "tokenizer.path",
    "trainer.log_interval",
    "trainer.validation_interval",
    "trainer.validation_batches",
    "trainer.max_minutes",
    "trainer.profile",
    "trainer.micro_batch_size",
)
"""Keys that may differ silently: they do not change what is learned (a tokenizer is compared by
its digest, not by its path)."""
_CONTEXT = "parallel.context_parallel_size"
FIXED = ("model", "lora", "objective", "tokenizer", "seed")
"""Keys that make another model or another run of it."""


@dataclass(frozen=True)
class Change:
    """One key whose value differs between a checkpoint's config and the current one."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.saved!r} -> {self.current!r}"


def changes(saved: dict[str, Any], current: dict[str, Any]) -> list[Change]:
    """List the keys in which two resolved configs differ; an absent key has its default."""
    return [Change(*entry) for entry in differences(saved, current, get=value_of)]


def compare(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[Change], list[Change]]:
    """Split the differences of two resolved configs.

    Returns (refused, notable): refused are keys under FIXED, notable are the others that change
    training (learning rate, batch size, precision, data ...). Keys under FREE are not listed, but
    for the context-parallel size of packed data: it decides what fits into a pack.
    """
    refused: list[Change] = []
    notable: list[Change] = []
    packed = View(current).get("data.pack") is True
    for change in changes(saved, current):
        if not _under(change.key, FREE) or (packed and change.key == _CONTEXT):
            (refused if _under(change.key, FIXED) else notable).append(change)
    return refused, notable


def loss_changes(
    saved: tuple[Mapping[str, Any], int],
    current: tuple[Mapping[str, Any], int],
    samples_in_loss: Callable[[int, int, int], int],
) -> list[Change]:
    """List the change of how many samples one loss compares, if there is one.

    Args:
        saved, current: config and number of ranks.
        samples_in_loss: the objective's (`nvmm.objectives.objective`).
    """
    counts = [samples_in_loss(*_batch_sizes(*each)) for each in (saved, current)]
    if counts[0] == counts[1]:
        return []
    key = "samples in one loss (objective, trainer.micro_batch_size, data-parallel ranks)"
    return [Change(key, *counts)]


def _batch_sizes(config: Mapping[str, Any], world_size: int) -> tuple[int, int, int]:
    """Return global batch, micro-batch and data-parallel size."""
    view = View(config, world_size)
    context = view.integer("parallel.context_parallel_size", 1) or 1
    model = view.size("tensor") * view.size("pipeline") * context
    global_batch = view.integer("trainer.global_batch_size", 1) or 1
    micro_batch = view.integer("trainer.micro_batch_size", 1) or 1
    return global_batch, micro_batch, max(1, world_size // model)


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
