"""The comparison of a checkpoint's config with the current one: which keys may have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvmm.config.nested import differences
from nvmm.config.signatures import value_of

FREE = (
    "parallel",
    "logger",
    "run",
    "resume",
    "init_from",
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
    training (learning rate, batch size, data ...). Keys under FREE are not listed.
    """
    refused: list[Change] = []
    notable: list[Change] = []
    for change in changes(saved, current):
        if not _under(change.key, FREE):
            (refused if _under(change.key, FIXED) else notable).append(change)
    return refused, notable


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
