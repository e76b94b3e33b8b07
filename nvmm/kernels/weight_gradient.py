"""A replacement of Apex's `fused_weight_gradient_mlp_cuda` by torch's matmuls, on CPU and CUDA.

mcore's `gradient_accumulation_fusion` adds a linear's weight gradient to the fp32 `main_grad` in
place through a module of that name, which is part of NVIDIA's Apex and of nothing else.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

NAME = "fused_weight_gradient_mlp_cuda"
_USERS = {
    "megatron.core.tensor_parallel.layers": "_grad_accum_fusion_available",
    "megatron.core.utils": None,
}


def accumulate(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
    """Add dy.T @ x to main_grad in place.

    Args:
        x: [..., in], a linear's input.
        dy: [..., out], its output's gradient, in x's dtype.
        main_grad: [out, in], in x's dtype or float32.
    """
    add_product(main_grad, dy.flatten(0, -2).t(), x.flatten(0, -2))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total in place.

    A float32 total of bf16 or fp16 factors gets the matmul's own float32 sums on CUDA, as Apex's
    does. On CPU, where torch has no such matmul, the product is rounded to their dtype first.

    Args:
        total: [rows, columns], in the factors' dtype or float32. a: [rows, n]. b: [n, columns].
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


def placeholder(weight: Tensor) -> Tensor | None:
    """Return the gradient of a weight whose gradient is in `weight.main_grad` already.

    With mcore's data-parallel hook on the weight it is a tensor that lets the hook run, else None.
    The hook reads its values only where the parameter asks for zeros (tied embeddings'
    `zero_out_wgrad`).
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    zeros = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zeros else torch.empty_like(weight)


def install() -> None:
    """Make the module importable, and give it to an mcore that was imported without it.

    Where Apex is installed nothing happens.
    """
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    module = ModuleType(NAME, __doc__)
    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    for user, flag in _USERS.items():
        if user in sys.modules:
            setattr(sys.modules[user], NAME, module)
            if flag is not None:
                setattr(sys.modules[user], flag, True)
