"""The contrastive loss at every layout equals one rank that holds the whole batch at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE, QUERY
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": ONE_RANK,
    "dp2": Layout("DP2", 2),
    "dp4": Layout("DP4", 4),
    "tp2": Layout("TP2", 2, TP2),
    "tp2_sp": Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2_dp2": Layout("TP2xDP2", 4, TP2),
    "pp2_dp2": Layout("PP2xDP2", 4, PP2),
    "recompute": Layout("full recompute", 1, {"recompute_granularity": "full"}),
}
EVERYTHING = {"symmetric": True, "matryoshka_dims": [24, 64], "distillation_weight": 0.3}
MODELS: dict[str, dict[str, Any]] = {
    "latent": tiny.contrastive(tiny.embedder(), EVERYTHING),
    "self": tiny.contrastive(tiny.embedder("SelfAttention"), {}),
    "eos_causal": tiny.contrastive(tiny.embedder("EOS", causal=True), {}),
    "mean": tiny.contrastive(tiny.embedder("Mean"), {}),
    "images": tiny.contrastive(tiny.multimodal(language=tiny.embedder()), {}),
}
References = Callable[[str], Result]
STEPS = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    """One rank with the rows of all four micro-batches in one: no GradCache, no gather."""
    known: dict[str, Result] = {}

    def get(model: str) -> Result:
        if model not in known:
            weights = tmp_path_factory.mktemp(model) / "weights"
            known[model] = run(MODELS[model], ONE_RANK, num_steps=STEPS, merge=4, weights=weights)
        return known[model]

    return get


ROWS = [
    ("latent", "one"),
    ("latent", "dp2"),
    ("latent", "tp2"),
    ("latent", "pp2"),
    ("latent", "dp4"),
    ("self", "tp2_sp"),
    ("eos_causal", "pp2_dp2"),
    ("images", "tp2_dp2"),
]
SLOW = [
    ("latent", "tp2_sp"),
    ("latent", "tp2_dp2"),
    ("latent", "pp2_dp2"),
    ("latent", "pp2_vp2"),
    ("latent", "recompute"),
    ("self", "pp2"),
    ("self", "dp2"),
    ("eos_causal", "tp2"),
    ("mean", "dp4"),
    ("mean", "tp2_sp"),
    *(("images", layout) for layout in ("one", "dp4", "tp2_sp", "pp2", "pp2_vp2", "pp2_dp2")),
]


@pytest.mark.parametrize(
    ("model", "layout"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_chunks_on_any_layout_equal_the_whole_batch(
    model: str, layout: str, reference: References
) -> None:
    """Four micro-batches, dealt over data-parallel ranks: GradCache, or at DP 4 the gather."""
    expected = reference(model)
    result = run(MODELS[model], LAYOUTS[layout], num_steps=STEPS, reference=expected.weights)
    comparison = compare(expected, result)
    print(comparison)
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0


def test_rows_of_pictures_have_a_rank_and_micro_batches_without_any() -> None:
    """What `images` compares: of step 1 the second of two data-parallel ranks sees no picture."""
    steps = synthetic_steps(MODELS["images"], STEPS, 4)
    seen = [[bool(batch.media) for batch in step] for step in steps]
    assert seen[0] == [True, False, True, False] and not any(seen[0][1::2])
    assert seen[1] == [True, True, True, False]
    batch = steps[0][0]
    of_text = torch.zeros(len(batch.extras["role"]), dtype=torch.bool)
    of_text[batch.media[IMAGE].texts] = True
    roles = batch.extras["role"]
    assert set(roles[of_text].tolist()) & {QUERY} and set(roles[of_text].tolist()) - {QUERY}


@pytest.mark.parametrize(
    ("layout", "packed"), [("tp2", False), ("pp2", True), pytest.param("tp2_sp", True)]
)
def test_one_micro_batch_needs_no_gradcache(
    layout: str, packed: bool, reference: References
) -> None:
    """The whole batch at once at TP 2 and PP 2, padded or as one packed row."""
    expected = reference("latent")
    options: dict[str, Any] = {"merge": 4, "packed": packed, "reference": expected.weights}
    result = run(MODELS["latent"], LAYOUTS[layout], num_steps=STEPS, **options)
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)


def test_gradcache_equals_the_gather_at_one_chunk_a_rank(tmp_path: Path) -> None:
    """DP 2 with a micro-batch each: both paths see the same four samples."""
    off = tiny.contrastive(tiny.embedder(), EVERYTHING | {"grad_cache": False})
    expected = run(off, ONE_RANK, num_steps=1, num_micro_batches=2, merge=2, weights=tmp_path)
    options: dict[str, Any] = {"num_steps": 1, "num_micro_batches": 2, "reference": tmp_path}
    assert compare(expected, run(off, LAYOUTS["dp2"], **options)).equal
    assert compare(expected, run(MODELS["latent"], LAYOUTS["one"], **options)).equal
    without = compare(expected, run(off, LAYOUTS["one"], **options))
    assert "losses at step 1" in without.failures[0], "accumulation alone must see fewer negatives"


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_chunks_of_any_size_equal_the_whole_batch(merge: int, tmp_path: Path) -> None:
    """Sixteen samples at DP 2, in chunks of two, four and (no GradCache) eight of a rank."""
    config = MODELS["mean"]
    options: dict[str, Any] = {"num_steps": 1, "num_micro_batches": 8}
    expected = run(config, ONE_RANK, merge=8, weights=tmp_path / "weights", **options)
    options["reference"] = tmp_path / "weights"
    comparison = compare(expected, run(config, LAYOUTS["dp2"], merge=merge, **options))
    assert comparison.equal, str(comparison)


DROPOUT = tiny.embedder()
DROPOUT["transformer"] |= {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def compare_passes() -> None:
    """Fail where the training pass does not give the embeddings of GradCache's first pass."""
    import torch

    from nvmm.objectives.contrastive import Contrastive

    prepare, loss = Contrastive.prepare, Contrastive.loss
    first: list[Any] = []

    def prepared(self: Any, run: Any, batches: Any) -> Any:
        def watched(batches: Any) -> Any:
            outputs = run(batches)
            first.extend(outputs)
            return outputs

        return prepare(self, watched, batches)

    def compared(self: Any, output: Any, batch: Any) -> Any:
        if not torch.equal(output.detach(), first.pop(0)):
            raise AssertionError("another embedding than the first pass gave")
        return loss(self, output, batch)

    Contrastive.prepare, Contrastive.loss = prepared, compared  # type: ignore[method-assign]


def compare_passes_without_replay() -> None:
    """The training pass draws its own random numbers."""
    from nvmm.parallel import generators

    generators.replayed = contextlib.nullcontext
    compare_passes()


@pytest.mark.parametrize(
    "layout", ["tp2_sp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "dp2"))]
)
def test_both_passes_of_gradcache_drop_the_same(layout: str) -> None:
    config = tiny.contrastive(DROPOUT, {}) | {
        "lora": tiny.lora(["decoder.*linear_*"], train=["pooling.*"], dropout=0.2)
    }
    options: dict[str, Any] = {"num_steps": 2, "num_micro_batches": 4}
    run(config, LAYOUTS[layout], fault=compare_passes, **options)
    with pytest.raises(RuntimeError, match="another embedding than the first pass gave"):
        run(config, LAYOUTS[layout], fault=compare_passes_without_replay, **options)


def average_gradients() -> None:
    """The gather's backward averages over ranks: the factor of the world size is missing."""
    from nvmm.objectives import contrastive

    right = contrastive.gather

    def wrong(x: Any, group: Any) -> Any:
        whole = right(x, group)
        if not whole.requires_grad:
            return whole
        return whole / group.size() + (whole - whole / group.size()).detach()

    contrastive.gather = wrong


def gather_without_gradient() -> None:
    """Other ranks' embeddings are constants, as after torch.distributed.all_gather."""
    from nvmm.objectives import contrastive

    right = contrastive.gather

    def wrong(x: Any, group: Any) -> Any:
        whole = right(x.detach(), group).clone()
        whole[group.rank()] = x
        return whole

    contrastive.gather = wrong


def forget_rank_offset() -> None:
    """Each rank takes its positives to be the first of the gathered documents."""
    from nvmm.objectives import contrastive

    build = contrastive._Candidates.__init__

    def wrong(self: Any, *args: Any) -> None:
        build(self, *args)
        self.target = self.target - self.target.min()
        self.mask = self.mask.scatter(1, self.target[:, None], True)

    contrastive._Candidates.__init__ = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("grad_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [average_gradients, gather_without_gradient, forget_rank_offset])
def test_planted_faults_are_caught(
    fault: Callable[[], None], grad_cache: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """DP 2, once through GradCache's gather and once through the loss's own."""
    config = tiny.contrastive(tiny.embedder("Mean"), {"grad_cache": grad_cache})
    count = 4 if grad_cache else 2
    weights = tmp_path_factory.mktemp("weights") / "weights"
    options: dict[str, Any] = {"num_steps": 1, "num_micro_batches": count}
    expected = run(config, ONE_RANK, merge=count, weights=weights, **options)
    faulty = run(config, LAYOUTS["dp2"], reference=weights, fault=fault, **options)
    failures = compare(expected, faulty).failures
    loss = any(failure.startswith("losses at step 1") for failure in failures)
    assert loss is (fault is forget_rank_offset), failures[:8]
    assert any("gradient of decoder.layers.0.mlp" in failure for failure in failures)
