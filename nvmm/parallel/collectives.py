"""Collectives over Python values."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def gather(values: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return the `values` of every rank of a group, by default of all; collective."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, values, group=group)
    return gathered
