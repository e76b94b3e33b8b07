"""The rule for every kernel: at most twice PyTorch's own error, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nvmm.kernels import library

needs_kernels = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))
DTYPES = (torch.float32, torch.bfloat16)
FUSED = library.Kernels.all("auto" if library.MISSING else "fused")
"""What the tests of this folder run on (conftest.py): no kernel gives way to eager unnoticed."""
BOTH = [pytest.param("fused", marks=needs_kernels), "eager"]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |x| to the next number of `dtype`, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.double().abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


def outputs_and_gradients(
    function: Function, inputs: Sequence[Tensor | None], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """Outputs of `function` on leaves of `dtype`, and the gradients of all floating inputs."""
    leaves = [
        t.detach().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    found = function(*leaves)
    outputs = (found,) if isinstance(found, Tensor) else found
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator).to(torch.bfloat16) for o in outputs]
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True)]
    torch.autograd.backward([o for o, _ in pairs], [u for _, u in pairs])
    gradients = [t.grad for t in leaves if t is not None and t.is_floating_point()]
    return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]


def check_accuracy(
    ours: Function,
    eager: Function,
    inputs: Callable[[int], Sequence[Tensor | None]],
    dtype: torch.dtype,
) -> None:
    """`ours` against `eager` in `dtype`, both measured against `eager` in float64.

    The largest error of each output and gradient is at most twice eager's, plus one ulp of the
    largest value of it. Small inputs are drawn again and again: a handful of numbers can be right
    by luck, and then the rule would ask for luck.

    inputs: seed -> arguments of both functions.
    """
    elements = sum(t.numel() for t in inputs(0) if t is not None)
    draws = [
        _errors(ours, eager, inputs(seed), dtype) for seed in range(4 + 3000 // (elements + 64))
    ]
    for index, rows in enumerate(zip(*draws, strict=True)):
        error, theirs, one_ulp = (max(row[i] for row in rows) for i in range(3))
        allowed = 2 * theirs + one_ulp
        assert error <= allowed, f"output {index}: error {error:.3e}, allowed {allowed:.3e}"


def check_rows(found: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    """Rows are right to `tolerance` of their largest number; NaN and infinity are in place."""
    for a, e in zip(found, exact, strict=True):
        scale = e.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)
        wrong = (a.double() - e).abs() > tolerance * scale
        assert not (wrong & e.isfinite()).any(), (a, e)
        odd = ~e.isfinite()
        torch.testing.assert_close(a.double()[odd], e[odd], equal_nan=True)
        assert torch.equal(a.isnan(), e.isnan()), (a, e)


def _errors(
    ours: Function, eager: Function, inputs: Sequence[Tensor | None], dtype: torch.dtype
) -> list[tuple[float, float, float]]:
    """(our largest error, eager's, one ulp of the largest value) of each output and gradient."""
    rounded = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
    exact = outputs_and_gradients(eager, rounded, torch.float64)
    theirs = outputs_and_gradients(eager, rounded, dtype)
    found = outputs_and_gradients(ours, rounded, dtype)
    errors = []
    for a, b, e in zip(found, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == e.shape
        one_ulp = ulp(e.abs().max(), a.dtype)
        errors.append(tuple(float(v) for v in ((a - e).abs().max(), (b - e).abs().max(), one_ulp)))
    return errors
