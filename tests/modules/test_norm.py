"""RMSNorm and LayerNorm against their definitions."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.modules.norm import Norm


def build(kind: str, dtype: torch.dtype = torch.float32, zero_centered: bool = False) -> Norm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        normalization=kind,
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    norm = Norm(config, 8, eps=1e-2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-1, 1, 8))
    return norm


def expected(norm: Norm, x: Tensor, kind: str) -> Tensor:
    x, weight = x.double(), norm.weight.double() + (1 if norm.zero_centered else 0)
    if kind == "RMSNorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    return x * weight + norm.bias.double()


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_equals_definition(kind: str, zero_centered: bool) -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    norm = build(kind, zero_centered=zero_centered)
    torch.testing.assert_close(norm(x).double(), expected(norm, x, kind), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_statistics_of_bf16_are_fp32(kind: str) -> None:
    """Squares of 300 summed in bf16 would be off by percents."""
    x = (300 + torch.arange(16.0).view(2, 8)).bfloat16()
    norm = build(kind, torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected(norm, x, kind), atol=1e-2, rtol=1e-2)


def test_rms_norm_has_no_bias_and_weights_are_marked_for_sequence_parallel() -> None:
    assert [name for name, _ in build("RMSNorm").named_parameters()] == ["weight"]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="LayerNorm",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        use_cpu_initialization=True,
    )
    assert all(p.sequence_parallel for p in Norm(config, 8).parameters())
