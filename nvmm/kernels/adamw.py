"""AdamW over lists of tensors, and behind the interface of Apex's and TE's FusedAdam.

AdamW: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2; Adam: Kingma and Ba 2015 (arXiv
1412.6980), algorithm 1. Arithmetic is fp32, results are rounded once. Kernels: csrc/adamw/
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nvmm.kernels import library

MOMENTS = (torch.float32, torch.bfloat16)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
) -> None:
    """Do one step of every tensor, in place. Each list has one dtype, and all have one device.

    Args:
        parameters: of any shapes, empty ones too; contiguous for the kernel.
        gradients: of the parameters' dtype.
        masters: float32 copies of parameters of another dtype, which then are the masters'
            rounding; or none, and the parameters themselves are updated.
        means, squares: running means of the gradient and of its square: float32 or bfloat16.
        step: of the bias correction, from 1.
        decoupled: weight decay shrinks the parameter (AdamW), or is added to the gradient (L2).
    """
    if not parameters:
        return
    gradients = [gradient.contiguous() for gradient in gradients]
    state = (*masters, *means, *squares)
    dense = all(tensor.is_contiguous() for tensor in (*parameters, *state))
    problem = None if dense else "a parameter or its state is not contiguous"
    lists = (parameters, gradients, masters, means, squares)
    numbers = (lr, *betas, eps, weight_decay)
    if library.fused("adamw", *parameters, *gradients, problem=problem):
        torch.ops.nvmm.adamw(*lists, *numbers, step, decoupled)
    else:
        eager_adamw(*lists, *numbers, step, decoupled)
    torch.autograd.graph.increment_version((*parameters, *state))


def eager_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
) -> None:
    """Do `adamw` by PyTorch's own function, on copies of tensors of less than fp32.

    Tensors that are not contiguous are copied too: torch takes whatever it gets for tensors of one
    dtype and layout.
    """
    updated = masters or parameters
    dtype = torch.promote_types(updated[0].dtype, torch.float32)
    lists = [
        [tensor.to(dtype).contiguous() for tensor in tensors]
        for tensors in (updated, gradients, means, squares)
    ]
    function = torch._fused_adamw_ if decoupled else torch._fused_adam_
    steps = [torch.tensor(float(step), device=parameters[0].device)] * len(parameters)
    function(
        *(*lists, [], steps),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    new = lists[0]
    for target, value in zip(
        [*updated, *parameters, *means, *squares], [*new, *new, *lists[2], *lists[3]], strict=True
    ):
        if target is not value:
            target.copy_(value)


def _fake(*_: Any) -> None:
    return None


if library.MISSING is None:
    torch.library.register_fake("nvmm::adamw", _fake)


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2 for `adam_w_mode=False`), one call of `adamw` a group and dtype.

    The step is an int in each param group, not a tensor in each parameter's state: that is what
    megatron-core's distributed optimizer saves and loads. Groups without parameters count too, so
    every rank agrees on it. State names are `exp_avg`, `exp_avg_sq` and `master_param`.

    Args:
        params: parameters or param groups, floating point.
        betas: decay rates of the running means of the gradient and its square.
        eps: added to the square root of the second.
        weight_decay: decoupled from the gradient when `adam_w_mode`, else added to it.
        master_weights: keep a float32 copy of each parameter of less precision, taken before the
            first step; the parameter is its rounding. Without it such a parameter loses the part
            of an update that it cannot hold.
        moments_dtype: of the running means: float32, or bfloat16 for half the memory.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        *,
        master_weights: bool = False,
        moments_dtype: torch.dtype = torch.float32,
    ) -> None:
        if moments_dtype not in MOMENTS:
            allowed = " or ".join(str(dtype) for dtype in MOMENTS)
            raise ValueError(f"moments_dtype={moments_dtype} must be {allowed}")
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0},
        )
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.moments_dtype = moments_dtype

    def initialize_state(self) -> None:
        """Allocate the state of every parameter that has none yet."""
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if not self.state[parameter]:
                self.state[parameter] = {
                    name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                    for name, dtype in self._state_dtypes(parameter).items()
                }
                if "master_param" in self.state[parameter]:
                    self.state[parameter]["master_param"].copy_(parameter.detach())

    def _state_dtypes(self, parameter: Tensor) -> dict[str, torch.dtype]:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        moments = wide if self.moments_dtype == torch.float32 else self.moments_dtype
        names = {"exp_avg": moments, "exp_avg_sq": moments}
        mastered = self.master_weights and parameter.dtype != wide
        return names | ({"master_param": wide} if mastered else {})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict`'s result; tensors keep the dtypes of this optimizer's state.

        torch's own casts them to the parameter's dtype: bfloat16 means of a float32 parameter would
        silently become float32, and masters lose their last bits.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, ours, strict=True):
            if state := state_dict["state"].get(key):
                dtypes = self._state_dtypes(parameter)
                self.state[parameter] = {
                    name: value.to(parameter.device, dtypes[name]) for name, value in state.items()
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.initialize_state()
        for group in self.param_groups:
            group["step"] += 1
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["master_param"] for state in states if "master_param" in state],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step=group["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self.adam_w_mode,
        )
