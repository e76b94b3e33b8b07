"""Preference losses at every layout equal one rank; step 0's margin is exactly 0 in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from tests import tiny

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2_sp": Layout("TP2+SP", 2, TP2_SP),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "dp2": Layout("DP2", 2),
    "cp2": Layout("CP2", 2, {"context_parallel_size": 2}),
}
KTO = "kto.Kto"
RPO: tuple[str, dict[str, Any]] = ("preference.Rpo", {"beta": 0.5, "sft_weight": 1e-2})
ADAPTERS = {"lora": tiny.lora(["*decoder.*linear*"], train=["output*"])}
MODELS: dict[str, dict[str, Any]] = {
    "dpo": tiny.preference(tiny.language(), options={"sft_weight": 1e-2, "label_smoothing": 0.1}),
    "ipo": tiny.preference(tiny.language(), "preference.Ipo", {"length_normalised": True}),
    "rpo": tiny.preference(tiny.language(), *RPO),
    "kto": tiny.preference(tiny.language(), KTO, {"undesirable_weight": 0.5}),
    "dpo_lora": tiny.preference(tiny.language()) | ADAPTERS,
    "dpo_images": tiny.preference(tiny.multimodal()),
    "rpo_images": tiny.preference(tiny.multimodal(), *RPO),
    "kto_images": tiny.preference(tiny.multimodal(), KTO),
}
References = Callable[[str, bool], Result]
STEPS = 3


def watch_margins() -> None:
    """Fail where the first step's gain of any answer is not 0 to the last bit."""
    from nvmm.objectives import kto, preference

    for owner in (preference.PairwiseLoss, kto.Kto):
        right = owner.loss
        seen: list[Any] = []

        def loss(self: Any, output: Any, batch: Any, right: Any = right, seen: Any = seen) -> Any:
            seen.append(batch)
            if len(seen) <= (4 if _is_whole() else 2):
                sums = preference.log_probabilities(output, batch)[0]
                if not bool((sums == batch.extras["reference"]).all()):
                    raise AssertionError(f"gains {sums - batch.extras['reference']} at step 0")
            return right(self, output, batch)

        owner.loss = loss  # type: ignore[method-assign]


def _is_whole() -> bool:
    """Whether this rank has all of the four micro-batches."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size() == 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    known: dict[tuple[str, bool], Result] = {}

    def get(model: str, packed: bool) -> Result:
        if (model, packed) not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            options: dict[str, Any] = {"packed": packed, "num_steps": STEPS, "weights": weights}
            known[model, packed] = run(
                MODELS[model], ONE_RANK, fault=watch_margins, num_micro_batches=4, **options
            )
        return known[model, packed]

    return get


ROWS = [
    ("dpo", "cp2", True),
    ("rpo", "tp2_sp", False),
    ("kto", "dp2", True),
    ("dpo_images", "pp2_vp2", False),
]
SLOW = [
    (model, layout, packed)
    for model in MODELS
    for layout in LAYOUTS
    for packed in (False, True)
    if (model, layout, packed) not in ROWS
]


@pytest.mark.parametrize(
    ("model", "layout", "packed"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_every_layout_equals_one_rank(
    model: str, layout: str, packed: bool, reference: References
) -> None:
    expected = reference(model, packed)
    result = run(
        MODELS[model],
        LAYOUTS[layout],
        num_steps=STEPS,
        packed=packed,
        reference=expected.weights,
        fault=watch_margins,
    )
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0
