"""The CUDA kernels on a GPU, against the CPU's loops. Never run so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nvmm.kernels import library
from tests.kernels.accuracy import DTYPES, needs_kernels
from tests.kernels.test_simulator import CASES

pytestmark = [
    pytest.mark.gpu,
    needs_kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SIZES = [(1, 3), (3, 127), (300, 4096), (7, 8200)]


class OnGpu:
    """torch.ops.nvmm for CPU tensors: runs on a GPU, and copies back what was changed in place."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tensors: dict[int, Tensor] = {}
            moved = tree_map_only(
                Tensor, lambda t: tensors.setdefault(id(t), _on_gpu(t.detach())), arguments
            )
            found = getattr(torch.ops.nvmm, name)(*moved)
            for before in tree_leaves(arguments):
                if isinstance(before, Tensor):
                    before.detach().copy_(tensors[id(before)])
            if isinstance(found, Tensor):
                return found.cpu()
            return None if found is None else tuple(t.cpu() for t in found)

        return call


def _on_gpu(tensor: Tensor) -> Tensor:
    """A copy with the gaps that a view has, which `cuda` would close."""
    options = {"dtype": tensor.dtype, "device": "cuda"}
    return torch.empty_strided(tensor.shape, tensor.stride(), **options).copy_(tensor)


def test_the_library_has_cuda_kernels() -> None:
    assert library.has_cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu_kernels(case: Callable[..., list[Tensor]], dtype: torch.dtype) -> None:
    for rows, width in SIZES:
        expected = case(torch.ops.nvmm, rows, width, dtype)
        for a, b in zip(case(OnGpu(), rows, width, dtype), expected, strict=True):
            tolerance = 2.0**-7 if a.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
