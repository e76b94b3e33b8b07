"""Reward models on every layout equal one rank: the last token may be on any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvmm.proof.equivalence import ONE_RANK, Result, compare, run
from tests import tiny
from tests.proof.test_equivalence import LAYOUTS

ATTRIBUTES = ["quality", "helpfulness", "verbosity"]
REGRESSION = {"attributes": ATTRIBUTES, "trained": ATTRIBUTES[1:]}
LORA = {"lora": tiny.lora(["*linear*"], train=["head.*"])}
NEMOTRON = tiny.reward(rotary_percent=0.5)
NEMOTRON["transformer"] |= {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "gated_linear_unit": False,
    "activation_func": {
        "_target_": "megatron.core.activations.squared_relu",
        "_partial_": True,
    },
    "add_qkv_bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "regression": tiny.scored(NEMOTRON, "Regression", **REGRESSION),
    "regression_packed": tiny.scored(NEMOTRON, "Regression", **REGRESSION),
    "pairs": tiny.scored(tiny.reward(), "BradleyTerry", margin="scaled", weights=[0.5, -1.0, 2.0]),
    "pairs_packed": tiny.scored(tiny.reward(), "BradleyTerry", margin="margin", index=1),
    "lora": tiny.scored(tiny.reward(), "BradleyTerry") | LORA,
    "images": tiny.scored(
        tiny.multimodal(language=tiny.reward()), "Regression", attributes=ATTRIBUTES
    ),
}
ROWS = [("regression_packed", "cp2"), ("pairs", "tp2_sp")]
AXES = ["tp2", "tp2_sp", "pp2", "pp2_vp2", "dp2", "cp2", "cp2_pp2", "tp2_pp2", "cp2_tp2_sp"]
SLOW = [
    row
    for row in [
        *((model, layout) for model in MODELS for layout in AXES),
        *((model, "recompute") for model in ("regression", "pairs_packed", "lora")),
        *((model, "dp2_overlap") for model in ("regression", "pairs", "images")),
        *((model, "cp2_dp2") for model in ("regression", "pairs")),
    ]
    if row not in ROWS
]
References = Callable[[str], Result]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    known: dict[str, Result] = {}

    def get(model: str) -> Result:
        if model not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            packed = model.endswith("packed")
            known[model] = run(MODELS[model], ONE_RANK, num_steps=3, weights=weights, packed=packed)
        return known[model]

    return get


@pytest.mark.parametrize(
    ("model", "layout"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_layout_equals_one_rank(model: str, layout: str, reference: References) -> None:
    expected = reference(model)
    packed = model.endswith("packed")
    options: dict[str, Any] = {"num_steps": 3, "reference": expected.weights, "packed": packed}
    comparison = compare(expected, run(MODELS[model], LAYOUTS[layout], **options))
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0
    assert any(name.endswith("head.weight") for name in expected.gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["regression", "pairs"])
def test_packed_rows_and_large_micro_batches_equal_padded_ones(
    model: str, reference: References
) -> None:
    expected = reference(model)
    for options in ({"packed": True}, {"merge": 4}, {"packed": True, "merge": 2}):
        other = run(MODELS[model], ONE_RANK, num_steps=3, reference=expected.weights, **options)
        comparison = compare(expected, other)
        assert comparison.equal, f"{options}: {comparison}"
