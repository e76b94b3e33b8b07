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
    "rpo_lora": tiny.preference(tiny.language(), *RPO) | ADAPTERS,
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

        def loss(self: Any, output: Any, batch: Any, right: Any = right) -> Any:
            sums = preference.log_probabilities(output, batch)[0]
            gains = sums - batch.extras["reference"]
            if int(batch.sample_ids.max()) < 100 and bool((gains != 0).any()):
                raise AssertionError(f"gains {gains} at step 0")
            return right(self, output, batch)

        owner.loss = loss  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    known: dict[tuple[str, bool], Result] = {}

    def get(model: str, packed: bool) -> Result:
        if (model, packed) not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            options: dict[str, Any] = {"packed": packed, "num_steps": STEPS, "weights": weights}
            known[model, packed] = run(MODELS[model], ONE_RANK, fault=watch_margins, **options)
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


@pytest.mark.slow
@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize("model", ["dpo", "kto"])
def test_micro_batches_of_any_size_equal_each_other(
    model: str, merge: int, reference: References
) -> None:
    expected = reference(model, True)
    options: dict[str, Any] = {"num_steps": STEPS, "packed": True, "merge": merge}
    result = run(
        MODELS[model], ONE_RANK, reference=expected.weights, fault=watch_margins, **options
    )
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)


# -- planted faults ---------------------------------------------------------------------------


def take_the_next_micro_batchs_reference() -> None:
    """Each micro-batch compares with the reference's log-probabilities of another one."""
    from nvmm.objectives.preference import Preference

    right = Preference.prepare

    def wrong(self: Any, run: Any, batches: Any) -> Any:
        prepared, metrics = right(self, run, batches)
        others = [batch.extras["reference"] for batch in [*prepared[1:], prepared[0]]]
        return [
            batch.replace(extras=batch.extras | {"reference": other})
            for batch, other in zip(prepared, others, strict=True)
        ], metrics

    Preference.prepare = wrong  # type: ignore[method-assign]


def count_micro_batches() -> None:
    """The mean is over micro-batches, of sums over their pairs; the log is right."""
    from nvmm.objectives import preference

    right = preference.counted_once

    def wrong(*arguments: Any) -> Any:
        total, count, metrics = right(*arguments)
        return total, count.clamp(max=1), metrics

    preference.counted_once = wrong


def swap_the_divergence() -> None:
    """KL(policy || target) in the place of KL(target || policy)."""
    from nvmm.objectives import preference

    right = preference.bernoulli_kl
    preference.bernoulli_kl = lambda first, second: right(second, first)


def count_pairs_on_every_context_rank() -> None:
    """Each context-parallel rank counts the pairs: gradients lack the factor of their number."""
    from nvmm.parallel import context_parallel

    context_parallel.is_first = lambda: True


def keep_partial_sums() -> None:
    """Each context-parallel rank compares its part of a text."""
    from nvmm.parallel import context_parallel

    context_parallel.total = lambda x: x


def keep_each_ranks_point() -> None:
    """KTO's reference point is of each data-parallel rank's own samples."""
    from nvmm.objectives import kto

    kto._add_up = lambda sums: None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("fault", "model", "layout", "loss"),
    [
        (take_the_next_micro_batchs_reference, "rpo", "tp2_sp", True),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                (count_pairs_on_every_context_rank, "dpo", "cp2", False),
                (take_the_next_micro_batchs_reference, "dpo", "tp2_sp", True),
                (count_micro_batches, "dpo", "dp2", False),
                (swap_the_divergence, "rpo", "pp2", True),
                (keep_partial_sums, "dpo", "cp2", True),
                (keep_each_ranks_point, "kto", "dp2", True),
            )
        ),
    ],
)
def test_planted_faults_are_caught(
    fault: Callable[[], None], model: str, layout: str, loss: bool, reference: References
) -> None:
    """By the losses, or where these are right by the gradients."""
    expected = reference(model, layout == "cp2")
    options: dict[str, Any] = {"num_steps": STEPS, "packed": layout == "cp2"}
    result = run(MODELS[model], LAYOUTS[layout], reference=expected.weights, fault=fault, **options)
    failures = compare(expected, result).failures
    named = "losses at step" if loss else "gradient of decoder.layers.0"
    assert any(failure.startswith(named) for failure in failures), failures[:8]
