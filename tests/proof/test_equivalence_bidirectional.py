"""BERT-like encoders at every layout equal one rank that holds the whole batch at once.

In fp64: post-norm layers divide by small deviations, which fp32's rounding would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from tests import tiny
from tests.proof.test_equivalence_embedder import PP2, TP2, compare_passes

LAYOUTS = {
    "one": ONE_RANK,
    "dp2": Layout("DP2", 2),
    "tp2": Layout("TP2", 2, TP2),
    "tp2_sp": Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2_pp2_sp": Layout("TP2+SPxPP2", 4, TP2 | PP2 | {"sequence_parallel": True}),
    "pp2_dp2": Layout("PP2xDP2", 4, PP2),
    "selective": Layout("selective recompute", 1, {"recompute_granularity": "selective"}),
    "recompute": Layout("full recompute", 1, {"recompute_granularity": "full"}),
}
FP64 = {"precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp64"}}
MODELS: dict[str, dict[str, Any]] = {
    # Without normalisation the products are those of lengths: a temperature keeps them small.
    "cls": tiny.contrastive(tiny.bidirectional(), {"temperature": 20.0}) | FP64,
    "mean": tiny.contrastive(tiny.bidirectional("Mean", normalize=True), {}) | FP64,
}
References = Callable[[str], Result]
ROWS = [("cls", "tp2_sp", False), ("mean", "pp2", True)]
SLOW = [
    ("cls", "dp2", False),
    ("cls", "dp2", True),
    ("cls", "pp2", False),
    ("cls", "one", True),
    ("cls", "tp2", True),
    ("cls", "tp2_sp", True),
    ("cls", "recompute", False),
    ("cls", "selective", False),
    ("mean", "dp2", True),
    ("mean", "tp2_sp", True),
    ("mean", "pp2_vp2", False),
    ("mean", "pp2_dp2", True),
    ("mean", "tp2_pp2_sp", False),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    """One rank with the rows of all four micro-batches in one: no GradCache, no gather."""
    known: dict[str, Result] = {}

    def get(model: str) -> Result:
        if model not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            known[model] = run(MODELS[model], ONE_RANK, num_steps=2, merge=4, weights=weights)
        return known[model]

    return get


@pytest.mark.parametrize(
    ("model", "layout", "packed"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_any_layout_equals_the_whole_batch(
    model: str, layout: str, packed: bool, reference: References
) -> None:
    """Four micro-batches of padded or packed rows, dealt over data-parallel ranks: GradCache."""
    expected = reference(model)
    options: dict[str, Any] = {"num_steps": 2, "packed": packed, "reference": expected.weights}
    comparison = compare(expected, run(MODELS[model], LAYOUTS[layout], **options))
    print(comparison)
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) == 53


DROPOUT = tiny.bidirectional("Mean", normalize=True)
DROPOUT["transformer"] |= {"hidden_dropout": 0.2, "attention_dropout": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2"])
def test_both_passes_of_gradcache_drop_the_same(layout: str) -> None:
    """The embedding drops too, in the generator of tensor-parallel ranks under SP."""
    options: dict[str, Any] = {"num_steps": 2, "num_micro_batches": 4}
    run(tiny.contrastive(DROPOUT, {}), LAYOUTS[layout], fault=compare_passes, **options)


def sum_norms_twice() -> None:
    """The embedding's norm runs on the whole sequence, but its gradient is summed over TP."""
    import torch
    from megatron.core import tensor_parallel

    from nvmm.modules.embedding import NormedEmbedding

    def wrong(self: Any, tokens: Any, positions: Any, token_types: Any) -> Any:
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        x = x + self.tokentype_embeddings(torch.zeros_like(tokens))
        x = self.layernorm(x.transpose(0, 1).contiguous())
        return tensor_parallel.scatter_to_sequence_parallel_region(x)

    NormedEmbedding.forward = wrong  # type: ignore[method-assign]


def test_a_planted_fault_is_caught(reference: References) -> None:
    expected = reference("cls")
    options: dict[str, Any] = {"num_steps": 1, "reference": expected.weights}
    faulty = run(MODELS["cls"], LAYOUTS["tp2_sp"], fault=sum_norms_twice, **options)
    failures = compare(expected, faulty).failures
    assert any("gradient of embedding.layernorm.weight" in failure for failure in failures)
