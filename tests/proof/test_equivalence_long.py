"""Long rows at CP 4 and other layouts: documents that straddle all parts, and scaled positions.

In fp64: the scalings by length make angles of a row depend on all of it, and rounding must not
hide one that is a token off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.parallel.context_parallel import positions
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny

FP64 = {
    "precision": {
        "_target_": "nvmm.parallel.setup.Precision",
        **{"dtype": "fp64", "grad_reduce_in_fp32": False},
    }
}
CP4, TP2 = {"context_parallel_size": 4}, {"tensor_model_parallel_size": 2}
LAYOUTS = {
    "cp4": Layout("CP4", 4, CP4),
    "cp4_recompute": Layout("CP4, full recompute", 4, CP4 | {"recompute_granularity": "full"}),
    "cp4_selective": Layout(
        "CP4, selective recompute", 4, CP4 | {"recompute_granularity": "selective"}
    ),
    "cp2_tp2_sp": Layout(
        "CP2xTP2+SP", 4, {"context_parallel_size": 2, "sequence_parallel": True} | TP2
    ),
    "pp2_vp2": Layout(
        "PP2xVPP2",
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "dp2": Layout("DP2", 2),
}
ROOM, ORIGINAL = "nvmm.modules.rope_scaling.", {"original_max_position_embeddings": 12}


def scaled(kind: str | None, **fields: Any) -> dict[str, Any]:
    scaling = None if kind is None else {"_target_": ROOM + kind, **fields}
    return tiny.config(tiny.language(rope_scaling=scaling)) | FP64


MODELS = {
    "plain": scaled(None),
    "yarn": scaled("YaRN", factor=4.0, **ORIGINAL),
    "dynamic": scaled("DynamicNTK", factor=4.0, **ORIGINAL),
    "longrope": scaled(
        "LongRoPE", short_factor=[1.0] * 8, long_factor=[8.0] * 8, factor=4.0, **ORIGINAL
    ),
}
ROWS = [
    ("dynamic_packed", "cp4"),
    ("yarn", "cp4"),
    ("dynamic", "pp2_vp2"),
]
SLOW_ROWS = [
    row
    for row in itertools.product([*MODELS, *(f"{name}_packed" for name in MODELS)], LAYOUTS)
    if row not in ROWS
]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Result, Path]]:
    """The one-rank result of a model and its checkpoint, computed once."""
    known: dict[str, tuple[Result, Path]] = {}

    def get(model: str) -> tuple[Result, Path]:
        if model not in known:
            folder = tmp_path_factory.mktemp(model) / "weights"
            plain, packed = model.removesuffix("_packed"), model.endswith("packed")
            known[model] = (run(MODELS[plain], ONE_RANK, weights=folder, packed=packed), folder)
        return known[model]

    return get


@pytest.mark.parametrize(
    ("model", "layout"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)],
)
def test_layout_equals_one_rank(
    model: str, layout: str, reference: Callable[[str], tuple[Result, Path]]
) -> None:
    expected, weights = reference(model)
    config, packed = MODELS[model.removesuffix("_packed")], model.endswith("packed")
    comparison = compare(expected, run(config, LAYOUTS[layout], reference=weights, packed=packed))
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0


def test_every_document_straddles_all_parts_and_some_are_scaled() -> None:
    """What the rows above compare: each rank has a part of each document of a packed row."""
    config = MODELS["dynamic"] | {"parallel": CP4}
    lengths = set()
    for batch in (b for step in synthetic_steps(config, 5, 4, packed=True) for b in step):
        assert batch.cu_seqlens is not None
        for rank in range(4):
            mine = positions(batch, 4, rank)
            for first, last in itertools.pairwise(batch.cu_seqlens.tolist()):
                assert ((mine >= first) & (mine < last)).any()
        lengths |= set(batch.lengths[batch.lengths > 0].tolist())
    assert min(lengths) <= 12 < max(lengths), lengths


def test_scalings_give_other_losses(reference: Callable[[str], tuple[Result, Path]]) -> None:
    found = [torch.tensor(reference(name)[0].losses) for name in ("yarn", "dynamic")]
    assert not torch.allclose(*found, rtol=1e-4)
