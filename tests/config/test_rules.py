"""Each cross-field rule: the key it names and what it says, and that a good config breaks none."""

import copy
import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nvmm.config.problem import nearest
from nvmm.config.rules.all import violations

TRANSFORMER = {
    "_target_": "megatron.core.transformer.transformer_config.TransformerConfig",
    "_partial_": True,
    "num_layers": 8,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
LANGUAGE = {
    "_target_": "nvmm.models.language.LanguageModel",  # whose max_sequence_length is 4096
    "transformer": TRANSFORMER,
    "vocab_size": 509,
    "padded_vocab_size": 512,
}
GOOD: dict[str, Any] = {
    "backend": "native",
    "model": {
        "language": LANGUAGE,
        "vision": {
            "transformer": {
                **TRANSFORMER,
                "num_attention_heads": 5,
                "num_query_groups": 5,
                "hidden_size": 160,
            },
            "image_size": 448,
            "patch_size": 14,
        },
        "connector": {"downsample": 2},
    },
    "data": {
        "sequence_length": 2048,
        "train": {"build": {"max_tiles": 6, "tile_size": 448, "tokens_per_tile": 256}},
        "validation": None,
    },
    "optim": {
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-5,
        "warmup_steps": 10,
        "decay_steps": None,
        "groups": [{"pattern": "*", "learning_rate": 1e-5, "min_learning_rate": 0}],
    },
    "parallel": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 1,
    },
    "precision": {"dtype": "bf16"},
    "trainer": {
        "max_steps": 100,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "profile": [2, 4],
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with values changed; `__` stands for the dots of a key."""
    config = copy.deepcopy(GOOD)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


LM = "model.language"
TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
CP = "parallel__context_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"
FIRST = "parallel__num_layers_in_first_pipeline_stage"
LAST = "parallel__num_layers_in_last_pipeline_stage"
T = "model__language__transformer__"
FP8 = "precision__fp8"
LORA = {"_target_": "nvmm.modules.lora.Lora", "targets": ["*.linear_qkv"]}
CASES: list[tuple[dict[str, Any], str, str]] = [
    (
        {TP: 3, f"{T}hidden_size": 144},
        f"{LM}.transformer.num_attention_heads=4",
        "size of 1, 2, 4",
    ),
    ({"model__pooling": {"num_heads": 3}}, "model.pooling.num_heads=3", "size of 1, 3"),
    ({TP: 3, f"{T}hidden_size": 144}, f"{LM}.padded_vocab_size=512", "divisible by"),
    (
        {TP: 4, f"{T}num_attention_heads": 12, f"{T}num_query_groups": 6, f"{T}kv_channels": 32},
        f"{LM}.transformer.num_query_groups=6",
        "a multiple or a divisor",
    ),
    (
        {
            TP: 3,
            f"{T}hidden_size": 144,
            f"{T}num_attention_heads": 6,
            f"{T}num_query_groups": 1,
            f"{T}kv_channels": 32,
        },
        f"{LM}.transformer.num_query_groups=1",
        "(num_attention_heads + 2 x num_query_groups) x kv_channels = 256",
    ),
    ({f"{T}ffn_hidden_size": 511}, f"{LM}.transformer.ffn_hidden_size=511", "divisible by para"),
    (
        {TP: 8, f"{T}num_attention_heads": 8, f"{T}hidden_size": 136, f"{T}ffn_hidden_size": 548},
        f"{LM}.transformer.ffn_hidden_size=548",
        "divisible by parallel.tensor_model_parallel_size=8",
    ),
    ({"model__connector__hidden_size": 97}, "model.connector.hidden_size=97", "divisible by"),
    (
        {f"{T}hidden_size": 129, f"{T}kv_channels": 32},
        "model.connector.hidden_size=129",
        "divisible by",
    ),
    ({"model__pooling": {"ffn_hidden_size": 81}}, "model.pooling.ffn_hidden_size=81", "divisible"),
    (
        {"model__cross_attention": {"ffn_hidden_size": 99}},
        "model.cross_attention.ffn_hidden_size=99",
        "divisible by",
    ),
    (
        {"model__vision__transformer__ffn_hidden_size": 99, "parallel__encoder": "sharded"},
        "model.vision.transformer.ffn_hidden_size=99",
        "divisible by",
    ),
    (
        {
            "model__encoders": {
                "audio": {
                    "encoder": {"transformer": {"hidden_size": 80, "ffn_hidden_size": 101}},
                    "connector": {"hidden_size": 103},
                }
            },
            "parallel__encoder": "sharded",
        },
        "model.encoders.audio.encoder.transformer.ffn_hidden_size=101",
        "divisible by",
    ),
    ({f"{T}num_query_groups": 3}, f"{LM}.transformer.num_query_groups=3", "use one of 1, 2, 4"),
    ({f"{T}hidden_size": 130}, f"{LM}.transformer.hidden_size=130", "num_attention_heads=4"),
    ({f"{T}num_layers": 6}, f"{LM}.transformer.num_layers=6", "2 pipeline stages x 2 virtual"),
    ({FIRST: 2, f"{T}num_layers": 7}, f"{LM}.transformer.num_layers=7", "minus the 2 of"),
    ({FIRST: 3}, "parallel.num_layers_in_first_pipeline_stage=3", "2 virtual stages"),
    ({FIRST: 2, LAST: 2}, f"{LM}.transformer.num_layers=8", "leaves 4 layers for the 0 stages"),
    ({FIRST: 2, PP: 1, VPP: None}, "parallel.num_layers_in_first_pipeline_stage=2", "use null"),
    ({PP: 1}, "parallel.virtual_pipeline_model_parallel_size=2", "use null"),
    ({TP: 1}, "parallel.sequence_parallel=True", "tensor_model_parallel_size > 1"),
    ({"data__sequence_length": 2049}, "data.sequence_length=2049", "with parallel.sequence"),
    ({"data__sequence_length": 2050, CP: 3}, "data.sequence_length=2050", "divisible by 6 (two"),
    (
        {"data__sequence_length": 2052, CP: 2, TP: 4, f"{T}num_attention_heads": 8},
        "data.sequence_length=2052",
        "divisible by 8 (two chunks",
    ),
    (
        {"data__sequence_length": 4098},
        "data.sequence_length=4098",
        f"must be at most {LM}.max_sequence_length=4096",
    ),
    ({CP: 2, "backend": "transformer_engine"}, "parallel.context_parallel_size=2", "use backend=n"),
    ({CP: 0}, "parallel.context_parallel_size=0", "at least 1"),
    (
        {"parallel__overlap_param_gather": True},
        "parallel.overlap_param_gather=True",
        "needs parallel.overlap_grad_reduce=true",
    ),
    (
        {"parallel__recompute_num_layers": 2, "parallel__recompute_granularity": "selective"},
        "parallel.recompute_num_layers=2",
        "recompute_granularity=full",
    ),
    ({"model__language__padded_vocab_size": 508}, f"{LM}.padded_vocab_size=508", "at least"),
    ({"trainer__global_batch_size": 3}, "trainer.global_batch_size=3", "micro_batch_size=2"),
    ({"trainer__global_batch_size": 0}, "trainer.global_batch_size=0", "at least 1"),
    ({f"{T}tensor_model_parallel_size": 2}, f"{LM}.transformer.tensor_model", "set parallel."),
    ({f"{T}bf16": True}, f"{LM}.transformer.bf16=True", "set precision.dtype"),
    ({f"{T}fp8": "hybrid"}, f"{LM}.transformer.fp8=hybrid", "set precision.fp8"),
    ({f"{T}fp8_param": True}, f"{LM}.transformer.fp8_param=True", "backend=transformer_engine"),
    ({f"{T}fp4": "e2m1"}, f"{LM}.transformer.fp4=e2m1", "backend=transformer_engine"),
    ({FP8: {"amax_history_len": 0}}, "precision.fp8.amax_history_len=0", "at least 1"),
    (
        {FP8: {"recipe": "mxfp8", "margin": 1}, "data__sequence_length": 2048},
        "precision.fp8.margin=1",
        "is of recipe=delayed; use 0",
    ),
    (
        {FP8: {"num_layers_at_end_in_bf16": -1}},
        "precision.fp8.num_layers_at_end_in_bf16=-1",
        "at least 0",
    ),
    (
        {FP8: {"recipe": "blockwise"}, "data__sequence_length": 2176},
        "data.sequence_length=2176",
        "must be divisible by 256 (parallel.tensor_model_parallel_size=2 with"
        " parallel.sequence_parallel and blocks of 128 tokens",
    ),
    ({f"{T}rotary_interleaved": True}, f"{LM}.transformer.rotary_inter", "must be false"),
    ({f"{T}flash_decode": True}, f"{LM}.transformer.flash_decode=True", "kernels.rope"),
    ({"backend": "transformer_engine"}, "backend=transformer_engine", "not installed"),
    ({"backend": "nativ"}, "backend=nativ", "native, transformer_engine"),
    ({"optim__min_learning_rate": 1}, "optim.min_learning_rate=1", "learning_rate=0.0001"),
    (
        {"optim__groups": [{"learning_rate": 1e-5, "min_learning_rate": 2e-5}]},
        "optim.groups[0].min_learning_rate=2e-05",
        "at most learning_rate=1e-05",
    ),
    (
        {"optim__moments_dtype": "bf16", "optim__betas": [0.9, 0.999]},
        "optim.betas=[0.9, 0.999]",
        "at most 0.99 with optim.moments_dtype=bf16",
    ),
    ({"lora": {"rank": 4}}, "lora={'rank': 4}", "add lora=default"),
    ({"lora": LORA | {"targets": []}}, "lora.targets=[]", "at least one linear"),
    ({"lora": LORA | {"train": [1]}}, "lora.train=[1]", "a list of patterns"),
    ({"lora": LORA | {"rank": 0}}, "lora.rank=0", "at least 1"),
    ({"lora": LORA | {"alpha": 0}}, "lora.alpha=0", "must be positive"),
    ({"lora": LORA | {"dropout": 1.0}}, "lora.dropout=1.0", "less than 1"),
    ({"optim__groups": [{"lr": 1}]}, "optim.groups[0].lr=1", "min_learning_rate, pattern"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"optim__warmup_steps": 101}, "optim.warmup_steps=101", "trainer.max_steps=100"),
    ({"optim__decay_steps": 5}, "optim.decay_steps=5", "at least optim.warmup_steps=10"),
    ({"optim__warmup_tokens": 5}, "optim.warmup_steps=10", "left out beside lengths in tokens"),
    (
        {"optim__warmup_steps": 0, "optim__warmup_tokens": 100 * 16 * 2048 + 1},
        "optim.warmup_tokens=3276801",
        "at most the tokens of trainer.max_steps=100",
    ),
    (
        {"optim__warmup_steps": 0, "optim__warmup_tokens": 9, "optim__decay_tokens": 8},
        "optim.decay_tokens=8",
        "at least optim.warmup_tokens=9",
    ),
    ({"optim__cooldown_steps": 91}, "optim.cooldown_steps=91", "the 90 steps from warm-up"),
    ({"optim__cooldown_steps": 0}, "optim.cooldown_steps=0", "at least 1"),
    (
        {"optim__cooldown_steps": 9, "optim__schedule": "inverse_sqrt"},
        "optim.cooldown_steps=9",
        "needs optim.schedule to be cosine",
    ),
    (
        {"optim__warmup_steps": 0, "optim__schedule": "inverse_sqrt"},
        "optim.warmup_steps=0",
        "above 0 with optim.schedule=inverse_sqrt",
    ),
    (
        {"optim__min_learning_rate": 0, "optim__schedule": "exponential"},
        "optim.min_learning_rate=0",
        "above 0 with optim.schedule=exponential",
    ),
    ({"trainer__batch_ramp": [{"steps": 2}]}, "trainer.batch_ramp[0].global_", "whole number"),
    (
        {"trainer__batch_ramp": [{"global_batch_size": 5, "steps": 2}]},
        "trainer.batch_ramp[0].global_batch_size=5",
        "must be divisible by trainer.micro_batch_size=2",
    ),
    (
        {"trainer__batch_ramp": [{"global_batch_size": 2, "tokens": 4095}]},
        "trainer.batch_ramp[0].tokens=4095",
        "at least the 4096 tokens of one step",
    ),
    ({"model__vision__image_size": 13}, "model.vision.image_size=13", "patch_size=14"),
    (
        {"model__connector__downsample": 3},
        "model.connector.downsample=3",
        "must divide the ViT grid (32x32); use one of 1, 2, 4, 8, 16, 32, or model.connector.pad",
    ),
    ({"data__train__build__max_tiles": 12}, "data.sequence_length=2048", "13 tiles"),
    ({"data__train__build__tile_size": 224}, "data.train.build.tile_size=224", "448"),
    ({"data__train__build__tokens_per_tile": 64}, "data.train.build.tokens_per_tile=64", "256"),
    ({"data__train__build__min_tiles": 7}, "data.train.build.min_tiles=7", "max_tiles=6"),
    ({"data__max_bad_fraction": 1.5}, "data.max_bad_fraction=1.5", "[0, 1]"),
    ({"max_bad_fraction": -0.1}, "max_bad_fraction=-0.1", "[0, 1]"),
    ({"batch_size": 0}, "batch_size=0", "at least 1"),
    ({"num_samples": 0}, "num_samples=0", "at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0", "at least 1"),
    ({"temperature": -1.0}, "temperature=-1.0", "0 (greedy) or more"),
    ({"top_p": 0.0}, "top_p=0.0", "at most 1"),
    (
        {"data__validation": {"local_window": 8}},
        "data.validation.local_window=8",
        "validation is not shuffled",
    ),
    ({"temperature": 0.0, "top_p": 0.5}, "top_p=0.5", "needs temperature > 0"),
    ({"data__window": 0}, "data.window=0", "at least 1"),
    ({"data__window": 64}, "data.window=64", "needs data.pack to be true"),
    (
        {"data__on_error": "stop", "data__max_bad_fraction": 0.5},
        "data.max_bad_fraction=0.5",
        "needs data.on_error to be skip",
    ),
    (
        {"optim__schedule": "constant", "optim__decay_steps": 50},
        "optim.decay_steps=50",
        "needs optim.schedule to be cosine, linear, minus_sqrt, exponential",
    ),
    (
        {"trainer__on_nonfinite": "stop", "trainer__max_skips": 3},
        "trainer.max_skips=3",
        "needs trainer.on_nonfinite to be skip",
    ),
    (
        {"trainer__on_nonfinite": "stop", "trainer__max_consecutive_skips": 3},
        "trainer.max_consecutive_skips=3",
        "needs trainer.on_nonfinite to be skip",
    ),
    (
        {"objective": {"distillation_weight": 0.0, "teacher_temperature": 2.0}},
        "objective.teacher_temperature=2.0",
        "needs objective.distillation_weight to be above 0",
    ),
    (
        {"model__connector__activation_func": {"path": "torch.relu"}},
        "model.connector.activation_func.path=torch.relu",
        "needs model.connector.hidden_size",
    ),
    (
        {"logger": {"wandb": False, "wandb_project": "mine"}},
        "logger.wandb_project=mine",
        "needs logger.wandb to be true",
    ),
    ({"parallel__timeout_minutes": 0}, "parallel.timeout_minutes=0", "above 0"),
    ({"trainer__max_minutes": -1}, "trainer.max_minutes=-1", "at least 0"),
    ({f"{T}num_layers": -2}, f"{LM}.transformer.num_layers=-2", "at least 1"),
    ({f"{T}kv_channels": 15}, f"{LM}.transformer.kv_channels=15", "must be even"),
    ({f"{T}hidden_dropout": 1.0}, f"{LM}.transformer.hidden_dropout=1.0", "less than 1"),
    ({f"{T}init_method_std": -1}, f"{LM}.transformer.init_method_std=-1", "negative"),
    ({f"{T}layernorm_epsilon": -1}, f"{LM}.transformer.layernorm_epsilon=-1", "negative"),
    ({f"{T}softmax_scale": 0}, f"{LM}.transformer.softmax_scale=0", "must not be 0"),
    ({f"{T}activation_func": "silu"}, f"{LM}.transformer.activation_func=silu", "a function"),
    (
        {f"{T}calculate_per_token_loss": False},
        f"{LM}.transformer.calculate_per_token_loss=False",
        "must not be given here; set objective",
    ),
    ({"model__language__rotary_percent": 1.5}, f"{LM}.rotary_percent=1.5", "at most 1"),
    ({"model__language__rotary_base": 0}, f"{LM}.rotary_base=0", "above 0"),
    (
        {"optim__groups": [{"pattern": ["x"], "learning_rate": 1}]},
        "optim.groups[0].pattern=['x']",
        "a pattern of names",
    ),
    (
        {"optim__groups": [{"pattern": "x", "learning_rate": "abc"}]},
        "optim.groups[0].learning_rate=abc",
        "a number",
    ),
    ({"data__train__shards": []}, "data.train.shards=[]", "must name files"),
    ({"data__blend": None}, "data.train.shards=null", "or give data.blend"),
    ({"data__blend": []}, "data.blend=[]", "a list of datasets"),
    ({"data__blend": ["a"]}, "data.blend[0]=a", "must be a mapping"),
    ({"data__blend": [{"shards": "a", "part": 1}]}, "data.blend[0].part=1", "weight"),
    (
        {"data__blend": [{"shards": "a", "build": {"max_tiles": 2}}]},
        "data.blend[0].build=",
        "it needs a _target_",
    ),
    ({"data__blend": [{"name": "a"}]}, "data.blend[0].shards=null", "or give a nested blend"),
    (
        {"data__blend": [{"blend": [{"shards": "a", "samples": 0}]}]},
        "data.blend[0].blend[0].samples=0",
        "greater than 0",
    ),
    (
        {"data__blend": [{"shards": "a", "epochs": 0.5}]},
        "data.blend[0].epochs=0.5",
        "a whole number",
    ),
    (
        {"data__blend": [{"shards": "a", "weight": 1}, {"shards": "b"}]},
        "data.blend[1].weight=null",
        "other datasets of this list have a weight",
    ),
    (
        {"data__blend": [{"shards": "a", "passes": 1, "weight": 2}]},
        "data.blend[0].weight=2",
        "left out beside passes",
    ),
    ({"data__blend": [{"shards": "a", "passes": 0}]}, "data.blend[0].passes=0", "greater than 0"),
    (
        {"data__blend": [{"shards": "a", "passes": math.inf}]},
        "data.blend[0].passes=inf",
        "and finite",
    ),
    (
        {"data__blend": [{"shards": "a", "weight": math.nan}]},
        "data.blend[0].weight=nan",
        "and finite",
    ),
    ({"data__blend": [{"shards": "a", "passes": "x"}]}, "data.blend[0].passes=x", "a number"),
    (
        {"data__blend": [{"shards": "a", "passes": 1}, {"shards": "b"}]},
        "data.blend[1].passes=null",
        "other datasets of data.blend have passes",
    ),
    (
        {"data__blend": [{"blend": [{"shards": "a", "passes": 2}]}]},
        "data.blend[0].blend[0].passes=2",
        "in data.blend itself",
    ),
    (
        {"data__blend": [{"shards": "a"}], "data__train__shards": "b"},
        "data.train.shards=b",
        "must be null where data.blend is given",
    ),
    ({"trainer__profile": [4, 2]}, "trainer.profile=[4, 2]", "start < stop"),
]


def test_a_good_config_breaks_no_rule() -> None:
    assert violations(GOOD) == []
    assert violations(GOOD, world_size=8) == []


@pytest.mark.parametrize(("changes", "start", "says"), CASES)
def test_rule(changes: dict[str, Any], start: str, says: str) -> None:
    lines = [str(problem) for problem in violations(changed(**changes))]
    assert any(line.startswith(start) and says in line for line in lines), lines
    unrelated = [line for line in lines if not line.startswith(start)]
    assert len(unrelated) <= 2, unrelated


@pytest.mark.parametrize(
    ("world_size", "changes", "start", "says"),
    [
        (6, {}, "WORLD_SIZE=6", "a multiple of 4 ranks"),
        (12, {}, "trainer.global_batch_size=16", "x 3 data-parallel ranks = 6"),
        (4, {"trainer__global_batch_size": 6}, "trainer.global_batch_size=6", "3 micro-batches"),
        (
            4,
            {"trainer__batch_ramp": [{"global_batch_size": 6, "steps": 1}]},
            "trainer.batch_ramp[0].global_batch_size=6",
            "3 micro-batches a rank",
        ),
        (
            8,
            {
                "trainer__batch_ramp": [
                    {"global_batch_size": 8, "steps": 1},
                    {"global_batch_size": 2, "steps": 1},
                ]
            },
            "trainer.batch_ramp[1].global_batch_size=2",
            "x 2 data-parallel ranks = 4",
        ),
    ],
)
def test_rules_that_need_the_world_size(
    world_size: int, changes: dict[str, Any], start: str, says: str
) -> None:
    config = changed(**changes)
    assert violations(config) == []
    (problem,) = violations(config, world_size)
    assert str(problem).startswith(start) and says in str(problem)


def test_a_blend_is_a_list() -> None:
    nested = {"weight": 2, "temperature": 1.5, "blend": [{"shards": "b", "epochs": 0}]}
    entries = [{"name": "a", "weight": 1, "shards": ["a", "c"], "samples": 0.5}, nested]
    assert violations(changed(data__blend=entries, data__train__shards=None)) == []


def test_all_violations_come_at_once() -> None:
    config = changed(
        **{TP: 3, f"{T}hidden_size": 144, "optim__warmup_steps": 101, "backend": "nativ"}
    )
    assert {p.key for p in violations(config)} == {
        f"{LM}.transformer.num_attention_heads",
        f"{LM}.padded_vocab_size",
        "data.sequence_length",
        "optim.warmup_steps",
        "backend",
    }


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_query_groups_may_divide_the_tensor_parallel_size(tensor: int) -> None:
    """mcore repeats a key-value head over ranks when there are fewer groups than ranks."""
    heads = {f"{T}num_attention_heads": 8, f"{T}num_query_groups": 2}
    assert violations(changed(**{TP: tensor, **heads})) == []


def test_uneven_stages() -> None:
    assert violations(changed(**{VPP: None, FIRST: 3, LAST: 5})) == []
    assert violations(changed(**{VPP: None, FIRST: 2, PP: 3})) == []


def test_fp8_is_accepted_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformer_engine")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "transformer_engine", module)
    engine = {"backend": "transformer_engine", f"{T}fp8_param": True}
    assert violations(changed(**engine, **{FP8: {"recipe": "current"}})) == []
    ends = {"num_layers_at_start_in_bf16": 1}
    [problem] = violations(changed(**engine, **{FP8: ends}))
    assert "must be 0 with recipe=delayed and backend=transformer_engine" in str(problem)
    assert violations(changed(**engine, **{FP8: ends | {"recipe": "current"}})) == []
    [problem] = violations(changed(**engine, precision__dtype="fp64"))
    assert "precision.dtype=fp64 needs backend=native" in str(problem)


def test_missing_keys_and_other_types_are_left_to_the_type_check() -> None:
    assert violations({}) == []
    assert violations({"model": {"transformer": {"num_layers": "three"}}, "parallel": None}) == []
    assert violations(changed(**{f"{T}num_layers": "???", "data__sequence_length": "long"})) == []


def test_nearest() -> None:
    assert nearest("learnin_rate", ["learning_rate", "eps"]) == "learning_rate"
    assert nearest("rate", ["learning_rate", "eps"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "eps"]) is None


ATTENDED = "data__train__build__attended"


def attending(attended: str = "all", **changes: Any) -> dict[str, Any]:
    """GOOD as NVLM-X."""
    config = copy.deepcopy(changed(**changes))
    config["data"]["train"]["build"]["attended"] = attended
    config["model"]["cross_attention"] = {"interval": 2}
    return config


def test_tiles_go_to_cross_attention_where_the_model_has_it() -> None:
    for attended in ("all", "regular"):
        assert violations(attending(attended)) == []
    (problem,) = violations(attending("none"))
    assert str(problem).startswith("data.train.build.attended=none must be all (NVLM-X)")
    (problem,) = violations(changed(**{ATTENDED: "all"}))
    assert "must be none: the model has no model.cross_attention" in str(problem)


def test_attended_tiles_take_no_room_in_the_sequence() -> None:
    short = {"data__sequence_length": 256}
    assert any("must hold an image" in str(p) for p in violations(changed(**short)))
    assert violations(attending("all", **short)) == []
    problems = violations(attending("regular", **short))
    assert any("7 tiles (data.train.build.max_tiles=6), 1 of them" in str(p) for p in problems)


def test_cross_attention_s_heads_and_layers() -> None:
    config = attending(**{TP: 8, f"{T}num_attention_heads": 8, f"{T}num_query_groups": 2})
    (problem,) = violations(config)
    assert str(problem).startswith(f"{LM}.transformer.num_query_groups=2 must be divisible by")
    config["model"]["cross_attention"] |= {"num_query_groups": 8, "interval": 500}
    (problem,) = violations(config)
    assert problem.key == "model.cross_attention.interval"
    config["model"]["cross_attention"] = {"num_attention_heads": 12, "num_query_groups": 8}
    (problem,) = violations(config)
    assert "must divide the 12 heads of cross-attention" in str(problem)


def test_cross_attention_s_activation_needs_a_feed_forward_part() -> None:
    config = attending()
    function = {"_target_": "hydra.utils.get_method", "path": "torch.nn.functional.gelu"}
    config["model"]["cross_attention"] |= {"activation_func": function, "ffn_hidden_size": 64}
    assert violations(config) == []
    del config["model"]["cross_attention"]["ffn_hidden_size"]
    (problem,) = violations(config)
    assert problem.key == "model.cross_attention.activation_func"
    assert problem.allowed.startswith("needs model.cross_attention.ffn_hidden_size")


def test_a_pipeline_with_cross_attention_exchanges_lengths() -> None:
    config = attending()
    config["parallel"]["variable_seq_lengths"] = False
    assert [p.key for p in violations(config)] == ["parallel.variable_seq_lengths"]


def test_data_and_objective_fit_before_torch_is_imported() -> None:
    """A builder gives the extras that the objective needs, and none that nobody reads."""
    targets = {
        "instruct": "nvmm.data.samples.instruct.InstructBuilder",
        "retrieval": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "next_token": "nvmm.objectives.next_token.NextToken",
        "contrastive": "nvmm.objectives.contrastive.Contrastive",
        "language": "nvmm.models.language.LanguageModel",
        "embedder": "nvmm.models.embedder.EmbeddingModel",
    }

    def problems(build: str, objective: str, model: str, **data: Any) -> list[str]:
        config = {
            "data": {"train": {"build": {"_target_": targets[build]}}, **data},
            "objective": {"_target_": targets[objective]},
            "model": {"_target_": targets[model]},
        }
        return [str(p) for p in violations(config) if "._target_=" in str(p)]

    assert problems("instruct", "next_token", "language") == []
    assert problems("retrieval", "contrastive", "embedder") == []
    [missing] = problems("instruct", "contrastive", "embedder")
    assert missing.startswith("data.train.build._target_=") and "gives no answers" in missing
    [unread] = problems("retrieval", "next_token", "language")
    assert "gives answers, document_id" in unread and "pool_from" in unread
    blend = [{"name": "a", "build": {"_target_": targets["instruct"]}}]
    assert any(
        "data.blend[0].build" in p
        for p in problems("retrieval", "contrastive", "embedder", blend=blend)
    )


def preferring(objective: dict[str, Any] | None = None, **build: Any) -> dict[str, Any]:
    """A config of preference training."""
    own = {"_target_": "nvmm.data.samples.preference.PreferenceBuilder"}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return {
        "data": {"train": {"build": own | build}},
        "objective": {"_target_": "nvmm.objectives.preference.Dpo"} | (objective or {}),
        "model": LANGUAGE | {"transformer": TRANSFORMER | dropout},
    }


def test_references_are_in_the_step_or_in_the_data() -> None:
    def problems(config: dict[str, Any]) -> list[str]:
        return [str(p) for p in violations(config) if "train.build" in p.key]

    scored = {"reference": "scores"}
    assert problems(preferring()) == []
    assert problems(preferring({"reference": "data"}, **scored)) == []
    [both] = problems(preferring(**scored))
    assert both.startswith("data.train.build.reference=scores needs objective.reference=data")
    [neither] = problems(preferring({"reference": "data"}))
    assert neither.startswith("data.train.build.reference=null must name the output of job=score")
    [kto] = problems(preferring({"_target_": "nvmm.objectives.kto.Kto"}, **scored))
    assert "needs objective.reference=data" in kto
    other = {"_target_": "nvmm.data.samples.instruct.InstructBuilder"}
    [wrong] = problems(preferring({"reference": "data"}) | {"data": {"train": {"build": other}}})
    assert "gives no chosen, reference, reward" in wrong


def test_a_reference_has_no_dropout() -> None:
    def keys(config: dict[str, Any]) -> list[str]:
        return [p.key for p in violations(config) if "dropout" in p.key]

    assert keys(preferring()) == []
    config = preferring() | {"lora": LORA | {"dropout": 0.1}}
    config["model"]["transformer"]["hidden_dropout"] = 0.2
    config["model"]["transformer"].pop("attention_dropout")  # mcore's default is 0.1
    expected = ["model.transformer.hidden_dropout", "model.transformer.attention_dropout"]
    assert keys(config) == [*expected, "lora.dropout"]
    config["objective"] = {"_target_": "nvmm.objectives.next_token.NextToken"}
    assert keys(config) == []


def test_a_divisor_of_a_term_without_weight_is_refused() -> None:
    config = preferring({"sft_per_token": True})
    assert [p.key for p in violations(config) if "sft" in p.key] == ["objective.sft_per_token"]
    assert not [
        p
        for p in violations(preferring({"sft_per_token": True, "sft_weight": 1e-3}))
        if "sft" in p.key
    ]


def test_every_module_of_rules_is_among_all() -> None:
    """A rule that no check runs refuses nothing."""
    from nvmm.config.rules import all as every

    folder = Path(every.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "all"}
    modules = [importlib.import_module(f"nvmm.config.rules.{name}") for name in sorted(names)]
    rules = [rule for module in modules for rule in getattr(module, "RULES", ())]
    assert all(hasattr(module, "RULES") for module in modules)
    assert set(rules) == set(every.RULES) and len(rules) == len(every.RULES)
