"""Hand-worked numbers of the next-token objective."""

from __future__ import annotations

import torch

from nvmm.batch import Batch
from nvmm.objectives.next_token import NextToken
from nvmm.objectives.objective import Objective


def _batch(mask: list[list[float]]) -> Batch:
    loss_mask = torch.tensor(mask)
    zeros = torch.zeros_like(loss_mask, dtype=torch.int64)
    lengths = torch.full((len(mask),), len(mask[0]))
    return Batch(
        zeros, zeros, loss_mask, zeros, lengths, torch.arange(len(mask)), torch.arange(len(mask))
    )


def test_sum_and_int_count() -> None:
    output = torch.tensor([[1.0, 2.0, 4.0, 7.0], [8.0, 16.0, 32.0, 9.0]])
    total, count, metrics = NextToken().loss(output, _batch([[0, 1, 1, 0], [0, 0, 0.5, 0]]))
    assert total.item() == 2 + 4 + 16
    assert count.item() == 3
    assert count.dtype == torch.int
    assert metrics["loss"].tolist() == [22.0, 3.0]


def test_tokens_split_over_two_batches_give_the_same_mean() -> None:
    output = torch.rand(2, 5)
    mask = [[1.0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    whole = NextToken().loss(output, _batch(mask))
    parts = [NextToken().loss(output[i : i + 1], _batch(mask[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(
        whole[0] / whole[1], sum(p[0] for p in parts) / sum(p[1] for p in parts)
    )


def test_it_is_an_objective() -> None:
    assert isinstance(NextToken(), Objective)
