"""Every parallel layout equals one rank: the table that all later systems add rows to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import IGNORE_INDEX, IMAGE
from nvmm.parallel.schedule import run_schedule
from nvmm.proof import equivalence, synthetic
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from tests import tiny
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": Layout("TP2", 2, TP2),
    "tp2_sp": Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "pp2_uneven": Layout("PP2 uneven", 2, PP2 | {"num_layers_in_first_pipeline_stage": 1}),
    "tp2_pp2": Layout("TP2xPP2", 4, TP2 | PP2),
    "dp2": Layout("DP2", 2),
    "dp2_overlap": Layout(
        "DP2 overlapped", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "recompute": Layout("full recompute", 1, {"recompute_granularity": "full"}),
    "selective": Layout("selective recompute", 1, {"recompute_granularity": "selective"}),
    "tp2_recompute": Layout("TP2, full recompute", 2, TP2 | {"recompute_granularity": "full"}),
    "sharded": Layout("TP2, sharded encoder", 2, TP2 | {"encoder": "sharded"}),
    "sharded_sp": Layout(
        "TP2+SP, sharded encoder", 2, TP2 | {"encoder": "sharded", "sequence_parallel": True}
    ),
    "sharded_pp2": Layout("TP2xPP2, sharded encoder", 4, TP2 | PP2 | {"encoder": "sharded"}),
}
LAYOUTS["pp4"] = Layout("PP4", 4, {"pipeline_model_parallel_size": 4})
LAYOUTS["tp2_sp_pp2"] = Layout("TP2+SPxPP2", 4, TP2 | PP2 | {"sequence_parallel": True})
COMMON = [name for name in LAYOUTS if not name.startswith(("sharded", "tp2_sp_pp2", "pp4"))]
CP2 = {"context_parallel_size": 2}
LAYOUTS |= {
    "cp2": Layout("CP2", 2, CP2),
    "cp2_tp2": Layout("CP2xTP2", 4, CP2 | TP2),
    "cp2_tp2_sp": Layout("CP2xTP2+SP", 4, CP2 | TP2 | {"sequence_parallel": True}),
    "cp2_dp2": Layout("CP2xDP2", 4, CP2),
    "cp2_pp2": Layout("CP2xPP2", 4, CP2 | PP2),
    "cp2_overlap": Layout("CP2 overlapped", 2, CP2 | LAYOUTS["dp2_overlap"].parallel),
    "cp2_recompute": Layout("CP2, full recompute", 2, CP2 | {"recompute_granularity": "full"}),
    "cp2_selective": Layout(
        "CP2, selective recompute", 2, CP2 | {"recompute_granularity": "selective"}
    ),
    "cp2_pp2_vp2": Layout(
        "CP2xPP2xVPP2", 4, CP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2}
    ),
    "cp2_sharded": Layout("CP2xTP2, sharded encoder", 4, CP2 | TP2 | {"encoder": "sharded"}),
}
FROZEN_LANGUAGE = ["vision.*", "language.*"]
# Every linear of the three parts, and a part that is trained whole. The rate: as the connector's.
LORA = tiny.config(tiny.multimodal(), learning_rate=5e-4) | {
    "lora": tiny.lora(["*linear*"], train=["connector.*weight"])
}
# Flamingo's kind with every option that has parameters of its own.
XATTN_DENSE = {
    "interval": 1,
    "placement": "before",
    "num_attention_heads": 2,
    "kv_channels": 24,
    "gate": "channel",
    "ffn_hidden_size": 48,
    "qk_norm": True,
    "kv_norm": True,
    "bias": True,
}
# What a layer reads by its number: windows shorter than the rows, positions; and norms of heads.
BY_LAYER = tiny.language()
BY_LAYER["transformer"] |= {
    "window_size": [3, 0],
    "window_attn_skip_freq": [1, 0, 1, 1],
    "no_rope_freq": [0, 0, 1, 0],
    "qk_layernorm": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "language": tiny.config(tiny.language()),
    "language_windows": tiny.config(BY_LAYER),
    "language_windows_packed": tiny.config(BY_LAYER),
    "language_tied": tiny.config(
        tiny.language(share_embeddings_and_output_weights=True),
        groups=[{"pattern": "*mlp*", "learning_rate": 5e-4}],
    ),
    "nvlm_d": tiny.config(tiny.multimodal()),
    "nvlm_d_frozen_vision": tiny.config(tiny.multimodal(), freeze=["vision.*"]),
    # Five Adam steps of four tensors alone amplify rounding: half the others' learning rate.
    "nvlm_d_connector": tiny.config(tiny.multimodal(), freeze=FROZEN_LANGUAGE, learning_rate=5e-4),
    "nvlm_d_lora": LORA,
    "nvlm_d_frozen_patches": tiny.config(tiny.multimodal(), freeze=["vision.conv1*"]),
    "language_packed": tiny.config(tiny.language()),
    "nvlm_d_packed": tiny.config(tiny.multimodal()),
    "nvlm_d_frozen_vision_packed": tiny.config(tiny.multimodal(), freeze=["vision.*"]),
    "nvlm_x": tiny.config(tiny.cross_attending(), attended="all"),
    # A scalar gate's gradient is one number, a sum that may cancel: here, of this seed, none does.
    "nvlm_x_packed": tiny.config(tiny.cross_attending(), attended="all") | {"seed": 12},
    "nvlm_x_frozen_vision": tiny.config(
        tiny.cross_attending(), attended="all", freeze=["vision.*"]
    ),
    "nvlm_x_frozen_language": tiny.config(
        tiny.cross_attending(), attended="all", freeze=FROZEN_LANGUAGE, learning_rate=5e-4
    ),
    "nvlm_h": tiny.config(tiny.cross_attending(), attended="regular"),
    "nvlm_h_packed": tiny.config(tiny.cross_attending(), attended="regular"),
    "nvlm_h_frozen_vision": tiny.config(
        tiny.cross_attending(), attended="regular", freeze=["vision.*"]
    ),
    "nvlm_h_frozen_language": tiny.config(
        tiny.cross_attending(), attended="regular", freeze=FROZEN_LANGUAGE, learning_rate=5e-4
    ),
    "xattn_dense": tiny.config(tiny.cross_attending(**XATTN_DENSE), attended="all"),
}
for rest in ("", "_packed"):
    MODELS[f"vila{rest}"] = tiny.config(tiny.vila(), interleaved=True)
    MODELS[f"vila_frozen_vision{rest}"] = tiny.config(
        tiny.vila(), interleaved=True, freeze=["vision.*"]
    )
ROWS = [
    # Every layout meets every system, and each of them meets packed and padded rows.
    *itertools.product(["language"], ["tp2", "pp2", "cp2", "dp2", "tp2_pp2"]),
    *itertools.product(["language_packed"], ["tp2_sp", "pp2_vp2", "cp2_tp2"]),
    ("language_windows_packed", "cp2_pp2"),
    *itertools.product(["nvlm_d"], ["tp2_sp", "pp2_vp2", "cp2_tp2", "tp2_pp2"]),
    *itertools.product(["nvlm_d_packed"], ["tp2", "pp2", "cp2", "dp2"]),
    *itertools.product(["nvlm_d_frozen_vision"], ["tp2", "tp2_sp", "pp2_vp2", "dp2"]),
    *itertools.product(["nvlm_d_frozen_vision_packed"], ["pp2", "cp2", "cp2_tp2", "tp2_pp2"]),
    *itertools.product(["nvlm_d"], ["pp2_uneven", "dp2_overlap", "recompute", "selective"]),
    *itertools.product(["nvlm_d"], ["sharded_pp2"]),
    ("nvlm_d_frozen_vision", "sharded_sp"),
    *itertools.product(["nvlm_d_connector"], ["pp2_vp2"]),
    *itertools.product(["language_tied"], ["pp2_vp2"]),
    ("nvlm_d_frozen_patches", "tp2_recompute"),
    *itertools.product(["nvlm_d_lora"], ["tp2_sp", "pp2"]),
    *itertools.product(["nvlm_x"], ["tp2_sp", "pp2_vp2"]),
    ("nvlm_h", "pp4"),
    ("nvlm_h_packed", "cp2_tp2_sp"),
    ("xattn_dense", "tp2_sp"),
    ("vila", "tp2_sp"),
    ("vila_frozen_vision", "pp2_vp2"),
    ("vila_frozen_vision_packed", "cp2"),
]
MATRIX = ["tp2", "tp2_sp", "pp2", "pp2_vp2", "cp2", "cp2_tp2", "dp2", "tp2_pp2"]
CONTEXT = ["cp2_tp2_sp", "cp2_dp2", "cp2_pp2", "cp2_overlap", "cp2_recompute"]
SYSTEMS = ["language", "nvlm_d", "nvlm_d_frozen_vision"]
SLOW_ROWS = [
    row
    for row in dict.fromkeys(
        [
            *itertools.product([*SYSTEMS, "nvlm_d_connector"], COMMON),
            *itertools.product(["language_tied"], ["tp2", "pp2", "dp2_overlap"]),
            *itertools.product(
                ["language_windows", "language_windows_packed"], [*MATRIX, *CONTEXT, "selective"]
            ),
            *itertools.product(["nvlm_d", "nvlm_d_frozen_vision"], ["sharded", "sharded_sp"]),
            ("nvlm_d_frozen_patches", "recompute"),
            *itertools.product(
                [*SYSTEMS, *(f"{name}_packed" for name in SYSTEMS)], MATRIX + CONTEXT
            ),
            *itertools.product(
                ["nvlm_d", "nvlm_d_packed"], ["cp2_sharded", "cp2_selective", "cp2_pp2_vp2"]
            ),
            *itertools.product(["nvlm_d_connector"], ["cp2", "cp2_dp2", "cp2_tp2_sp"]),
            *itertools.product(["nvlm_d_lora"], ["pp2_vp2", "tp2_pp2", "cp2_tp2_sp", "sharded_sp"]),
            *itertools.product(["nvlm_d_lora"], ["dp2_overlap", "tp2_recompute", "sharded"]),
            *itertools.product(
                [
                    f"nvlm_{kind}{rest}"
                    for kind in "xh"
                    for rest in ("", "_packed", "_frozen_vision")
                ],
                [*COMMON, "pp4", "tp2_sp_pp2", *CONTEXT, "cp2", "cp2_tp2", "cp2_pp2_vp2"],
            ),
            *itertools.product(
                ["nvlm_x_frozen_language", "nvlm_h_frozen_language"], [*COMMON, "cp2_tp2_sp"]
            ),
            *itertools.product(["nvlm_x", "nvlm_h"], ["sharded", "sharded_sp", "sharded_pp2"]),
            *itertools.product(
                [
                    f"vila{kind}{rest}"
                    for kind in ("", "_frozen_vision")
                    for rest in ("", "_packed")
                ],
                ["tp2_sp", "pp2", "pp2_vp2", "dp2_overlap", "cp2"],
            ),
            *itertools.product(["xattn_dense"], [*COMMON, "cp2_tp2_sp", "tp2_sp_pp2"]),
        ]
    )
    if row not in ROWS
]
References = Callable[[str], tuple[Result, Path]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The one-rank result of a model and its checkpoint, computed once."""
    known: dict[str, Result] = {}

    def get(model: str) -> tuple[Result, Path]:
        if model not in known:
            folder = tmp_path_factory.mktemp(model) / "weights"
            known[model] = run(
                MODELS[model], ONE_RANK, weights=folder, packed=model.endswith("packed")
            )
        weights = known[model].weights
        assert weights is not None
        return known[model], weights

    return get


def test_every_pair_of_axes_meets() -> None:
    """Layout x rows, layout x system and rows x system, in the rows that are not slow."""
    cells = [(layout, m.endswith("_packed"), m.removesuffix("_packed")) for m, layout in ROWS]
    for first, second in itertools.combinations((MATRIX, [False, True], SYSTEMS), 2):
        for pair in itertools.product(first, second):
            assert any(set(pair) <= set(cell) for cell in cells), pair


@pytest.mark.parametrize(
    ("model", "layout"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)],
    ids=["-".join(row) for row in ROWS + SLOW_ROWS],
)
def test_layout_equals_one_rank(model: str, layout: str, reference: References) -> None:
    expected, weights = reference(model)
    packed = model.endswith("packed")
    result = run(MODELS[model], LAYOUTS[layout], reference=weights, packed=packed)
    comparison = compare(expected, result)
    print(comparison)
    assert comparison.equal, str(comparison)
    assert comparison.num_parameters == len(expected.gradients[0]) > 0


def test_accumulation_equals_one_large_micro_batch(reference: References) -> None:
    expected, weights = reference("nvlm_d")
    merged = run(MODELS["nvlm_d"], ONE_RANK, reference=weights, merge=4)
    comparison = compare(expected, merged)
    assert comparison.equal, str(comparison)


def test_packed_rows_equal_padded_rows(reference: References) -> None:
    expected, weights = reference("nvlm_d")
    packed = run(MODELS["nvlm_d"], ONE_RANK, reference=weights, packed=True)
    comparison = compare(expected, packed)
    assert comparison.equal, str(comparison)


@pytest.mark.slow
def test_weights_saved_by_context_parallel_ranks_load_at_one(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    found = run(MODELS["nvlm_d"], LAYOUTS["cp2_tp2_sp"], weights=weights)
    comparison = compare(run(MODELS["nvlm_d"], ONE_RANK, reference=weights), found)
    assert comparison.equal, str(comparison)


def test_the_distributed_optimizer_equals_mcore_s_plain_one(reference: References) -> None:
    expected, _ = reference("language")
    losses, norms = run_ranks(_plain, 2, MODELS["language"])[0]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-5)


def _plain(rank: int, world_size: int, init: str, config: dict[str, Any]) -> Any:
    """Five steps at DP 2 of mcore's FP32Optimizer and torch's AdamW, gradients all-reduced."""
    import megatron.core.optimizer as mcore
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer

    from nvmm.parallel.setup import Parallel
    from nvmm.training.metrics import reduce_metrics

    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    steps = synthetic.synthetic_steps(config, 5, 4)
    data = synthetic.SyntheticData(steps)
    own = [(module, dict(vars(module))) for module in (mcore, mcore.optimizer, clip_grads)]
    trainer = equivalence.build_trainer(config, data, Path("/nowhere"), global_batch_size=4)
    for module, names in own:
        vars(module).update(names)  # the trainer's optimizer has put nvmm's Adam and norm there
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    trainer.models = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in trainer.chunks]
    plain = get_megatron_optimizer(
        OptimizerConfig(
            lr=config["optim"]["learning_rate"],
            weight_decay=0.1,
            adam_beta2=0.95,
            adam_eps=config["optim"]["eps"],
            clip_grad=1.0,
        ),
        trainer.models,
        use_gloo_process_groups=False,
    )
    assert {type(part.optimizer) for part in plain.chained_optimizers} == {torch.optim.AdamW}
    rates = trainer.optimizer
    losses, norms = [], []
    for number, batches in enumerate(data.batches(rank=rank, size=2, start=0)):
        for group in plain.param_groups:
            group["lr"] = rates.set_step(number)
            group["weight_decay"] = 0.1 * group["wd_mult"]  # the work of mcore's scheduler
        for model in trainer.models:
            model.zero_grad_buffer()
        plain.zero_grad()  # its step leaves p.grad on the buffer, where backward would add to it
        outputs = run_schedule(trainer.models, batches, trainer._forward_step, forward_only=False)
        losses.append(reduce_metrics(outputs, torch.device("cpu"))["loss"])
        _, norm, _ = plain.step()
        norms.append(norm)
    return losses, norms


def test_compare_finds_what_differs(reference: References) -> None:
    """The judge itself: each kind of difference is a failure that names its place."""
    expected, _ = reference("nvlm_d")
    assert compare(expected, expected).equal

    def changed(**changes: Any) -> list[str]:
        fields = {name: getattr(expected, name) for name in expected.__dataclass_fields__}
        return compare(expected, Result(**fields | changes)).failures

    first, last = expected.gradients
    name = "vision.decoder.layers.0.mlp.linear_fc1.weight"
    off = {**last, name: last[name] * (1 + 3e-5)}
    assert changed(gradients=(first, off)) == [f"gradient of {name}: off by 3.00e-05"]
    lost = {key: value for key, value in first.items() if key != name}
    assert any(f"first step: {name} is missing" in x for x in changed(gradients=(lost, last)))
    losses = [*expected.losses[:4], expected.losses[4] * (1 + 2e-5)]
    assert changed(losses=losses)[0].startswith("losses at step 5")
    norms = [float("nan"), *expected.grad_norms[1:]]
    assert changed(grad_norms=norms)[0].startswith("grad_norms at step 1")
    assert changed(replica_errors=[name]) == [f"replicas differ: {name}"]
    assert changed(losses=expected.losses[:4])[0] == "losses: 4 steps, not 5"


def test_a_missing_reduction_is_caught(reference: References) -> None:
    """Without the sum over TP, gradients of a replicated encoder are a rank's own share."""
    expected, weights = reference("nvlm_d")
    result = run(MODELS["nvlm_d"], LAYOUTS["tp2"], reference=weights, fault=skip_sum)
    comparison = compare(expected, result)
    assert any("vision.conv1.weight" in failure for failure in comparison.failures)
    assert not any(
        failure.startswith("gradient of language.output") for failure in comparison.failures
    )


def skip_sum() -> None:
    """A planted fault."""
    from nvmm.parallel import schedule

    schedule.sum_replicated_gradients = lambda models: None  # type: ignore[assignment]


def test_layouts_pad_the_same_tokens() -> None:
    for packed in (False, True):
        found = []
        for parallel in ({}, CP2 | TP2 | {"sequence_parallel": True}, {"context_parallel_size": 3}):
            config = MODELS["nvlm_d"] | {"parallel": parallel}
            steps = synthetic.synthetic_steps(config, 2, 4, packed=packed)
            labels = torch.cat([b.labels.flatten() for step in steps for b in step])
            valid = [b.lengths[b.lengths > 0].tolist() for step in steps for b in step]
            found.append((labels[labels != IGNORE_INDEX].tolist(), valid))
        assert found[0] == found[1] == found[2]


def test_synthetic_batches_spread_images_unevenly() -> None:
    steps = synthetic.synthetic_steps(MODELS["nvlm_d"], 2, 4)
    tiles = [[b.media[IMAGE].values.shape[0] if b.media else 0 for b in step] for step in steps]
    assert tiles[0][1] == tiles[0][3] == 0 < tiles[0][0] != tiles[0][2]
    assert tiles[1][3] == 0 < min(tiles[1][:3])
    assert len({b.tokens.shape[1] for b in steps[1]}) > 1
    labels = torch.cat([b.labels.flatten() for b in steps[1]])
    assert not (labels == synthetic.PLACEHOLDER).any()
