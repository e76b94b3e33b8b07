"""A step's batches reach the ranks of a model-parallel group, media only the first stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE
from nvmm.parallel.broadcast import broadcast_batches, is_reader
from nvmm.parallel.setup import Parallel
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _steps() -> list[Any]:
    steps = synthetic_steps(tiny.config(tiny.multimodal()), 1, 2)[0]
    extras = {"weights": torch.rand(3, dtype=torch.float64), "flags": torch.tensor([True, False])}
    return [steps[0].replace(extras=extras), steps[1]]


def _share(rank: int, world_size: int, init: str, sizes: dict[str, int]) -> Any:
    Parallel(**sizes).initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    torch.manual_seed(0)
    batches = _steps() if is_reader() else None
    return broadcast_batches(batches, None, CPU)


def _fail(rank: int, world_size: int, init: str) -> str:
    Parallel(tensor_model_parallel_size=2).initialize(
        seed=0, rank=rank, world_size=world_size, init_method=init
    )
    try:
        broadcast_batches(None, "a.tar:7 is damaged" if is_reader() else None, CPU)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stages", [1, 2])
def test_every_rank_gets_the_reader_s_batches(stages: int) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": stages}
    results = run_ranks(_share, 2 * stages, sizes)
    torch.manual_seed(0)
    expected = _steps()
    for rank, batches in enumerate(results):
        for batch, wanted in zip(batches, expected, strict=True):
            for name in ("tokens", "labels", "loss_mask", "position_ids", "lengths", "sample_ids"):
                value = getattr(batch, name)
                assert torch.equal(value, getattr(wanted, name)), name
                assert value.dtype == getattr(wanted, name).dtype
            assert batch.extras.keys() == wanted.extras.keys()
            for key, value in wanted.extras.items():
                assert torch.equal(batch.extras[key], value)
        media = batches[0].media
        if rank < 2:
            assert torch.equal(media[IMAGE].values, expected[0].media[IMAGE].values)
            assert media[IMAGE].placeholder_id == expected[0].media[IMAGE].placeholder_id
        else:
            assert media == {}
        assert batches[1].media == {}


def test_a_reader_s_failure_is_raised_on_every_rank() -> None:
    assert run_ranks(_fail, 2) == ["a.tar:7 is damaged"] * 2
