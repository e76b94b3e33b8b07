"""Collectives over Python values."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the `values` of every rank; collective."""
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return gathered
