"""Reward models on every layout equal one rank: the last token may be on any rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
MODELS |= {f"{name}_packed": MODELS[name] for name in ("lora", "images")}
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


def read_at_the_padding() -> None:
    """Each row's score is read at its last column, whatever its length."""
    from nvmm.models import reward

    reward.last_tokens = lambda batch: torch.full_like(batch.owners, batch.tokens.shape[1] - 1)


def take_means_of_means() -> None:
    """Every micro-batch counts the same, however many labels it has; the log is right."""
    from nvmm.objectives.reward import Regression

    right = Regression.loss

    def loss(self: Any, output: Any, batch: Any) -> Any:
        total, count, metrics = right(self, output, batch)
        return total / count.clamp(min=1), torch.ones_like(count), metrics

    Regression.loss = loss  # type: ignore[method-assign]


def count_texts() -> None:
    """The sum of squared errors is divided by the texts instead of the labels."""
    from nvmm.objectives.reward import Regression

    right = Regression.loss

    def loss(self: Any, output: Any, batch: Any) -> Any:
        total, count, metrics = right(self, output, batch)
        texts = torch.full_like(count, len(batch.owners))
        return total, texts, metrics | {"loss": torch.stack([total.detach(), texts.double()])}

    Regression.loss = loss  # type: ignore[method-assign]


def average_over_context() -> None:
    """Backward of the gather averages over ranks: the factor of the world size is missing."""
    from nvmm.models import reward

    right = reward.context_parallel.gather

    def wrong(x: Any, group: Any) -> Any:
        whole = right(x, group)
        return whole / group.size() + (whole - whole / group.size()).detach()

    reward.context_parallel.gather = wrong


def keep_own_tokens() -> None:
    """Sequence-parallel ranks score the texts that end in their own part, and zeros for others."""
    from nvmm.models import reward

    reward.reduce_from_tensor_model_parallel_region = lambda x, group: x


FAULTS = [
    (read_at_the_padding, "one", "losses at step 1"),
    (take_means_of_means, "dp2", "gradient of"),
    (count_texts, "one", "losses at step 1"),
    (average_over_context, "cp2", "gradient of"),
    (keep_own_tokens, "tp2_sp", "losses at step 1"),
]


@pytest.mark.parametrize(
    ("fault", "layout", "found"),
    [
        pytest.param(*row, marks=() if row[1] == "one" else pytest.mark.slow, id=row[0].__name__)
        for row in FAULTS
    ],
)
def test_planted_faults_are_caught(
    fault: Callable[[], None], layout: str, found: str, tmp_path: Path
) -> None:
    config = MODELS["regression"]
    options: dict[str, Any] = {"num_steps": 1, "num_micro_batches": 4}
    expected = run(config, ONE_RANK, weights=tmp_path / "weights", **options)
    other = {"one": ONE_RANK, **LAYOUTS}[layout]
    faulty = run(config, other, reference=tmp_path / "weights", fault=fault, **options)
    failures = compare(expected, faulty).failures
    assert any(failure.startswith(found) for failure in failures), failures[:8]
