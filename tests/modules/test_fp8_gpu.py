"""The emulated FP8 linear beside Transformer Engine's, on a GPU. Never run so far."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.modules import linear as linears
from nvmm.modules.fp8_scales import _EngineScales, _in_high_precision
from nvmm.modules.linear import Quantizer
from nvmm.parallel.fp8_recipe import RECIPES, Fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("world"),
]
ROWS, INPUTS, OUTPUTS = 256, 512, 384
STEPS = 4
HISTORY = 3


def engine() -> Any:
    """transformer_engine.pytorch, or the test is skipped."""
    return pytest.importorskip("transformer_engine.pytorch")


def engine_recipe(fp8: Fp8) -> Any:
    """Transformer Engine's recipe of ours; skips where this GPU has none."""
    engine()
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.fp8 import check_recipe_support

    format = recipe.Format.HYBRID if fp8.gradients_in_e5m2 else recipe.Format.E4M3
    delayed = {"margin": fp8.margin, "amax_compute_algo": fp8.amax_compute_algo}
    delayed |= {"amax_history_len": fp8.amax_history_len, "reduce_amax": False}
    kind, options = {
        "delayed": (recipe.DelayedScaling, delayed),
        "current": (recipe.Float8CurrentScaling, {}),
        "blockwise": (recipe.Float8BlockScaling, {}),
        "mxfp8": (recipe.MXFP8BlockScaling, {}),
    }[fp8.recipe]
    found = kind(fp8_format=format, **options)
    try:
        check_recipe_support(found)
    except AssertionError as error:
        pytest.skip(f"{fp8.recipe}: {error}")
    return found


def engine_linear() -> Any:
    options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    return engine().Linear(INPUTS, OUTPUTS, **options)


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


def step(module: Any, recipe: Any, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW of Transformer Engine's linear in a step of training."""
    x, dy = tensors(number)
    x.requires_grad_()
    with engine().fp8_autocast(enabled=True, fp8_recipe=recipe):
        y = module(x)
    y.backward(dy)
    dweight, module.weight.grad = module.weight.grad, None
    return y.detach(), x.grad, dweight


@pytest.mark.parametrize(
    "fp8",
    [
        *(Fp8(recipe=name, amax_history_len=HISTORY) for name in RECIPES),
        Fp8(amax_history_len=HISTORY, margin=2, amax_compute_algo="most_recent"),
        Fp8(amax_history_len=HISTORY, format="e4m3"),
        Fp8(recipe="current", format="e4m3"),
        Fp8(recipe="blockwise", format="hybrid"),
        Fp8(recipe="mxfp8", format="hybrid"),
    ],
    ids=lambda fp8: f"{fp8.recipe}-{fp8.format}-{fp8.margin}",
)
def test_a_linear_of_each_recipe(fp8: Fp8) -> None:
    """In its own format and the other, where Transformer Engine has it."""
    recipe = engine_recipe(fp8)
    theirs = engine_linear()
    weight = theirs.weight.detach().clone().requires_grad_()
    group = dist.group.WORLD
    quantizer = Quantizer(fp8, group, group, weight.device)
    mode = linears._LinearMode(
        gather_input=False, reduce_grad=False, training=True, into_main_grad=False
    )
    for number in range(STEPS):
        x, dy = tensors(number)
        expected = step(theirs, recipe, number)
        x.requires_grad_()
        found = linears._Linear.apply(x, weight, quantizer, mode)
        found.backward(dy)
        for value, wanted in zip((found, x.grad, weight.grad), expected, strict=True):
            close(value, wanted)
        weight.grad = None
        if fp8.recipe == "delayed":
            quantizer.roll(quantizer.amax.clone())
            meta = theirs.fp8_meta
            torch.testing.assert_close(quantizer.scale[:2], meta["scaling_fwd"].scale[:2])
            torch.testing.assert_close(quantizer.scale[2], meta["scaling_bwd"].scale[0])
        quantizer.forget_weight()


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Delayed scaling's recipe, which a module before its first forward pass gets from mcore."""
    recipe = engine_recipe(Fp8(amax_history_len=HISTORY))
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_recipe", lambda config: recipe)
    return recipe


def test_scales_of_an_engine_s_linear_survive_a_checkpoint(delayed: Any) -> None:
    """Save, a fresh module, load, forward: as the one that went on."""
    theirs = engine_linear()
    for number in range(2):
        step(theirs, delayed, number)
    kept = {name: t.clone() for name, t in _EngineScales(theirs, SimpleNamespace()).state().items()}
    assert all(tuple(state.shape) == (1 + HISTORY,) for state in kept.values())
    assert all(state[0] != 1 and state[1:].any() for state in kept.values())
    fresh = engine_linear()
    fresh.load_state_dict({"weight": theirs.weight.detach()}, strict=False)
    scales = _EngineScales(fresh, SimpleNamespace())
    assert all(state[0] == 1 and not state[1:].any() for state in scales.state().values())
    scales.load({name: state.cpu() for name, state in kept.items()})
    assert all(torch.equal(state, kept[name]) for name, state in scales.state().items())
    for number in (2, 3):
        for value, wanted in zip(
            step(fresh, delayed, number), step(theirs, delayed, number), strict=True
        ):
            assert torch.equal(value, wanted)


def test_an_engine_s_linear_left_out_multiplies_in_bfloat16(delayed: Any) -> None:
    theirs = engine_linear()
    x, _ = tensors(0)
    plain = theirs(x)
    with engine().fp8_autocast(enabled=True, fp8_recipe=delayed):
        quantised = theirs(x)
        theirs.forward = _in_high_precision(theirs.forward)
        left_out = theirs(x)
    assert torch.equal(left_out, plain)
    assert not torch.equal(quantised, plain)
