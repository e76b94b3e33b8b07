"""Two towers at every layout equal one rank that holds the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from nvmm.proof.miniature import double
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": ONE_RANK,
    "dp2": Layout("DP2", 2),
    "dp2_overlap": Layout(
        "DP2 overlapped", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "tp2": Layout("TP2", 2, TP2),
    "tp2_sp": Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2": Layout("TP2+SPxPP2", 4, TP2 | PP2 | {"sequence_parallel": True}),
    "pp2_dp2": Layout("PP2xDP2", 4, PP2),
    "recompute": Layout("full recompute", 1, {"recompute_granularity": "full"}),
    "pp2_recompute": Layout("PP2, full recompute", 2, PP2 | {"recompute_granularity": "full"}),
}
# Vectors are single precision, and products of 64 numbers of size 1 multiply their rounding.
# In one direction a bias of all documents cancels in the softmax: its gradient is rounding alone.
RAW = {"temperature": 20.0, "normalize": False, "symmetric": True}
MODELS: dict[str, dict[str, Any]] = {
    "mean": double(tiny.contrastive(tiny.two_towers(), {})),
    "cls_raw": double(
        tiny.contrastive(tiny.two_towers(tiny.bidirectional(**tiny.SYNTHETIC_WORDS)), RAW)
    ),
    "decoder": double(tiny.contrastive(tiny.two_towers(tiny.embedder()), {})),
    "frozen_context": double(tiny.contrastive(tiny.two_towers(), {}, freeze=["context.*"])),
    "lora": double(
        tiny.contrastive(tiny.two_towers(), {})
        | {"lora": tiny.lora(["*.decoder.*linear_*"], train=["query.embedding.*"])}
    ),
}
STEPS = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """One rank with the rows of all four micro-batches in one: no GradCache, no gather."""
    known: dict[str, Result] = {}

    def get(model: str) -> Result:
        if model not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            known[model] = run(MODELS[model], ONE_RANK, num_steps=STEPS, merge=4, weights=weights)
        return known[model]

    return get


def slow(*row: Any) -> Any:
    return pytest.param(*row, marks=pytest.mark.slow)


ROWS = [
    ("mean", "tp2_sp", True),
    ("cls_raw", "pp2", False),
    *(slow("mean", name, False) for name in ("one", "dp2", "dp2_overlap", "tp2", "tp2_sp")),
    *(slow("mean", name, False) for name in ("pp2", "pp2_vp2", "tp2_sp_pp2", "recompute")),
    *(slow("mean", name, True) for name in ("one", "dp2", "pp2", "pp2_vp2", "tp2_sp_pp2")),
    *(slow("cls_raw", name, False) for name in ("dp2", "tp2", "pp2_recompute")),
    *(slow("cls_raw", name, True) for name in ("tp2_sp", "pp2_dp2")),
    *(slow("decoder", name, True) for name in ("tp2_sp", "pp2_vp2")),
    slow("decoder", "pp2_dp2", False),
    *(slow("frozen_context", name, True) for name in ("dp2_overlap", "tp2_sp", "pp2")),
    *(slow("lora", name, False) for name in ("dp2", "tp2_sp", "pp2")),
]


@pytest.mark.parametrize(("model", "layout", "packed"), ROWS)
def test_any_layout_equals_the_whole_batch_on_one_rank(
    model: str, layout: str, packed: bool, reference: Callable[[str], Result]
) -> None:
    """Four micro-batches by GradCache, padded or packed, against one of all rows."""
    expected = reference(model)
    options: dict[str, Any] = {"num_steps": STEPS, "packed": packed}
    result = run(MODELS[model], LAYOUTS[layout], reference=expected.weights, **options)
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0
    towers = {name.partition(".")[0] for name in expected.gradients[0]}
    assert towers == ({"query"} if model == "frozen_context" else {"query", "context"})


def with_blanks(config: dict[str, Any], *, packed: bool) -> list[list[Batch]]:
    """Every second micro-batch has a blank sample alone: one text, a query, of no sample."""
    steps = synthetic_steps(config, STEPS, 2, packed=packed)
    return [[part for batch in step for part in (batch, _blank(batch))] for step in steps]


def _blank(batch: Batch) -> Batch:
    extras = {name: torch.zeros_like(values[0]) for name, values in batch.extras.items()}
    text = Text(torch.tensor([7, 8, 9]), torch.ones(3), extras=extras)
    multiple = 4
    packed = batch.cu_seqlens is not None
    return collate([Sample((text,), -1)], pad_id=0, pad_multiple=multiple, packed=packed)


@pytest.mark.parametrize(
    ("layout", "packed"),
    [
        ("dp2_overlap", False),
        slow("dp2", True),
        slow("tp2_sp", True),
        slow("pp2", False),
        slow("pp2_vp2", True),
    ],
)
def test_micro_batches_of_queries_alone_neither_hang_nor_add_anything(
    layout: str, packed: bool, tmp_path: Path
) -> None:
    """At DP 2 one rank has no document in any step; other layouts meet such a micro-batch."""
    config, weights = MODELS["mean"], tmp_path / "weights"
    options: dict[str, Any] = {"num_steps": STEPS}
    expected = run(config, ONE_RANK, num_micro_batches=2, merge=2, weights=weights, **options)
    make_steps = partial(with_blanks, packed=packed)
    result = run(
        config, LAYOUTS[layout], make_steps=make_steps, reference=weights, num_micro_batches=4
    )
    # The blank's tokens are no sample's: only losses and gradients must be the reference's.
    failures = [f for f in compare(expected, result).failures if not f.startswith("tokens")]
    assert not failures, failures
    assert result.gradients[0].keys() == expected.gradients[0].keys()


def swap_towers() -> None:
    """Queries run through the context tower."""
    from nvmm.models import two_towers

    two_towers.QUERY = 1


def forget_the_order() -> None:
    """Vectors stay in the order of the towers."""
    from nvmm.models.two_towers import TwoTowers

    right = TwoTowers.forward

    def wrong(self: Any, batch: Batch, **options: Any) -> torch.Tensor:
        order = torch.cat([part.texts for part in self._parts(batch)])
        return right(self, batch, **options)[order]

    TwoTowers.forward = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [swap_towers, slow(forget_the_order)])
def test_planted_faults_are_caught(
    fault: Callable[[], None], reference: Callable[[str], Result]
) -> None:
    expected = reference("mean")
    faulty = run(MODELS["mean"], ONE_RANK, num_steps=STEPS, reference=expected.weights, fault=fault)
    assert any(f.startswith("losses at step 1") for f in compare(expected, faulty).failures)
