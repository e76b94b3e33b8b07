"""The emulated FP8 linear beside Transformer Engine's, on a GPU. Never run so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.modules import linear as linears
from nvmm.modules.linear import Quantizer
from nvmm.parallel.fp8 import RECIPES, Fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("world"),
]
ROWS, INPUTS, OUTPUTS = 256, 512, 384
STEPS = 4


def engine_recipe(name: str) -> Any:
    """Transformer Engine's recipe with our defaults; skips where this GPU has none."""
    te = pytest.importorskip("transformer_engine.pytorch")
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.fp8 import check_recipe_support

    found = {
        "delayed": lambda: recipe.DelayedScaling(amax_history_len=3, reduce_amax=False),
        "current": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }[name]()
    try:
        check_recipe_support(found)
    except AssertionError as error:
        pytest.skip(f"{name}: {error}")
    assert te is not None
    return found


def tensors(step: int) -> tuple[Tensor, Tensor]:
    """x, dy: larger with every step, so that delayed scales lag behind."""
    generator = torch.Generator("cuda").manual_seed(step)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    x, dy = torch.randn(ROWS, INPUTS, **options), torch.randn(ROWS, OUTPUTS, **options) / 64
    return ((1 + step) * x).bfloat16(), dy.bfloat16()


def close(found: Tensor, expected: Tensor) -> None:
    """But for the accumulation's order and the rounding of results to bfloat16."""
    error = (found.double() - expected.double()).square().mean().sqrt()
    assert error <= 2**-8 * expected.double().square().mean().sqrt()


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_of_each_recipe(name: str) -> None:
    import transformer_engine.pytorch as te

    recipe = engine_recipe(name)
    theirs = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weight = theirs.weight.detach().clone().requires_grad_()
    group = dist.group.WORLD
    quantizer = Quantizer(Fp8(recipe=name, amax_history_len=3), group, group, weight.device)
    way = linears._Way(gathers=False, reduces=False, keeps=True, into_main_grad=False)
    for step in range(STEPS):
        x, dy = tensors(step)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            expected = theirs(leaves[0])
        found = linears._Linear.apply(leaves[1], weight, quantizer, way)
        expected.backward(dy)
        found.backward(dy)
        close(found, expected)
        close(leaves[1].grad, leaves[0].grad)
        close(weight.grad, theirs.weight.grad)
        weight.grad = theirs.weight.grad = None
        if name == "delayed":
            quantizer.roll(quantizer.amax.clone())
            meta = theirs.fp8_meta
            torch.testing.assert_close(quantizer.scale[:2], meta["scaling_fwd"].scale[:2])
            torch.testing.assert_close(quantizer.scale[2], meta["scaling_bwd"].scale[0])
        quantizer.forget_weight()
