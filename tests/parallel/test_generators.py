"""Dropout: the same mask on TP ranks where tensors are replicated, another one on DP ranks."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate

from nvmm.parallel import generators
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny
from tests.ranks import run_ranks


def _hidden(rank: int, world_size: int, init: str, sizes: dict[str, Any]) -> Any:
    parallel = Parallel(**sizes)
    parallel.initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    config = tiny.language()
    config["transformer"] |= {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    [model] = build_chunks(instantiate(config, _convert_="all"), parallel, Precision(), seed=1)
    batch = synthetic_steps({"model": config}, 1, 1)[0][0]
    with generators.replayed():
        first = model(batch, output="hidden")
    second = model(batch, output="hidden")
    third = model(batch, output="hidden")
    second.sum().backward()
    norm = model.decoder.layers[0].self_attention.linear_proj.weight.grad
    gradient = model.decoder.final_layernorm.weight.grad
    return first.detach(), second.detach(), third.detach(), gradient, norm


def test_tensor_parallel_ranks_share_the_masks_of_replicated_tensors() -> None:
    (first, second, third, gradient, _), other = run_ranks(
        _hidden, 2, {"tensor_model_parallel_size": 2}
    )
    assert torch.equal(second, other[1])
    assert torch.equal(gradient, other[3])
    # Masks are drawn anew, and replayed inside replayed().
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_data_parallel_ranks_draw_different_masks() -> None:
    (_, second, *_), (_, other, *_) = run_ranks(_hidden, 2, {})
    assert not torch.equal(second, other)


def test_sequence_parallel_ranks_hold_different_masks_of_one_sequence() -> None:
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    (_, second, *_), (_, other, *_) = run_ranks(_hidden, 2, sizes)
    assert second.shape == other.shape
    assert not torch.equal((second == 0), (other == 0)) or not torch.equal(second, other)
