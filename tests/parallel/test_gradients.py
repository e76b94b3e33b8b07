"""Replicated encoders' gradients are summed over TP; missing gradients are named."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from nvmm.parallel.gradients import GradientCheck, sum_replicated_gradients
from nvmm.parallel.setup import Parallel
from tests.ranks import run_ranks


def _sum(rank: int, world_size: int, init: str) -> list[list[float]]:
    Parallel(tensor_model_parallel_size=2).initialize(
        seed=0, rank=rank, world_size=world_size, init_method=init
    )
    model = torch.nn.Module()
    for name, marked in (("dealt", True), ("whole", False)):
        parameter = Parameter(torch.zeros(2))
        parameter.main_grad = torch.full((2,), float(rank + 1))  # type: ignore[attr-defined]
        parameter.sum_gradients_over_tensor_parallel = marked  # type: ignore[attr-defined]
        model.register_parameter(name, parameter)
    sum_replicated_gradients([model])
    return [p.main_grad.tolist() for p in (model.dealt, model.whole)]


def test_only_marked_gradients_are_summed() -> None:
    assert run_ranks(_sum, 2) == [[[3.0, 3.0], [1.0, 1.0]], [[3.0, 3.0], [2.0, 2.0]]]


class _Model(torch.nn.Module):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.second = torch.nn.Linear(2, 2, bias=False)
        self.unused = torch.nn.Linear(2, 2, bias=False)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(hidden.detach() if self.cut else hidden)

    def sharded_state_dict(self, metadata: object = None) -> dict[str, object]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        return {n: ShardedTensor.from_rank_offsets(n, p) for n, p in self.named_parameters()}


def _missing(rank: int, world_size: int, init: str, cut: bool) -> list[str]:
    Parallel().initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    model = _Model(cut)
    with GradientCheck([model]) as check:
        model(torch.ones(1, 2)).sum().backward()
    check.raise_on_missing()
    return check.missing()


def test_a_used_parameter_without_gradient_is_named_and_an_unused_one_is_not() -> None:
    assert run_ranks(_missing, 1, False) == [[]]
    with pytest.raises(RuntimeError, match=r"got no gradient: first\.weight\n"):
        run_ranks(_missing, 1, True)
