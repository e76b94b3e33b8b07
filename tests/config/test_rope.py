"""Values of RoPE scaling and of learned positions that are refused, and old keys."""

from __future__ import annotations

from typing import Any

import pytest

from nvmm.config.check import check, to_plain
from nvmm.config.compose import composed
from nvmm.config.moved import renamed
from nvmm.config.rules.all import violations
from nvmm.config.rules.rope import KINDS, ROOM
from nvmm.convert.formats import llama

ORIGINAL = {"original_max_position_embeddings": 8}
GOOD: dict[str, dict[str, Any]] = {
    "Linear": {"factor": 2.0},
    "Llama3": {"factor": 2.0},
    "YaRN": {"factor": 2.0, **ORIGINAL},
    "DynamicNTK": {"factor": 2.0, **ORIGINAL},
    "LongRoPE": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 2.0, **ORIGINAL},
}
BAD: list[tuple[str, dict[str, Any], str]] = [
    *((kind, {"factor": 0.5}, "factor=0.5 must be at least 1") for kind in KINDS),
    ("YaRN", {"original_max_position_embeddings": 1}, "embeddings=1 must be at least 2"),
    ("YaRN", {"attention_factor": 0.0}, "attention_factor=0.0 must be above 0"),
    ("YaRN", {"beta_slow": 64.0}, "beta_fast=32.0 must be above beta_slow=64.0"),
    ("YaRN", {"mscale": 1.0}, "mscale=1.0 acts beside mscale_all_dim alone"),
    ("YaRN", {"mscale_all_dim": 1.0}, "mscale_all_dim=1.0 acts beside mscale alone"),
    (
        "YaRN",
        {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
        "mscale=1.0 would not be read beside attention_factor",
    ),
    ("Llama3", {"high_freq_factor": 1}, "high_freq_factor=1 must be above low_freq_factor=1.0"),
    ("LongRoPE", {"long_factor": [1.0]}, "long_factor=[1.0] must have 16 numbers above 0"),
    ("LongRoPE", {"short_factor": [0.0] * 16}, "must have 16 numbers above 0"),
    ("LongRoPE", {"factor": None}, "factor=null must be given where attention_factor is not"),
    ("LongRoPE", {"attention_factor": 1.0}, "factor=2.0 would not be read beside attention"),
]


def with_scaling(kind: str, fields: dict[str, Any], **model: Any) -> dict[str, Any]:
    transformer = {
        "_target_": "megatron.core.transformer.transformer_config.TransformerConfig",
        **{"_partial_": True, "num_layers": 2, "hidden_size": 128, "num_attention_heads": 4},
    }
    return {
        "backend": "native",
        "model": {
            "_target_": "nvmm.models.language.LanguageModel",
            **{"_partial_": True, "transformer": transformer},
            **{"vocab_size": 509, "padded_vocab_size": 512},
            "rope_scaling": {"_target_": ROOM + kind, **GOOD[kind], **fields},
            **model,
        },
    }


@pytest.mark.parametrize("kind", KINDS)
def test_good_values_break_no_rule(kind: str) -> None:
    assert violations(with_scaling(kind, {})) == []


@pytest.mark.parametrize(("kind", "fields", "says"), BAD)
def test_a_bad_value_is_named(kind: str, fields: dict[str, Any], says: str) -> None:
    [problem] = violations(with_scaling(kind, fields))
    assert str(problem).startswith("model.rope_scaling.") and says in str(problem)


def test_bases_and_heads_that_cannot_be_scaled_are_named() -> None:
    [problem] = violations(with_scaling("YaRN", {}, rotary_base=1))
    assert str(problem) == "model.rotary_base=1 must be above 1 with model.rope_scaling"
    [problem] = violations(with_scaling("DynamicNTK", {}, rotary_percent=0.0625))
    assert "needs more than the 2 channels that turn" in str(problem)
    other = with_scaling("Linear", {"_target_": "nvmm.modules.pooling.Mean"})
    [problem] = violations(other)
    assert problem.key == "model.rope_scaling._target_" and "YaRN" in problem.allowed


@pytest.mark.parametrize("value", [True, 4.0, "yarn", {"factor": 4.0}])
def test_anything_but_a_constructor_is_refused(value: Any) -> None:
    overrides = ["experiment=language/tiny", "tokenizer.path=t", "data.train.shards=t"]
    config = to_plain(composed("train", overrides))
    config["model"]["rope_scaling"] = value
    [problem] = [p for p in check(config) if p.key.startswith("model.rope_scaling")]
    assert "must be a mapping with the _target_ of a Scaling" in problem.allowed


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 64}, "beta_fast=32.0 must be above"),
        ({"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1.0}, "low_freq_factor=1.0 would"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8},
            "short_factor=[1.0] must have 8 numbers",
        ),
        ({"rope_type": "proportional"}, "must be default, linear, llama3, yarn, dynamic, longrope"),
    ],
)
def test_a_config_json_s_values_are_named(rope: dict[str, Any], says: str) -> None:
    hf = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ValueError) as raised:
        llama.to_model({**hf, "rope_scaling": rope})
    assert str(raised.value).startswith("config.json: RoPE") and says in str(raised.value)


def test_old_keys_become_a_scaling() -> None:
    """A run's config of before states all three, with their defaults."""
    old = {"_target_": "nvmm.models.language.LanguageModel", "rope_scaling_factor": 8.0}
    plain = {"_target_": old["_target_"]}
    assert renamed(old | {"rope_scaling": False}) == plain
    assert renamed({"model": old | {"rope_scaling": True}}) == {
        "model": plain | {"rope_scaling": {"_target_": f"{ROOM}Llama3", "factor": 8.0}}
    }
    stretched = renamed(old | {"rope_scaling": False, "seq_len_interpolation_factor": 3.0})
    assert stretched == plain | {"rope_scaling": {"_target_": f"{ROOM}Linear", "factor": 3.0}}
    new = plain | {"rope_scaling": {"_target_": f"{ROOM}YaRN", "factor": 3.0}}
    assert renamed(new) == new


LEARNED = {"position_embedding_type": "learned_absolute", "rope_scaling": None}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (LEARNED, None),
        (LEARNED | {"position_offset": 2, "rotary_base": 10000}, None),
        (LEARNED | {"position_offset": -1}, "model.position_offset=-1 must be at least 0"),
        (LEARNED | {"rotary_base": 500}, "model.rotary_base=500 would not be read with model.pos"),
        (LEARNED | {"rotary_percent": 0.5}, "model.rotary_percent=0.5 would not be read with"),
        ({"position_embedding_type": "learned_absolute"}, "model.rope_scaling={'_target_': "),
        ({"position_offset": 2}, "model.position_offset=2 needs model.position_embedding_type="),
    ],
)
def test_keys_of_another_kind_of_positions_are_named(
    model: dict[str, Any], says: str | None
) -> None:
    problems = [str(problem) for problem in violations(with_scaling("Linear", {}, **model))]
    assert len(problems) == (says is not None)
    assert says is None or problems[0].startswith(says)


def test_learned_positions_turn_no_channels() -> None:
    """An odd width is no fault then, and layers without RoPE are no choice."""
    learned = with_scaling("Linear", {}, **LEARNED)
    rotary = with_scaling("Linear", {})
    for config, key in ((learned, "no_rope_freq"), (rotary, "kv_channels")):
        config["model"]["transformer"] |= {"kv_channels": 33, "no_rope_freq": 2}
        [problem] = violations(config)
        assert problem.key == f"model.transformer.{key}"
