"""backend=native has the parameter names of mcore's Transformer Engine layers.

Transformer Engine itself is not run: mcore's spec says which of its modules stands where, and the
names of their parameters are recorded here from its source.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from nvmm.parallel.parameters import sharded_parameters
from tests.models.test_language import language

RECORDED = {
    "TELayerNormColumnParallelLinear": ("layer_norm_weight", "layer_norm_bias", "weight", "bias"),
    "TERowParallelLinear": ("weight", "bias"),
    "TENorm": ("weight", "bias"),
    "TEDotProductAttention": (),
}
PLAIN = {"normalization": "RMSNorm", "add_bias_linear": False, "add_qkv_bias": False}
BIASED = {"normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True}


def names_of(spec: Any, prefix: str) -> Iterator[str]:
    """Names of the parameters of a spec's Transformer Engine modules."""
    from megatron.core.extensions import transformer_engine

    for field in dataclasses.fields(spec.submodules):
        part = getattr(spec.submodules, field.name)
        known = [name for name in RECORDED if getattr(transformer_engine, name) is part]
        if known:
            yield from (f"{prefix}{field.name}.{name}" for name in RECORDED[known[0]])
        elif getattr(part, "submodules", None) is not None and dataclasses.is_dataclass(part):
            yield from names_of(part, f"{prefix}{field.name}.")


@pytest.mark.usefixtures("world")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("changes", [PLAIN, BIASED], ids=["plain", "biased"])
def test_layers(changes: dict[str, Any], qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    # mcore leaves both out where Transformer Engine is not installed.
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer = set(names_of(spec, ""))
    assert "mlp.linear_fc1.layer_norm_weight" in layer
    expected = {f"decoder.layers.{i}.{name}" for i in range(4) for name in layer}
    expected |= {f"decoder.final_layernorm.{name}" for name in RECORDED["TENorm"]}
    if changes is PLAIN:
        expected = {name for name in expected if not name.endswith("bias")}
    model = language(transformer=changes | {"qk_layernorm": qk_norm})
    found = {parameter.name for parameter in sharded_parameters(model)}
    assert found - expected == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert expected <= found


def test_the_recorded_names_are_those_mcore_converts() -> None:
    """mcore's own table from Transformer Engine's fused norms to separate ones."""
    from megatron.core.post_training.modelopt.gpt import state_dict_hooks

    source = inspect.getsource(state_dict_hooks)
    for linear in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        for name in RECORDED["TELayerNormColumnParallelLinear"][:2]:
            assert f'"{linear}.{name}"' in source
