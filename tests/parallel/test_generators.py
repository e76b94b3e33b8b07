"""Dropout: the same mask on TP ranks where tensors are replicated, another one on DP ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.parallel import generators
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.equivalence import build_trainer
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
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


# -- which ranks share a mask -----------------------------------------------------------------

P = 0.25
PLACES = {
    "_embedding_dropout": "embedding",
    "_bias_dropout_add_func": "residual",
    "_add": "cross residual",
    "_attend_all": "attention",
    "_block": "cross attention",
}
"""The function that drops -> the place."""


def _watch(draws: list[tuple[str, bytes]]) -> None:
    """Note each place that drops, with the state of the generator that it draws from."""

    def noting(right: Any, rate: str) -> Any:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            share = kwargs.get(rate, args[1] if rate == "p" and len(args) > 1 else 0.0)
            active = kwargs.get("training", args[2] if rate == "p" and len(args) > 2 else True)
            if share and active:
                assert share == P
                name = frame.f_code.co_name
                if name == "_drop":
                    adapter = frame.f_locals["self"]
                    where = "tiles " if adapter.sees_own_tiles else ""
                    where += "SP " if adapter.sequence_parallel else ""
                    place = f"{where}adapter of a {'column' if adapter.is_column else 'row'}"
                else:
                    place = PLACES[name]
                draws.append((place, torch.get_rng_state().numpy().tobytes()))
            return right(*args, **kwargs)

        return wrong

    functional = torch.nn.functional
    functional.dropout = noting(functional.dropout, "p")
    attend = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = noting(attend, "dropout_p")


def _draws(rank: int, world_size: int, init: str, sizes: dict[str, Any]) -> Any:
    """Every draw of one training pass: [(place, state)]; and those of an evaluation."""
    Parallel(**sizes).initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    model = tiny.cross_attending()
    model["language"]["transformer"] |= {"hidden_dropout": P, "attention_dropout": P}
    config = tiny.config(model, attended="all") | {"parallel": sizes}
    config["lora"] = tiny.lora(["*linear*"], dropout=P)
    batch = synthetic_steps(config, 1, 1)[0][0]
    data = SyntheticData([[batch] * 2])  # of two data-parallel ranks each gets it
    trainer = build_trainer(config, data, Path("/nowhere"), global_batch_size=4)
    batches = next(trainer.batches("train", 0))
    draws: list[tuple[str, bytes]] = []
    _watch(draws)
    trainer.forward_backward(batches)
    training = list(draws)
    draws.clear()
    trainer.chunks[0].eval()
    trainer.forward_backward(batches)
    return training, draws


ALL = {*PLACES.values(), *(f"adapter of a {kind}" for kind in ("column", "row"))}
SP = {f"SP adapter of a {kind}" for kind in ("column", "row")}
TILES = {f"tiles adapter of a {kind}" for kind in ("column", "row")}
SPLIT = {"attention", "cross attention", "adapter of a row"}
TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("sizes", "different"),
    [
        (TP2, SPLIT | TILES),
        pytest.param(TP2 | {"encoder": "sharded"}, SPLIT, marks=pytest.mark.slow),
        # The connector's linears see all tokens of a tile on each rank.
        (TP2 | {"sequence_parallel": True}, ALL - {"adapter of a column"} | SP | TILES),
        ({"context_parallel_size": 2}, ALL),
        pytest.param({}, ALL, marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2_sharded", "tp2_sp", "cp2", "dp2"],
)
def test_ranks_share_the_masks_of_what_they_share(
    sizes: dict[str, Any], different: set[str]
) -> None:
    """Both ways: what is split over ranks gets other masks, what is whole on each the same."""
    (first, quiet), (second, _) = run_ranks(_draws, 2, sizes)
    assert [place for place, _ in first] == [place for place, _ in second]
    assert {place for place, _ in first} == ALL | ((SP | TILES) & different)
    assert quiet == []
    for (place, state), (_, other) in zip(first, second, strict=True):
        # Adapters of the connector and of a sharded encoder are as the decoder's without SP.
        assert (state != other) == (place in different), place
    # A state comes twice only where nothing was drawn in between.
    assert len({state for _, state in first}) == len(first)
