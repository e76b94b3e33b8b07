"""The CUDA kernels on a GPU, against the CPU's loops. Never run so far."""

from __future__ import annotations

import pytest
import torch

from nvmm.kernels import library
from tests.kernels.accuracy import needs_kernels
from tests.kernels.simulated import Elsewhere, InFloat32, placed
from tests.kernels.test_simulator import ALL_DTYPES, CASES, Case, tolerance

pytestmark = [
    pytest.mark.gpu,
    needs_kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SIZES = [(1, 3), (3, 127), (300, 4096), (7, 8200)]


def test_the_library_has_cuda_kernels() -> None:
    assert library.has_cuda()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu_kernels(case: Case, dtype: torch.dtype, shift: int) -> None:
    """On 16 bytes where the case is, and one element off."""
    run = Elsewhere(lambda t: placed(t, "cuda", shift))
    for rows, width in SIZES:
        expected = case(InFloat32(), rows, width, dtype)
        for a, b in zip(case(run, rows, width, dtype), expected, strict=True):
            limits = tolerance(a.dtype)
            if a.dtype == torch.float32:
                limits = {name: 1e-4 for name in limits}
            torch.testing.assert_close(a, b.to(a.dtype), **limits)
