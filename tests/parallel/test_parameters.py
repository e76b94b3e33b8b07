"""Global names, shapes and slices; initial weights that depend on seed and name alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.parallel.parameters import build_chunks, match, sharded_parameters, unmatched
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.ranks import run_ranks

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tensor_model_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    (2, {}),
]


def _weights(
    rank: int, world_size: int, init: str, sizes: dict[str, Any], tied: bool, seed: int
) -> list[Any]:
    parallel = Parallel(**sizes)
    parallel.initialize(seed=seed, rank=rank, world_size=world_size, init_method=init)
    model = instantiate(tiny.language(share_embeddings_and_output_weights=tied), _convert_="all")
    chunks = build_chunks(model, parallel, Precision(), seed=seed)
    return [
        (p.name, p.global_shape, offset, piece.clone(), p.is_main_replica)
        for p in sharded_parameters(chunks)
        for offset, piece in p.pieces(p.parameter.data)
    ]


def _whole(parts: list[list[Any]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, shape, offset, piece, _ in part:
            index = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
            target = whole.setdefault(name, torch.full(shape, torch.nan))
            known = target[index]
            assert known.isnan().all() or torch.equal(known, piece), f"replicas of {name} differ"
            target[index] = piece
    return whole


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_do_not_depend_on_the_layout(tied: bool) -> None:
    expected = _whole(run_ranks(_weights, 1, {}, tied, 3))
    assert ("output_layer.weight" in expected) is not tied
    for world_size, sizes in LAYOUTS[1:]:
        parts = run_ranks(_weights, world_size, sizes, tied, 3)
        weights = _whole(parts)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), f"{name} under {sizes}"
        # Exactly one main replica of every piece in the world.
        main = [(name, offset) for part in parts for name, _, offset, _, is_main in part if is_main]
        assert len(main) == len(set(main))
        assert {name for name, _ in main} == expected.keys()


def test_initial_weights_depend_on_the_seed_and_have_the_right_spread() -> None:
    first, second = (_whole(run_ranks(_weights, 1, {}, False, seed)) for seed in (3, 4))
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    assert not torch.equal(first[name], second[name])
    assert first[name].std().item() == pytest.approx(0.1, rel=0.05)
    projection = first["decoder.layers.0.self_attention.linear_proj.weight"]
    assert projection.std().item() == pytest.approx(0.1 / 8**0.5, rel=0.05)
    assert torch.equal(first["decoder.final_layernorm.weight"], torch.ones(64))
    assert not torch.equal(first[name][0], first[name][1])


def test_gated_mlp_has_one_name_and_two_pieces() -> None:
    parts = run_ranks(_weights, 2, {"tensor_model_parallel_size": 2}, False, 3)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    offsets = sorted(piece[2][0] for part in parts for piece in part if piece[0] == name)
    assert offsets == [0, 48, 96, 144]


def test_patterns() -> None:
    assert match("*mlp*", "decoder.layers.0.mlp.linear_fc1.weight")
    assert not match("mlp", "decoder.layers.0.mlp.linear_fc1.weight")
    assert unmatched(["a.*", "b.*"], ["a.x"]) == ["b.*"]
