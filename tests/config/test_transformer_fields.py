"""Every field of mcore's TransformerConfig: our layers read it, another key decides it, or it is
refused by name. A field that a new mcore brings belongs to the last kind until it is listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nvmm.config.check import check
from nvmm.config.compose import composed, instantiate
from nvmm.config.rules.all import violations
from nvmm.config.rules.transformer import (
    DECIDED_ELSEWHERE,
    ENCODER_FIELDS,
    ENGINE_FIELDS,
    LANGUAGE_FIELDS,
)
from nvmm.config.signatures import default_of
from nvmm.parallel import generators
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.models.test_language import batch_of

OTHER: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 72,
    "num_attention_heads": 6,
    "num_query_groups": 4,
    "kv_channels": 24,
    "ffn_hidden_size": 100,
    "normalization": "LayerNorm",
    "activation_func": tiny.method("torch.nn.functional.relu"),
    "softmax_scale": 0.5,
    "window_size": [3, 0],
    "window_attn_skip_freq": [0, 1],
    "no_rope_freq": [0, 1],
}
BESIDE = {"window_attn_skip_freq": {"window_size": [3, 0]}}


def fields() -> dict[str, Any]:
    """Name -> default of all fields, those that mcore inherits too."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(TransformerConfig)
        if field.init
    }


def other(name: str, default: Any) -> Any:
    """Another value than `default`, of a type that YAML has."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default * 2 + 0.25 if isinstance(default, float) else default + 2
    return f"{default}x" if isinstance(default, str) else 0.25


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"backend": "native", "model": model}


def of_language(changes: Mapping[str, Any]) -> dict[str, Any]:
    model = tiny.language()
    return model | {"transformer": model["transformer"] | {"num_layers": 2} | changes}


def of_vision(changes: Mapping[str, Any]) -> dict[str, Any]:
    model = tiny.multimodal()
    vision = model["vision"] | {"transformer": model["vision"]["transformer"] | changes}
    return model | {"vision": vision}


@pytest.mark.parametrize(
    ("model", "key", "read"),
    [
        (of_language, "model.transformer", LANGUAGE_FIELDS),
        (of_vision, "model.vision.transformer", ENCODER_FIELDS),
    ],
    ids=["language", "vision"],
)
def test_a_field_that_our_layers_do_not_read_is_refused(
    model: Any, key: str, read: frozenset[str]
) -> None:
    known = fields()
    assert len(known) > 200 and read | DECIDED_ELSEWHERE.keys() | ENGINE_FIELDS < known.keys()
    assert violations(config_of(model({}))) == []
    for name, default in known.items():
        if name in read:
            continue
        given = model({name: other(name, default)})
        [problem] = [p for p in violations(config_of(given)) if p.key == f"{key}.{name}"]
        if name in DECIDED_ELSEWHERE:
            assert problem.allowed.startswith("must not be given here; set "), name
        elif isinstance(default, bool | int | float | str | None) and default == default_of(
            "megatron.core.transformer.transformer_config.TransformerConfig", name
        ):
            assert violations(config_of(model({name: default}))) == [], name


def outcome(changes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights at the start, logits and gradients of one pass in training mode."""
    generators.reseed(0)
    constructor = instantiate(of_language(changes))
    [chunk] = build_chunks(constructor, Parallel(), Precision(), "native", 1234, None)
    logits = chunk.train()(batch_of(list(torch.arange(24).view(2, 12) * 37 % 509)), output="logits")
    logits.square().sum().backward()
    named = dict(chunk.named_parameters())
    gradients = {f"{n} gradient": p.grad for n, p in named.items() if p.grad is not None}
    return {"logits": logits.detach(), **named, **gradients}


def differs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() != second.keys() or any(
        first[name].shape != second[name].shape or not torch.equal(first[name], second[name])
        for name in first
    )


@pytest.mark.usefixtures("world")
def test_a_field_that_is_listed_changes_the_model() -> None:
    plain = outcome({})
    assert not differs(outcome({}), plain)
    given = of_language({})["transformer"]
    for name, default in fields().items():
        if name in LANGUAGE_FIELDS:
            beside = BESIDE.get(name, {})
            before = outcome(beside) if beside else plain
            changes = {name: other(name, given.get(name, default))} | beside
            assert violations(config_of(of_language(changes))) == [], name
            assert differs(outcome(changes), before), name


def test_new_names_of_the_command_line_are_checked() -> None:
    base = ["experiment=language/tiny", "tokenizer.path=x", "data.train.shards=x"]
    for plus in ("+", "++"):
        for given in ("num_moe_experts=4", "use_cpu_initialization=true", "softmax_type=learnable"):
            name, _, value = given.partition("=")
            problems = check(composed("train", [*base, f"{plus}model.transformer.{given}"]))
            [problem] = [p for p in problems if name in p.key]
            assert problem.key == f"model.transformer.{name}"
            assert "nvmm's layers do not read it" in problem.allowed, value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": [4]}, r"window_size=\[4\] must be null or \[n, 0\]"),
        ({"window_size": [-1, 0]}, r"window_size=\[-1, 0\] must be null"),
        ({"window_size": [4, 4]}, r"window_size=\[4, 4\] must be null"),
        ({"window_size": 4}, "window_size=4 must be null"),
        ({"window_attn_skip_freq": 2}, r"window_attn_skip_freq=2 needs model\.transformer\.window"),
        ({"window_size": [4, 0], "window_attn_skip_freq": 1}, "N >= 2"),
        ({"window_size": [4, 0], "window_attn_skip_freq": [1]}, "each of the 2 layers"),
        ({"window_size": [4, 0], "window_attn_skip_freq": [0, 0]}, "each of the 2 layers"),
        ({"no_rope_freq": [1]}, "each of the 2 layers"),
        ({"no_rope_freq": 3}, "must divide num_layers=2"),
        ({"glu_linear_offset": 1.0, "gated_linear_unit": False}, "needs gated_linear_unit=true"),
        ({"_args_": [2]}, r"_args_=\[2\] must be left out"),
    ],
)
def test_values_that_no_layer_follows_are_refused(changes: dict[str, Any], message: str) -> None:
    import re

    problems = violations(config_of(of_language(changes)))
    assert any(re.search(message, str(problem)) for problem in problems), problems


def test_another_class_of_config_is_refused() -> None:
    target = "megatron.core.transformer.transformer_config.MLATransformerConfig"
    [problem] = violations(config_of(of_language({"_target_": target})))
    assert problem.key == "model.transformer._target_"


def test_a_window_needs_a_causal_decoder() -> None:
    model = of_language({"window_size": [4, 0]}) | {"causal": False}
    [problem] = violations(config_of(model))
    assert str(problem).startswith("model.transformer.window_size=[4, 0] must be null with")
