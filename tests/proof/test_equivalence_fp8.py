"""FP8 at every layout equals one rank: losses, gradients, and delayed scaling's histories.

In double precision: what rounding differs between layouts would put single values of millions on
the other side of a rounding to FP8. Nothing is clipped, since the norm that decides it is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvmm.parallel.fp8_recipe import RECIPES
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from tests import tiny

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": ONE_RANK,
    "tp2": Layout("TP2", 2, TP2),
    "tp2_sp": Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    "pp2": Layout("PP2", 2, PP2),
    "dp2": Layout("DP2", 2),
    "recompute": Layout("full recompute", 1, {"recompute_granularity": "full"}),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2_dp2": Layout("TP2xDP2", 4, TP2),
    "cp2": Layout("CP2", 2, {"context_parallel_size": 2}),
    "overlap": Layout("overlapped", 1, {"overlap_grad_reduce": True}),
    "tp2_sharded": Layout("TP2, sharded encoder", 2, TP2 | {"encoder": "sharded"}),
}
STEPS = 3
FREEZE = {
    "frozen_vision": ["vision.*"],
    "vision": [],
    "last_of_vision": ["language.*", "*conv1*", "*class_token", "*position*", "*decoder.layers.0*"],
    "connector": ["language.*", "vision.*"],
    "attending": ["language.[!c]*", "vision.*", "connector.*", "*gate", "*.layers.3.*"],
}


def config(kind: str, recipe: str) -> dict[str, Any]:
    """Blocks of 128 divide every rank's features and, under sequence parallelism, tokens."""
    model, attended = tiny.multimodal() if kind in FREEZE else tiny.language(), None
    if kind == "attending":
        model, attended = tiny.cross_attending(), "all"
    language = model.get("language", model)
    language["transformer"] |= {"hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 256}
    fp8 = {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "recipe": recipe, "amax_history_len": 2}
    whole = {"lora": [], "lora_and_embedding": ["embedding.*"]}
    adapters = {"lora": tiny.lora(["*linear_*"], train=whole[kind])} if kind in whole else {}
    return (
        tiny.config(model, clip_grad=0.0, attended=attended, freeze=FREEZE.get(kind, []))
        | adapters
        | {
            "precision": {"dtype": "fp64", "grad_reduce_in_fp32": False, "fp8": fp8},
            "row_multiple": {"blockwise": 256, "mxfp8": 64}.get(recipe, 32),
        }
    )


References = Callable[[str, str], Result]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    known: dict[tuple[str, str], Result] = {}

    def get(kind: str, recipe: str) -> Result:
        key = (kind, recipe)
        if key not in known:
            weights = tmp_path_factory.mktemp(recipe) / "weights"
            known[key] = go(kind, recipe, ONE_RANK, weights=weights)
        return known[key]

    return get


def go(kind: str, recipe: str, layout: Layout, **options: Any) -> Result:
    options |= {"num_steps": STEPS, "num_micro_batches": 2, "packed": kind == "packed"}
    return run(config(kind, recipe), layout, **options)


ROWS = [
    *(("language", "delayed", layout) for layout in ("tp2", "tp2_sp", "pp2", "dp2", "recompute")),
    ("language", "mxfp8", "tp2_sp"),
    ("frozen_vision", "delayed", "tp2_sharded"),
    # Some micro-batches have no image: nothing before the decoder asks for a gradient.
    ("connector", "delayed", "overlap"),
    ("lora", "delayed", "recompute"),
]
SLOW = [
    *(("language", recipe, "tp2_sp") for recipe in ("current", "blockwise")),
    *(
        ("language", recipe, layout)
        for recipe in ("current", "blockwise", "mxfp8")
        for layout in ("tp2", "pp2", "dp2", "recompute")
    ),
    *(("language", recipe, "pp2_vp2") for recipe in RECIPES),
    *(("packed", recipe, "tp2") for recipe in RECIPES),
    ("language", "delayed", "tp2_dp2"),
    ("language", "delayed", "cp2"),
    ("language", "current", "cp2"),
    ("frozen_vision", "delayed", "dp2"),
    ("frozen_vision", "current", "tp2_sharded"),
    *(("lora", "delayed", layout) for layout in ("pp2", "dp2")),
    *(("lora", recipe, "tp2_sp") for recipe in RECIPES),
    # Recomputation computes the first linear's gradient even where nothing before it is trained.
    ("lora_and_embedding", "delayed", "recompute"),
    ("connector", "delayed", "pp2"),
    ("connector", "delayed", "recompute"),
    ("vision", "delayed", "overlap"),
    ("last_of_vision", "delayed", "recompute"),
    ("attending", "delayed", "pp2"),
]


@pytest.mark.parametrize(
    ("kind", "recipe", "layout"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_any_layout_equals_one_rank(
    kind: str, recipe: str, layout: str, reference: References
) -> None:
    expected = reference(kind, recipe)
    result = go(kind, recipe, LAYOUTS[layout], reference=expected.weights)
    comparison = compare(expected, result)
    print(comparison, comparison.worst[:2])
    assert comparison.equal, str(comparison)
    assert bool(expected.scales) == (recipe == "delayed")


def test_fp8_is_not_nothing(reference: References, tmp_path: Path) -> None:
    """Each recipe's losses differ from those of double precision, and from each other's."""
    plain = config("language", "current") | {"precision": {"dtype": "fp64"}}
    losses = {"none": run(plain, ONE_RANK, num_steps=1, num_micro_batches=2).losses[0]}
    for recipe in ("delayed", "current", "blockwise", "mxfp8"):
        losses[recipe] = reference("language", recipe).losses[0]
    assert len(set(losses.values())) == 5
    assert max(losses.values()) < 1.05 * min(losses.values())


def forget_other_ranks_amaxes() -> None:
    """The histories of a rank are those of its own shards and samples."""
    from nvmm.modules import fp8_scales

    fp8_scales.dist = _without_reduction(fp8_scales.dist)


def _reduce_amaxes_over(name: str) -> None:
    from nvmm.modules import fp8_scales

    known = fp8_scales.parallel_state
    group = {"get_amax_reduction_group": lambda **options: getattr(known, name)()}
    fp8_scales.parallel_state = SimpleNamespace(**vars(known) | group)


def reduce_amaxes_over_data_parallel_ranks_alone() -> None:
    """Each shard of a tensor has a scale of its own."""
    _reduce_amaxes_over("get_data_parallel_group")


def reduce_amaxes_over_tensor_parallel_ranks_alone() -> None:
    """Each data or context parallel rank scales by its own samples or tokens."""
    _reduce_amaxes_over("get_tensor_model_parallel_group")


def recompute_under_other_scales() -> None:
    """What a backward pass computes again of the forward pass is scaled otherwise."""
    from nvmm.modules import linear

    right = linear.Quantizer.__call__

    def wrong(self: Any, x: Any, tensor: int, **options: Any) -> Any:
        kept = self.scale
        if tensor == linear.INPUT and _in_backward():
            self.scale = kept / 3
        found = right(self, x, tensor, **options)
        self.scale = kept
        return found

    linear.Quantizer.__call__ = wrong  # type: ignore[method-assign]


def leave_out_the_last_stage() -> None:
    """Only the first pipeline stage closes its steps."""
    from megatron.core import parallel_state

    from nvmm.modules.fp8_scales import Scaling

    right = Scaling.update

    def wrong(self: Any) -> None:
        first = parallel_state.get_pipeline_model_parallel_rank() == 0
        return right(self) if first else self.forget_weights()

    Scaling.update = wrong  # type: ignore[method-assign]


def leave_out_the_last_chunk() -> None:
    """Only the first virtual stage's linears have scales."""
    from nvmm.modules.fp8_scales import Scaling

    right = Scaling.__init__
    Scaling.__init__ = lambda self, models, fp8: right(self, models[:1], fp8)  # type: ignore[method-assign]


def scale_each_shard_alone() -> None:
    """Current scaling takes the amax of a rank's part of the tensor."""
    from nvmm.modules import linear

    right = linear.Quantizer.__call__

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        group, self.sharers = self.sharers, SimpleNamespace(size=lambda: 1)
        found = right(self, *args, **options)
        self.sharers = group
        return found

    linear.Quantizer.__call__ = wrong  # type: ignore[method-assign]


def scale_before_the_step_ends() -> None:
    """Every micro-batch moves the scales, so that the layout decides which one sees what."""
    from nvmm.training.trainer import Trainer

    forward = Trainer._forward_step

    def wrong(self: Any, *args: Any) -> Any:
        self.scaling.update()
        return forward(self, *args)

    Trainer._forward_step = wrong  # type: ignore[method-assign]


def keep_stale_weights() -> None:
    """The quantised weights of the first step serve all others."""
    from nvmm.modules.linear import Quantizer

    Quantizer.forget_weight = lambda self: None  # type: ignore[method-assign]


def forget_other_ranks_tokens() -> None:
    """A weight's gradient under sequence parallelism is that of the rank's own tokens."""
    from nvmm.modules.fp8_quantize import Quantized

    right = Quantized.gathered

    def wrong(self: Quantized, group: Any) -> Quantized:
        whole = right(self, group)
        if _in_backward():
            own = whole.data.float().chunk(group.size())[group.rank()]
            whole.data.copy_(torch.cat([own] * group.size()).to(whole.data.dtype))
        return whole

    Quantized.gathered = wrong  # type: ignore[method-assign]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _without_reduction(module: Any) -> Any:
    return SimpleNamespace(**vars(module) | {"all_reduce": lambda *args, **options: None})


SCALE, GRADIENT = "scale fp8.", "gradient of decoder.layers.0.mlp.linear_fc1"
FAULTS: list[tuple[Callable[[], None], str, str, str, str]] = [
    (forget_other_ranks_amaxes, "language", "delayed", "dp2", f"{SCALE}decoder.layers.0"),
    (scale_each_shard_alone, "language", "current", "tp2", "losses at step 1"),
    (keep_stale_weights, "language", "delayed", "one", "losses at step 2"),
    (forget_other_ranks_tokens, "language", "mxfp8", "tp2_sp", GRADIENT),
    (recompute_under_other_scales, "language", "delayed", "recompute", "gradient of decoder."),
]
SLOW_FAULTS: list[tuple[Callable[[], None], str, str, str, str]] = [
    (reduce_amaxes_over_data_parallel_ranks_alone, "language", "delayed", "tp2", SCALE),
    (reduce_amaxes_over_data_parallel_ranks_alone, "language", "delayed", "tp2_dp2", SCALE),
    (reduce_amaxes_over_tensor_parallel_ranks_alone, "language", "delayed", "tp2_dp2", SCALE),
    (reduce_amaxes_over_tensor_parallel_ranks_alone, "language", "delayed", "cp2", SCALE),
    (
        reduce_amaxes_over_data_parallel_ranks_alone,
        "frozen_vision",
        "delayed",
        "tp2_sharded",
        f"{SCALE}vision.",
    ),
    (reduce_amaxes_over_tensor_parallel_ranks_alone, "frozen_vision", "delayed", "dp2", SCALE),
    (reduce_amaxes_over_data_parallel_ranks_alone, "lora", "delayed", "tp2_sp", SCALE),
    (forget_other_ranks_tokens, "language", "delayed", "tp2_sp", GRADIENT),
    (forget_other_ranks_tokens, "language", "current", "tp2_sp", GRADIENT),
    (forget_other_ranks_tokens, "language", "blockwise", "tp2_sp", GRADIENT),
    (leave_out_the_last_stage, "language", "delayed", "pp2", f"{SCALE}decoder.layers.3"),
    (leave_out_the_last_chunk, "language", "delayed", "pp2_vp2", f"{SCALE}decoder.layers.3"),
]


@pytest.mark.parametrize(
    ("fault", "kind", "recipe", "layout", "betrayed"),
    [*FAULTS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_FAULTS)],
)
def test_planted_faults_are_caught(
    fault: Callable[[], None],
    kind: str,
    recipe: str,
    layout: str,
    betrayed: str,
    reference: References,
) -> None:
    """Every layout of delayed scaling among them."""
    expected = reference(kind, recipe)
    options = {"reference": expected.weights, "fault": fault}
    failures = compare(expected, go(kind, recipe, LAYOUTS[layout], **options)).failures
    assert any(failure.startswith(betrayed) for failure in failures), failures[:8]


@pytest.mark.slow
def test_scales_of_a_micro_batch_would_depend_on_the_layout(tmp_path: Path) -> None:
    """Why histories move once a step: with Transformer Engine's pace DP 2 is not one rank."""
    fault = scale_before_the_step_ends
    weights = tmp_path / "weights"
    expected = go("language", "delayed", ONE_RANK, weights=weights, fault=fault)
    found = go("language", "delayed", LAYOUTS["dp2"], reference=weights, fault=fault)
    failures = compare(expected, found).failures
    assert any(failure.startswith("losses at step 1") for failure in failures), failures[:8]
