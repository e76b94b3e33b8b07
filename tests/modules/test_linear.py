"""FP8 linears against the recipes' definitions, and what their scales remember."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.modules import linear as linears
from nvmm.modules.fp8_quantize import E4M3, E5M2, amax, quantize, quantize_mx, scale_of
from nvmm.modules.linear import GRADIENT, INPUT, WEIGHT, ColumnParallelLinear, Quantizer
from nvmm.parallel.fp8_recipe import RECIPES, Fp8
from tests.modules.test_fp8_quantize import reference, values
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("world")
SIZES = [(1, 1, 1), (3, 127, 33), (130, 257, 129)]


def quantizer(fp8: Fp8, has_gradient: bool = True) -> Quantizer:
    group = dist.group.WORLD
    return Quantizer(fp8, group, group, torch.device("cpu"), has_gradient)


def tensors(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, dy: float64, with outliers"""
    return values((rows, inputs), 1), values((outputs, inputs), 2), values((rows, outputs), 3)


def multiply(
    q: Quantizer, x: Tensor, weight: Tensor, dy: Tensor, training: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW"""
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    mode = linears._LinearMode(
        gather_input=False, reduce_grad=False, training=training, into_main_grad=False
    )
    y = linears._Linear.apply(x, weight, q, mode)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


def expected(
    fp8: Fp8, x: Tensor, weight: Tensor, dy: Tensor, scales: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> list[Tensor]:
    """y, dx, dW by the definition: each product's operands in blocks along what it sums over.

    scales: of x, weight and dy, in delayed scaling.
    """
    bits = E5M2 if fp8.gradients_in_e5m2 else E4M3
    along, across = {
        "delayed": (None, None),
        "current": (None, None),
        "blockwise": ((1, 128), (128, 1)),
        "mxfp8": ((1, 32), (32, 1)),
    }[fp8.recipe]
    square = (128, 128) if fp8.recipe == "blockwise" else None

    def q(t: Tensor, tensor: int, block: tuple[int, int] | None) -> Tensor:
        dtype = bits if tensor == GRADIENT else E4M3
        return reference(t, dtype, block, recipe=fp8.recipe, scale=scales[tensor])

    return [
        q(x, INPUT, along) @ q(weight, WEIGHT, square or along).t(),
        q(dy, GRADIENT, along) @ q(weight, WEIGHT, square or across),
        q(dy, GRADIENT, across).t() @ q(x, INPUT, across),
    ]


def same(found: Any, wanted: list[Tensor]) -> None:
    """But for the rounding of double precision."""
    for value, other in zip(found, wanted, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(value, other, rtol=1e-12, atol=float(1e-13 * scale))


@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_by_the_definition(recipe: str, sizes: tuple[int, int, int], format: str) -> None:
    """Delayed scaling's scales are 1 here."""
    fp8 = Fp8(recipe=recipe, format=format)
    same(multiply(quantizer(fp8), *tensors(*sizes)), expected(fp8, *tensors(*sizes)))


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_stale_scales_by_the_definition(format: str, margin: int) -> None:
    """Past amaxes far below these values, which saturate, and far above: by hand, with a margin."""
    fp8 = Fp8(format=format, margin=margin)
    q, (x, weight, dy) = quantizer(fp8), tensors(3, 127, 33)
    past = (3.0, 1e6, 0.7)
    assert x.abs().max() > 8 * 1000 * past[0] and dy.abs().max() > 8 * 1000 * past[2]
    q.roll(torch.tensor(past))
    limits = (448.0, 448.0, 57344.0 if format == "hybrid" else 448.0)
    by_hand = [
        struct.unpack("f", struct.pack("f", limit / largest / 2**margin))[0]
        for limit, largest in zip(limits, torch.tensor(past).tolist(), strict=True)
    ]
    same(multiply(q, x, weight, dy), expected(fp8, x, weight, dy, tuple(by_hand)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_results_have_the_input_s_dtype(recipe: str, dtype: torch.dtype) -> None:
    """And are those of double precision but for the rounding of that dtype."""
    x, weight, dy = (t.to(dtype) for t in tensors(64, 96, 32))
    exact = multiply(quantizer(Fp8(recipe=recipe)), x.double(), weight.double(), dy.double())
    found = multiply(quantizer(Fp8(recipe=recipe)), x, weight, dy)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == dtype
        error = (value.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error <= 2 * torch.finfo(dtype).eps + 1e-5


def test_formats() -> None:
    hybrid = {recipe: Fp8(recipe=recipe).gradients_in_e5m2 for recipe in RECIPES}
    assert hybrid == {"delayed": True, "current": True, "blockwise": False, "mxfp8": False}
    assert Fp8(recipe="mxfp8", format="hybrid").gradients_in_e5m2
    assert not Fp8(format="e4m3").gradients_in_e5m2


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"recipe": "tensorwise"}, "precision.fp8.recipe=tensorwise must be one of delayed, cur"),
        ({"format": "e5m2"}, "precision.fp8.format=e5m2 must be one of hybrid, e4m3"),
        ({"amax_compute_algo": "mean"}, "precision.fp8.amax_compute_algo=mean must be one of max"),
        ({"amax_history_len": 0}, "precision.fp8.amax_history_len=0 must be at least 1"),
    ],
)
def test_wrong_recipes_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8(**field)


def test_delayed_scaling_uses_the_scale_it_has() -> None:
    """1 at first; then what the largest numbers of earlier steps give."""
    q = quantizer(Fp8(amax_history_len=4))
    x, weight, dy = tensors(8, 16, 4)
    same(multiply(q, x, weight, dy), expected(q.fp8, x, weight, dy))
    seen = [t.abs().max().float() for t in (x, weight, dy)]
    torch.testing.assert_close(q.amax, torch.stack(seen))
    q.roll(q.amax.clone())
    q.forget_weight()
    assert not q.amax.any()
    limits = torch.tensor([448.0, 448.0, 57344.0])
    torch.testing.assert_close(q.scale, limits / torch.stack(seen))
    again = multiply(q, x, weight, dy)[0]
    fresh = multiply(quantizer(Fp8(recipe="current")), x, weight, dy)[0]
    torch.testing.assert_close(again, fresh, rtol=1e-6, atol=1e-6 * float(fresh.abs().max()))


def histories(fp8: Fp8, amaxes: list[float]) -> list[tuple[list[float], float]]:
    """The input's history and scale after each step."""
    q = quantizer(fp8)
    found = []
    for largest in amaxes:
        q.roll(torch.tensor([largest, 1.0, 1.0]))
        found.append((q.history[INPUT].tolist(), q.scale[INPUT].item()))
    return found


def test_histories_by_hand() -> None:
    """Position 0 is open; the others go from the oldest to the newest."""
    inf = float("inf")
    found = histories(Fp8(amax_history_len=3), [2.0, 7.0, 0.0, 1.0, 1.0, inf, 1.0, 1.0])
    assert found == [
        ([0.0, 0.0, 2.0], 224.0),
        ([0.0, 2.0, 7.0], 64.0),
        ([0.0, 2.0, 7.0], 64.0),  # not seen: nothing moves
        ([0.0, 7.0, 1.0], 64.0),  # 7 was in the window
        ([0.0, 1.0, 1.0], 64.0),  # still, beside the oldest that left
        ([0.0, 1.0, inf], 64.0),  # not finite: the scale stays
        ([0.0, inf, 1.0], 64.0),
        ([0.0, 1.0, 1.0], 64.0),
    ]
    assert histories(Fp8(amax_history_len=3), [7.0, 1.0, 1.0, 1.0])[-1] == ([0.0, 1.0, 1.0], 448.0)
    recent = Fp8(amax_history_len=3, amax_compute_algo="most_recent", margin=2)
    assert histories(recent, [7.0, 2.0]) == [([0.0, 0.0, 7.0], 16.0), ([0.0, 7.0, 2.0], 56.0)]
    assert histories(Fp8(amax_history_len=1), [7.0, 2.0])[-1] == ([0.0], 224.0)
    tiny = histories(Fp8(amax_history_len=1), [1e-40])[-1][1]
    assert tiny == torch.finfo(torch.float32).max


def test_nothing_is_remembered_outside_training() -> None:
    q = quantizer(Fp8())
    multiply(q, *tensors(4, 16, 8), training=False)
    assert not q.amax.any() and not q._weight


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_weight_is_quantised_once_a_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    right = Quantizer.__call__

    def count(self: Quantizer, x: Tensor, tensor: int, **options: Any) -> Any:
        counts.append(tensor)
        return right(self, x, tensor, **options)

    monkeypatch.setattr(Quantizer, "__call__", count)
    q = quantizer(Fp8(recipe=recipe))
    x, weight, dy = tensors(4, 32, 32)
    for _ in range(3):
        multiply(q, x, weight, dy)
    # MX has other blocks, and so other numbers, along the other axis.
    once = 2 if recipe == "mxfp8" else 1
    assert counts.count(WEIGHT) == once and counts.count(GRADIENT) == 3
    stale = multiply(q, x, 2 * weight, dy)[0]
    q.forget_weight()
    assert not torch.equal(stale, multiply(q, x, 2 * weight, dy)[0])
    assert counts.count(WEIGHT) == 2 * once


def test_a_frozen_weight_keeps_no_input_and_sends_its_gradient() -> None:
    q = quantizer(Fp8(recipe="current"))
    x, weight, dy = tensors(4, 16, 8)
    x.requires_grad_()
    mode = linears._LinearMode(
        gather_input=False, reduce_grad=False, training=True, into_main_grad=False
    )
    y = linears._Linear.apply(x, weight, q, mode)
    assert len(y.grad_fn.saved_tensors) == 1 and y.grad_fn.saved_tensors[0] is weight
    y.backward(dy)
    torch.testing.assert_close(x.grad, multiply(quantizer(q.fp8), x.detach(), weight, dy)[1])


def test_gradients_go_into_main_grad() -> None:
    x, weight, dy = tensors(4, 16, 8)
    plain = multiply(quantizer(Fp8(recipe="current")), x, weight, dy)[2]
    weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    mode = linears._LinearMode(
        gather_input=False, reduce_grad=False, training=True, into_main_grad=True
    )
    linears._Linear.apply(x, weight, quantizer(Fp8(recipe="current")), mode).backward(dy)
    torch.testing.assert_close(weight.main_grad, plain + 1)
    assert weight.grad is None


def _gathered(rank: int, size: int, init: str) -> list[tuple[Tensor, Tensor]]:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    found = []
    for whole, parts in _halves(rank):
        gathered = parts.gathered(dist.group.WORLD)
        found.append((gathered.dequantize(torch.float32), whole.dequantize(torch.float32)))
    return found


def _halves(rank: int) -> list[tuple[Any, Any]]:
    """Matrices quantised whole, and this rank's half of their rows."""
    x = values((256, 96)).float()
    half = x.chunk(2)[rank]
    scale = scale_of(amax(x, None), E5M2)
    found = [(quantize(x, E5M2, scale), quantize(half, E5M2, scale))]
    for block in ((1, 128), (128, 1)):
        scales = [scale_of(amax(t, block), E4M3, power_of_two=True) for t in (x, half)]
        pair = [quantize(t, E4M3, s, block) for t, s in zip((x, half), scales, strict=True)]
        found.append((pair[0], pair[1]))
    for block in ((1, 32), (32, 1)):
        found.append((quantize_mx(x, E4M3, block), quantize_mx(half, E4M3, block)))
    return found


def test_ranks_gather_bytes_and_scales() -> None:
    for pairs in run_ranks(_gathered, 2):
        for gathered, whole in pairs:
            assert torch.equal(gathered, whole)


def test_without_a_quantizer_it_is_mcore_s_linear() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    layer = ColumnParallelLinear(
        16, 24, config=config, init_method=torch.nn.init.normal_, bias=True
    )
    x = torch.randn(3, 2, 16)
    plain = layer(x)[0]
    torch.testing.assert_close(plain, torch.nn.functional.linear(x, layer.weight, layer.bias))
    layer.quantizer = quantizer(Fp8(recipe="current"))
    assert 0 < (layer(x)[0] - plain).abs().max() < 0.2 * plain.abs().max()
