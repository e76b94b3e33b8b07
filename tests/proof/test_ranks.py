"""Ranks report results in order, and the first real failure."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nvmm.parallel.setup import Parallel
from tests.ranks import run_ranks


def _sum(rank: int, world_size: int, init: str, value: int) -> int:
    Parallel().initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    total = torch.tensor([rank + value])
    dist.all_reduce(total)
    return int(total) * 10 + rank


def _fail(rank: int, world_size: int, init: str) -> None:
    Parallel().initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(_sum, 2, 5) == [110, 111]


def test_failure_names_the_rank_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*the reason"):
        run_ranks(_fail, 2, timeout=60)


def test_sizes_that_do_not_divide_the_world() -> None:
    with pytest.raises(ValueError, match="world size 3 must be divisible"):
        Parallel(tensor_model_parallel_size=2).initialize(seed=0, rank=0, world_size=3)
