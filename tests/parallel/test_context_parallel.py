"""The zigzag deal of rows and packed segments, and the gather of a whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nvmm.batch import Batch
from nvmm.parallel.context_parallel import gather, in_order, positions, shard, share
from nvmm.parallel.setup import Parallel
from tests.ranks import run_ranks


def batch(rows: int, length: int, bounds: list[int] | None = None) -> Batch:
    """Token t of row i is 100 i + t; half of the labels count."""
    tokens = torch.arange(length) + 100 * torch.arange(rows)[:, None]
    lengths = [length] * rows if bounds is None else torch.diff(torch.tensor(bounds)).tolist()
    return Batch(
        tokens=tokens,
        labels=tokens + 1,
        loss_mask=(tokens % 2).float(),
        position_ids=torch.arange(length).repeat(rows, 1),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        sample_ids=7 + torch.arange(len(lengths)),
        owners=torch.arange(len(lengths)),
        cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
    )


def test_rows_are_dealt_in_a_zigzag() -> None:
    rows = batch(2, 12)
    parts = [positions(rows, 3, rank).tolist() for rank in range(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_packed_rows_are_dealt_segment_by_segment() -> None:
    row = batch(1, 16, [0, 4, 12, 16])
    assert positions(row, 2, 0).tolist() == [0, 3, 4, 5, 10, 11, 12, 15]
    assert positions(row, 2, 1).tolist() == [1, 2, 6, 7, 8, 9, 13, 14]


@pytest.mark.parametrize("bounds", [None, [0, 4, 14, 16]])
def test_odd_lengths_are_refused(bounds: list[int] | None) -> None:
    length = 14 if bounds is None else 16
    what = "rows" if bounds is None else "packed segments"
    with pytest.raises(ValueError, match=rf"size=2 needs {what} .* of 4, got 1\d; samples \[7\b"):
        positions(batch(1, length, bounds), 2, 0)


@pytest.mark.parametrize(
    ("parallel", "row", "segment"),
    [
        ({}, 1, 1),
        ({"tensor_model_parallel_size": 4}, 1, 1),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4, 1),
        ({"context_parallel_size": 3}, 6, 6),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 3}, 4, 4),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 3,
                "sequence_parallel": True,
            },
            12,
            4,
        ),
    ],
)
def test_pads_follow_the_layout(parallel: dict[str, Any], row: int, segment: int) -> None:
    layout = Parallel(**parallel)
    assert layout.sequence_multiple == row
    assert layout.segment_multiple == segment


def _gather(
    rank: int, world_size: int, init: str, layout: dict[str, int]
) -> tuple[int, list[list[int]], list[int], bool]:
    from megatron.core import parallel_state

    Parallel(**layout).initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    group = parallel_state.get_context_parallel_group()
    row = batch(1, 8)
    mine = share(row)
    hidden = torch.randn(8, 1, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    part = shard(hidden, row)
    whole = in_order(gather(part, group))
    weights = torch.arange(8.0)[:, None, None] * (group.rank() + 1)
    (whole * weights).sum().backward()
    assert hidden.grad is not None
    return (
        int(mine.loss_mask.sum()),
        [mine.tokens[0].tolist(), mine.labels[0].tolist(), mine.position_ids[0].tolist()],
        hidden.grad[:, 0, 0].int().tolist(),
        torch.equal(whole, hidden),
    )


@pytest.mark.parametrize(
    "layout",
    [{"context_parallel_size": 2}, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}],
    ids=["world", "sub-group"],
)
def test_gather_restores_the_sequence_and_sums_gradients(layout: dict[str, int]) -> None:
    tensor = layout.get("tensor_model_parallel_size", 1)
    results = run_ranks(_gather, 2 * tensor, layout)
    own = [[0, 1, 6, 7], [2, 3, 4, 5]]
    for rank, (count, parts, gradient, equal) in enumerate(results):
        index = own[rank // tensor]
        assert parts == [index, [i + 1 for i in index], index]
        assert count == 2
        # Weights t and 2 t of the two ranks, summed where this rank holds the position.
        assert gradient == [3 * t if t in index else 0 for t in range(8)]
        assert equal


def test_one_rank_keeps_the_batch() -> None:
    assert run_ranks(_one, 1) == [True]


def _one(rank: int, world_size: int, init: str) -> bool:
    Parallel().initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    row, hidden = batch(2, 5), Tensor([1.0])
    return share(row) is row and shard(hidden, row) is hidden
