"""What shrinking keeps: every choice that a layout depends on."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nvmm.config.rules.all import violations
from nvmm.proof.equivalence import compare, run
from nvmm.proof.miniature import ONE_RANK, Miniature, double, miniature
from tests import tiny


def full(**parallel: Any) -> dict[str, Any]:
    """A config of the 72B's proportions."""
    config = tiny.config(tiny.multimodal(), freeze=["vision.*", "language.decoder.layers.79.*"])
    config["model"]["language"]["transformer"] |= {
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "kv_channels": 128,
    }
    config["model"]["vision"]["transformer"] |= {"num_attention_heads": 25, "hidden_size": 3200}
    config["parallel"] = {"_target_": "nvmm.parallel.setup.Parallel", **parallel}
    return config


def small(world_size: int | None = None, **parallel: Any) -> Miniature:
    return miniature(full(**parallel), world_size)


TP8, PP4 = {"tensor_model_parallel_size": 8}, {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallel", "world_size", "name", "layouts"),
    [
        ({}, None, "DP2", [("DP2", 2)]),
        ({}, 1, "one rank", [("one rank", 1)]),
        ({}, 8, "DP8", [("DP2", 2)]),
        (TP8 | PP4, None, "TP8xPP4", [("TP2xPP2", 4)]),
        (PP4, None, "PP4", [("PP4", 4)]),
        (TP8 | PP4, 64, "TP8xPP4xDP2", [("TP2xPP2", 4), ("TP2xDP2", 4)]),
        (TP8 | PP4 | CP2, 128, "TP8xPP4xCP2xDP2", [("TP2xPP2", 4), ("CP2xDP2", 4)]),
        (TP8 | {"sequence_parallel": True}, 16, "TP8xDP2+SP", [("TP2xDP2+SP", 4)]),
        (
            PP4 | TP8 | {"virtual_pipeline_model_parallel_size": 5},
            None,
            "TP8xPP4xVPP5",
            [("TP2xPP2xVPP2", 4)],
        ),
        ({"tensor_model_parallel_size": 3}, None, "TP3", [("TP3", 3)]),
        ({"tensor_model_parallel_size": 3}, 6, "TP3xDP2", [("TP2xDP2", 4)]),
        ({}, 3, "DP3", [("DP3", 3)]),
    ],
)
def test_layouts_of_the_same_kinds(
    parallel: dict[str, Any], world_size: int | None, name: str, layouts: list[tuple[str, int]]
) -> None:
    made = small(world_size, **parallel)
    assert made.full == name
    assert [(x.name, x.world_size) for x in made.layouts] == layouts


@pytest.mark.parametrize(
    ("parallel", "world_size", "count"),
    [
        ({}, 3, 6),
        ({}, 2, 4),
        ({"pipeline_model_parallel_size": 3}, None, 4),
        ({"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}, None, 6),
    ],
)
def test_every_rank_gets_as_many_micro_batches(
    parallel: dict[str, Any], world_size: int | None, count: int
) -> None:
    assert small(world_size, **parallel).num_micro_batches == count


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("cross", [False, True])
def test_three_tensor_parallel_ranks_break_no_rule(groups: int, cross: bool) -> None:
    config = full(tensor_model_parallel_size=3, encoder="sharded")
    config["model"]["language"]["transformer"] |= {
        "num_attention_heads": 24,
        "num_query_groups": 24 // groups,
        "hidden_size": 3072,
    }
    if cross:
        config["model"] |= {"cross_attention": tiny.cross_attending()["cross_attention"]}
    made = miniature(config)
    assert [x.name for x in made.layouts] == ["TP3, sharded encoder"]
    assert violations(made.config | {"parallel": made.layouts[0].parallel}, 3) == []


def test_double_precision_keeps_all_but_what_knows_single_alone() -> None:
    kernels = {"_target_": "nvmm.kernels.library.Kernels", "norm": "fused", "rope": "eager"}
    config = miniature(full() | {"kernels": kernels}).config
    assert config["kernels"] == kernels
    found = double(config)
    assert found["kernels"] == kernels | {"norm": "auto"}
    assert found["precision"] == {"dtype": "fp64", "grad_reduce_in_fp32": False}
    assert found["optim"] == config["optim"] | {"clip_grad": 0.0}


def test_a_world_that_the_model_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--world-size 12 must be divisible .* = 8"):
        small(12, **TP8)


@pytest.mark.parametrize(
    ("heads", "groups", "tensor", "expected"),
    [
        (64, 8, 8, (8, 2)),
        (28, 4, 2, (8, 2)),
        (28, 4, 8, (4, 1)),  # fewer groups than ranks, as before
        (32, 32, 4, (4, 4)),
        (6, 2, 1, (6, 2)),
        (8, 1, 1, (4, 1)),
        (8, 1, 2, (4, 1)),
    ],
)
def test_heads_and_groups_keep_their_ratios(
    heads: int, groups: int, tensor: int, expected: tuple[int, int]
) -> None:
    config = full(tensor_model_parallel_size=tensor)
    transformer = config["model"]["language"]["transformer"]
    transformer |= {"num_attention_heads": heads, "num_query_groups": groups}
    made = miniature(config).config["model"]["language"]["transformer"]
    assert (made["num_attention_heads"], made["num_query_groups"]) == expected


def test_vision_heads_stay_indivisible() -> None:
    for heads, tensor, expected in ((25, 1, 5), (16, 8, 4), (12, 8, 5)):
        config = full(tensor_model_parallel_size=tensor)
        config["model"]["vision"]["transformer"]["num_attention_heads"] = heads
        made = miniature(config).config["model"]["vision"]["transformer"]
        assert made["num_attention_heads"] == expected


@pytest.mark.parametrize(
    ("parallel", "num_layers", "first", "last"),
    [
        (PP4, 4, None, None),
        (PP4 | {"virtual_pipeline_model_parallel_size": 5}, 8, None, None),
        (PP4 | {"num_layers_in_first_pipeline_stage": 17}, 7, 1, None),
        (PP4 | {"num_layers_in_last_pipeline_stage": 23}, 9, None, 3),
        (TP8 | PP4 | {"num_layers_in_first_pipeline_stage": 14}, 3, 1, None),
        (
            TP8
            | {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 38,
                "num_layers_in_last_pipeline_stage": 42,
            },
            3,
            1,
            2,
        ),
    ],
)
def test_stages_stay_uneven(
    parallel: dict[str, Any], num_layers: int, first: int | None, last: int | None
) -> None:
    made = small(**parallel)
    assert made.config["model"]["language"]["transformer"]["num_layers"] == num_layers
    own = made.layouts[0].parallel
    assert own.get("num_layers_in_first_pipeline_stage") == first
    assert own.get("num_layers_in_last_pipeline_stage") == last
    config = copy.deepcopy(made.config) | {"parallel": own}
    assert violations(config, made.layouts[0].world_size) == []
    assert made.config["optim"]["freeze"][1] == f"language.decoder.layers.{num_layers - 1}.*"


def test_width_that_differs_from_the_heads_keeps_differing() -> None:
    config = full()
    config["model"]["language"]["transformer"]["hidden_size"] = 6144
    made = miniature(config).config["model"]["language"]["transformer"]
    assert made["hidden_size"] != made["num_attention_heads"] * made["kv_channels"]


@pytest.mark.parametrize(
    ("windows", "positions", "expected"),
    [
        ([0] * 40 + [1] * 40, [0, 0, 0, 1] * 20, ([0, 0, 1, 1], [0, 0, 0, 1])),
        ([1] * 79 + [0], 5, ([1, 1, 1, 0], 4)),
        (2, 2, (2, 2)),
    ],
)
def test_kinds_of_layers_are_kept(windows: Any, positions: Any, expected: Any) -> None:
    config = full()
    config["model"]["language"]["transformer"] |= {
        "window_size": [4095, 0],
        "window_attn_skip_freq": windows,
        "no_rope_freq": positions,
    }
    transformer = miniature(config).config["model"]["language"]["transformer"]
    assert transformer["num_layers"] == 4
    assert transformer["window_size"] == [3, 0]
    assert (transformer["window_attn_skip_freq"], transformer["no_rope_freq"]) == expected


@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_scaled_rows_stay_scaled_and_factors_fit_the_heads(percent: float) -> None:
    config = full()
    factors = [1.0 + i for i in range(int(64 * percent))]
    room = "nvmm.modules.rope_scaling."
    long = {"_target_": f"{room}LongRoPE", "factor": 4.0, "original_max_position_embeddings": 4096}
    config["model"]["language"] |= {
        "rotary_percent": percent,
        "rope_scaling": long | {"short_factor": factors, "long_factor": factors},
    }
    scaling = miniature(config).config["model"]["language"]["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == 12
    assert scaling["long_factor"] == factors[::8] and len(factors[::8]) == 16 * percent // 2
    linear = {"_target_": f"{room}Linear", "factor": 4.0}
    config["model"]["language"]["rope_scaling"] = linear
    assert miniature(config).config["model"]["language"]["rope_scaling"] == linear


def test_changes_are_listed_and_the_rest_is_kept() -> None:
    made = small(**TP8)
    assert "model.language.transformer.num_layers: 80 -> 4" in made.changes
    assert made.config["model"]["vision"]["qk_norm"] == "joint"
    assert made.config["objective"] == full()["objective"]
    assert not any("qk_norm" in line for line in made.changes)


def small_fp8(
    fp8: dict[str, Any], world_size: int | None = None, **parallel: Any
) -> dict[str, Any]:
    """The shrunk config of a bf16 run with FP8."""
    config = full(**parallel)
    config["precision"] = {"dtype": "bf16", "fp8": fp8}
    return miniature(config, world_size).config


SP = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("parallel", "world_size", "rows"),
    [
        ({}, None, 1),
        (TP8, None, 1),  # tokens are padded inside the linears
        (TP8 | SP, None, 256),
        ({"tensor_model_parallel_size": 4} | SP, None, 512),
        ({"tensor_model_parallel_size": 2} | CP2 | SP, None, 512),
        (TP8 | PP4 | CP2 | SP, None, 512),  # the larger of two layouts, TP2xPP2 and TP2xCP2
        (TP8 | CP2 | SP, 64, 512),  # TP2xCP2 and TP2xDP2
    ],
)
def test_fp8_rows_are_whole_blocks_on_every_rank(
    parallel: dict[str, Any], world_size: int | None, rows: int
) -> None:
    assert small_fp8({"recipe": "blockwise"}, world_size, **parallel)["row_multiple"] == rows


@pytest.mark.parametrize(
    ("recipe", "parallel", "excluded"),
    [
        ("delayed", {}, False),
        ("delayed", PP4, False),
        ("delayed", TP8, True),  # tiles are dealt
        ("delayed", TP8 | {"encoder": "sharded"}, False),
        ("blockwise", TP8 | {"encoder": "sharded"}, True),  # padded heads are in blocks
        ("mxfp8", TP8 | {"encoder": "sharded"}, True),
    ],
)
def test_fp8_leaves_out_an_encoder_whose_blocks_differ(
    recipe: str, parallel: dict[str, Any], excluded: bool
) -> None:
    given = ["language.decoder.layers.79.*"]
    made = small_fp8({"recipe": recipe, "exclude": given}, **parallel)
    last = made["model"]["language"]["transformer"]["num_layers"] - 1
    expected = [f"language.decoder.layers.{last}.*"] + ["vision.*"] * excluded
    assert made["precision"]["fp8"]["exclude"] == expected
    assert given == ["language.decoder.layers.79.*"]
    whole = small_fp8({"recipe": recipe, "exclude": ["vision.*"]}, **parallel)
    assert whole["precision"]["fp8"]["exclude"] == ["vision.*"]


def test_fp8_is_compared_in_double_precision_and_not_clipped() -> None:
    """Ends of one layer, a short history, features of 128 on every rank."""
    ends = {"num_layers_at_start_in_bf16": 3, "num_layers_at_end_in_bf16": 0}
    made = small_fp8({"recipe": "mxfp8", "margin": 2} | ends, **TP8)
    assert made["optim"]["clip_grad"] == 0.0
    precision = made["precision"]
    assert precision["dtype"] == "fp64" and not precision["grad_reduce_in_fp32"]
    assert precision["fp8"] == {
        "recipe": "mxfp8",
        "margin": 2,
        "amax_history_len": 3,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 0,
        "exclude": ["vision.*"],
    }
    transformer = made["model"]["language"]["transformer"]
    for key in ("hidden_size", "ffn_hidden_size"):
        assert transformer[key] % (2 * 128) == 0
    assert small(**TP8).config["optim"]["clip_grad"] == 1.0


def test_an_uneven_interleaved_miniature_equals_one_rank() -> None:
    """Frozen parts, uneven virtual stages, sequence parallelism; nothing of it by hand."""
    made = small(
        **TP8,
        **PP4,
        virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
        num_layers_in_first_pipeline_stage=14,
    )
    layout = made.layouts[0]
    assert layout.name == "TP2xPP2xVPP2+SP, uneven stages"
    expected = run(made.config, ONE_RANK, num_steps=1)
    comparison = compare(expected, run(made.config, layout, num_steps=1))
    assert comparison.equal, str(comparison)


@pytest.mark.parametrize(("modality", "vision"), [("audio", True), ("video", False)])
def test_media_that_would_not_be_drawn_are_refused(modality: str, vision: bool) -> None:
    """A part that no batch reaches is equal over any layout, whatever it computes."""
    config = full()
    config["model"]["encoders"] = {modality: {"encoder": {}, "connector": {}}}
    if not vision:
        del config["model"]["vision"]
    with pytest.raises(ValueError, match=rf"would leave out a part of model\.encoders\.{modality}"):
        miniature(config)
