"""torch.compile, fake and meta tensors through every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nvmm.kernels.activation import activation
from nvmm.kernels.adamw import adamw
from nvmm.kernels.gated_residual import gated_residual
from nvmm.kernels.joint_norm import joint_norm
from nvmm.kernels.linear_cross_entropy import linear_cross_entropy
from nvmm.kernels.merge import merge_rows
from nvmm.kernels.multi_tensor import multi_tensor_l2norm, multi_tensor_scale
from nvmm.kernels.norm import norm, residual_norm
from nvmm.kernels.pixel_shuffle import pixel_shuffle
from nvmm.kernels.rope import rope
from nvmm.kernels.weight_gradient import accumulate
from tests.kernels.accuracy import needs_kernels

pytestmark = needs_kernels
EXACT = {"rtol": 0, "atol": 0}
LABELS = torch.tensor([0, 5, -100, 6, 1])


def rows_from(first: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + like.shape[0], device=like.device)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "norm": lambda x, w, _: norm(x, w[0], w[1], eps=1e-5, rms=False),
    "residual_norm": lambda x, w, _: sum(residual_norm(x, 2 * x, w[0], eps=1e-5, rms=True)),
    "activation": lambda x, w, _: activation(x, w[0], kind="swiglu"),
    "gated_residual": lambda x, w, _: gated_residual(x, 2 * x, w[0], w[1], tanh=True),
    "joint_norm": lambda x, w, _: joint_norm([x], [w[0]], eps=1e-5, real=6)[0],
    "linear_cross_entropy": lambda x, w, labels: linear_cross_entropy(x, w, labels, chunk=4),
    "rope": lambda x, w, _: sum(
        rope(x.view(5, 1, 2, 4), w[:5].view(5, 1, 2, 4), torch.ones(5, 1, 2, device=x.device))
    ),
    "merge": lambda x, w, _: merge_rows(x, w, rows_from(0, w), rows_from(7, x)),
    "pixel_shuffle": lambda x, w, _: pixel_shuffle((x * w[0]).view(5, 2, 2, 2), 2),
}


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(n, 8, generator=generator) for n in (5, 7))
    return tuple(  # type: ignore[return-value]
        t.to(device).requires_grad_(t.is_floating_point()) for t in (x, weights, LABELS)
    )


def scaled(tensors: list[Tensor]) -> None:
    multi_tensor_scale(0, tensors[0].new_zeros(1, dtype=torch.int32), [tensors, tensors], 0.5)


def normed(tensors: list[Tensor]) -> None:
    flag = tensors[0].new_zeros(1, dtype=torch.int32)
    tensors[0].add_(multi_tensor_l2norm(0, flag, [tensors])[0])


# What changes a list of tensors [3, 4] in place.
UPDATES: dict[str, Callable[[list[Tensor]], None]] = {
    "adamw": lambda t: adamw(
        *(t[:2], t[2:4], [], t[4:6], t[6:]),
        **{"step": 2, "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    ),
    "multi_tensor_scale": scaled,
    "multi_tensor_l2norm": normed,
    "weight_gradient": lambda t: accumulate(t[0], t[1] @ t[2].t(), t[3][:3]),
}


def updated(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 4, generator=generator).to(device) for _ in range(8)]


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UPDATES)
def test_compiles_updates_in_place(name: str, backend: str) -> None:
    torch._dynamo.reset()
    found, expected, before = (updated() for _ in range(3))
    torch.compile(UPDATES[name], backend=backend, fullgraph=True)(found)
    UPDATES[name](expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not all(map(torch.equal, found, before))


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_updates_without_data(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "meta":
        request.getfixturevalue("auto")
        UPDATES[name](updated("meta"))
        return
    with FakeTensorMode() as mode:
        UPDATES[name]([mode.from_tensor(t) for t in updated()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_forward_and_backward_into_one_graph(name: str, backend: str) -> None:
    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return (OPERATIONS[name](x, w, labels) * 2).sum()

    x, w, labels = inputs()
    torch._dynamo.reset()  # every operation compiles the one function `run`, and 8 are too many
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    expected = torch.autograd.grad(run(x, w, labels), (x, w))
    found = torch.autograd.grad(compiled(x, w, labels), (x, w))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **({} if backend == "inductor" else EXACT))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_data(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    real = inputs()
    out = OPERATIONS[name](*real)
    if kind == "meta":
        request.getfixturevalue("auto")
        abstract = inputs("meta")
        assert OPERATIONS[name](*abstract).shape == out.shape
        return
    mode = FakeTensorMode()
    with mode:
        abstract = tuple(mode.from_tensor(t) for t in real)
        found = OPERATIONS[name](*abstract)
        gradients = torch.autograd.grad(found.sum(), abstract[:2])
    assert (found.shape, found.dtype) == (out.shape, out.dtype)
    assert [g.shape for g in gradients] == [t.shape for t in real[:2]]
