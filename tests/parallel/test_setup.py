"""Process groups: stalled collectives are named; what a layout gives a TransformerConfig."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from nvmm.parallel.setup import Parallel, Precision, stalled_collective
from tests.ranks import run_ranks


def _stall(rank: int, world_size: int, init: str) -> str | None:
    Parallel(timeout_minutes=0.05).initialize(
        seed=0, rank=rank, world_size=world_size, init_method=init
    )
    if rank == 1:
        time.sleep(6)
        return None
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return stalled_collective(error)
    return "no error"


def test_a_stalled_collective_is_named() -> None:
    message = run_ranks(_stall, 2)[0]
    assert message is not None
    assert message.startswith("all_reduce in _stall (")


def test_other_errors_are_not_taken_for_one() -> None:
    try:
        torch.ones(2) + torch.ones(3)
    except RuntimeError as error:
        assert stalled_collective(error) is None


def test_layouts_that_mcore_gets_silently_wrong_are_set_right() -> None:
    interleaved = Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    kwargs = interleaved.transformer_kwargs(Precision())
    assert kwargs["overlap_p2p_comm"] and not kwargs["batch_p2p_comm"]
    assert not kwargs["deallocate_pipeline_outputs"]
    assert kwargs["variable_seq_lengths"]
    assert kwargs["moe_token_dispatcher_type"] == "alltoall"
    plain = Parallel(pipeline_model_parallel_size=2).transformer_kwargs(Precision("bf16"))
    assert plain["batch_p2p_comm"] and not plain["overlap_p2p_comm"]
    assert plain["deallocate_pipeline_outputs"]
    assert plain["pipeline_dtype"] == plain["params_dtype"] == torch.bfloat16
    assert kwargs["calculate_per_token_loss"] and plain["calculate_per_token_loss"]


def test_the_encoder_has_no_sequence_or_pipeline_parallelism() -> None:
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    kwargs = Parallel(**sizes, sequence_parallel=True).encoder_kwargs(Precision())
    assert kwargs["tensor_model_parallel_size"] == 1
    assert not {"sequence_parallel", "pipeline_model_parallel_size"} & kwargs.keys()
    sharded = Parallel(**sizes, encoder="sharded").encoder_kwargs(Precision())
    assert sharded["tensor_model_parallel_size"] == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Parallel(encoder="split"),
            "parallel.encoder=split must be one of replicated",
        ),
        (lambda: Precision("fp16"), "precision.dtype=fp16 must be one of fp32, bf16"),
    ],
)
def test_unknown_options_are_named(build, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()
