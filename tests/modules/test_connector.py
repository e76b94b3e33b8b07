"""Pixel shuffle order and the MLP connector, alone and split over two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.modules.connector import MLPConnector, pixel_shuffle
from nvmm.parallel.setup import Parallel, Precision
from tests.ranks import run_ranks


def test_pixel_shuffle_puts_blocks_in_reading_order() -> None:
    """Channels top-left, top-right, bottom-left, bottom-right; blocks row-major (v2)."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    grid = (10 * rows + columns)[None, ..., None]
    out = pixel_shuffle(grid, 2)
    assert out.shape == (1, 2, 3, 4)
    assert out[0, 0, 0].tolist() == [0, 1, 10, 11]
    assert out[0, 0, 2].tolist() == [4, 5, 14, 15]
    assert out[0, 1, 0].tolist() == [20, 21, 30, 31]


def test_pixel_shuffle_keeps_channels_together_and_factor_one_is_identity() -> None:
    x = torch.randn(2, 4, 4, 3)
    out = pixel_shuffle(x, 2)
    assert torch.equal(out[1, 1, 0, 3:6], x[1, 2, 1])
    assert torch.equal(pixel_shuffle(x, 1), x)


def test_a_factor_that_does_not_divide_names_those_that_do() -> None:
    message = r"model\.connector\.downsample=3 must divide the encoder's grid \(32x32\); use one "
    with pytest.raises(ValueError, match=message + "of 1, 2, 4, 8, 16, 32"):
        pixel_shuffle(torch.zeros(1, 32, 32, 1), 3)


VARIANTS: dict[str, dict[str, Any]] = {
    "two_layers": {"hidden_size": 24, "layernorm_epsilon": 0.1},
    "biases": {"hidden_size": 24, "bias": True, "layernorm": False},
    "one_layer": {"hidden_size": None},
    "one_layer_bias": {"hidden_size": None, "bias": True},
    "padded": {"hidden_size": 24, "bias": True, "pad_grid": True},
    "padded_by_columns": {"hidden_size": 24, "pad_grid": True, "token_order": "columns"},
}
GRIDS = {"padded": (3, 5), "padded_by_columns": (3, 5)}
"""The grids of those whose grid is not 2 x 4."""


def _run(rank: int, world: int, init: str) -> dict[str, Any]:
    """Output and whole gradients of every variant."""
    from nvmm.parallel.parameters import initialize, sharded_parameters

    parallel = Parallel(tensor_model_parallel_size=world, sequence_parallel=world > 1)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    results = {}
    for name, variant in VARIANTS.items():
        connector = MLPConnector(
            **variant,
            init_method_std=0.3,
            input_size=5,
            output_size=16,
            chunk=parallel.chunks(Precision())[0],
        )
        initialize(connector, seed=2)
        generator = torch.Generator().manual_seed(1)
        for p in sharded_parameters(connector):
            if len(p.global_shape) == 1:  # norm and biases: something else than ones and zeros
                values = torch.randn(p.global_shape, generator=generator)
                for (offset,), piece in p.pieces(p.parameter.data):
                    piece.copy_(values[offset : offset + len(piece)])
        grid = GRIDS.get(name, (2, 4))
        x = torch.randn(3, grid[0] * grid[1], 5, generator=generator, requires_grad=True)
        out = connector(x, grid)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        pieces = [
            (p.name, p.global_shape, offset, piece)
            for p in sharded_parameters(connector)
            for offset, piece in p.pieces(p.parameter.grad)
        ]
        values = {p.name: p.parameter.detach() for p in sharded_parameters(connector)}
        results[name] = (out.detach(), x.grad, pieces, x.detach(), values)
    return results


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(_run, 1)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_plain_torch(name: str, one_rank: dict[str, Any]) -> None:
    out, _, _, x, weights = one_rank[name]
    grid = GRIDS.get(name, (2, 4))
    padded = torch.zeros(3, grid[0] + grid[0] % 2, grid[1] + grid[1] % 2, 5)
    padded[:, : grid[0], : grid[1]] = x.view(3, *grid, 5)
    y = pixel_shuffle(padded, 2)
    if name == "padded_by_columns":
        y = torch.stack([y[:, row, column] for column in range(3) for row in range(2)], 1)[:, None]
    y = y.flatten(1, 2)
    if VARIANTS[name].get("layernorm", True):
        scale, shift = (weights[f"linear_fc1.layer_norm_{k}"] for k in ("weight", "bias"))
        y = F.layer_norm(y, (20,), scale, shift, VARIANTS[name].get("layernorm_epsilon", 1e-6))
    y = F.linear(y, weights["linear_fc1.weight"], weights.get("linear_fc1.bias"))
    if VARIANTS[name]["hidden_size"] is not None:
        y = F.linear(F.gelu(y), weights["linear_fc2.weight"], weights.get("linear_fc2.bias"))
    assert out.shape == (3, padded.shape[1] * padded.shape[2] // 4, 16)
    torch.testing.assert_close(out, y)


def test_two_ranks_equal_one(one_rank: dict[str, Any]) -> None:
    """Output, input gradient and every parameter's gradient, on each rank, also under SP."""
    for result in run_ranks(_run, 2):
        for name, (out, grad, pieces, _, _) in result.items():
            torch.testing.assert_close(out, one_rank[name][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(grad, one_rank[name][1], atol=1e-5, rtol=1e-5)
            expected: dict[str, Tensor] = {p[0]: p[3] for p in one_rank[name][2]}
            assert {p[0] for p in pieces} == expected.keys()
            for key, shape, offset, value in pieces:
                index = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
                assert shape == tuple(expected[key].shape)
                torch.testing.assert_close(value, expected[key][index], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("world")
def test_an_unknown_order_of_tokens_is_refused() -> None:
    chunk = Parallel().chunks(Precision())[0]
    with pytest.raises(ValueError, match=r"token_order=diagonal must be one of rows, columns"):
        MLPConnector(token_order="diagonal", input_size=5, output_size=16, chunk=chunk)  # type: ignore[arg-type]
