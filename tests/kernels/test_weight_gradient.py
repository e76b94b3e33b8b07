"""The stand-in for Apex's module, by itself and under mcore's linears."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvmm.kernels.weight_gradient import NAME, accumulate, placeholder


@pytest.mark.parametrize(
    ("dtype", "into"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_adds_the_gradient(dtype: torch.dtype, into: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator).to(dtype)
    dy = torch.randn(3, 5, 4, generator=generator).to(dtype)
    main_grad = torch.ones(4, 7, dtype=into)
    accumulate(x, dy, main_grad)
    exact = 1 + torch.einsum("abi,abj->ij", dy.double(), x.double())
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(main_grad.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_tied_weight_s_placeholder_holds_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's gradient is added to it: fresh memory must not be."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert placeholder(weight) is None
    weight.grad_added_to_main_grad = False
    assert placeholder(weight).isnan().all() and weight.grad_added_to_main_grad
    weight.zero_out_wgrad = True
    assert torch.equal(placeholder(weight), torch.zeros(2, 3))


_BEFORE = """
from nvmm.kernels.weight_gradient import install
install()
import megatron.core.tensor_parallel.layers as layers
"""
_AFTER = """
import megatron.core.tensor_parallel.layers as layers
assert not layers._grad_accum_fusion_available
from nvmm.kernels.weight_gradient import install
install()
"""
_CHECK = f"""
import sys
assert layers._grad_accum_fusion_available
assert layers.{NAME} is sys.modules["{NAME}"]
"""


@pytest.mark.parametrize(
    "order", [_BEFORE, pytest.param(_AFTER, marks=pytest.mark.slow)], ids=["before", "after"]
)
def test_mcore_finds_it_whether_imported_before_or_after(order: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", order + _CHECK], check=True)


def test_apex_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.py").write_text("apex = True\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from nvmm.kernels.weight_gradient import install
install()
import {NAME}
assert {NAME}.apex
"""
    subprocess.run([sys.executable, "-c", code], check=True)
