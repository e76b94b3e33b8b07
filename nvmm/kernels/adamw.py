"""AdamW behind the interface of Apex's and Transformer Engine's FusedAdam, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2 for `adam_w_mode=False`) in one fused kernel a group.

    The step is an int in each param group, not a tensor in each parameter's state: that is what
    megatron-core's distributed optimizer saves and loads. Groups without parameters count too, so
    every rank agrees on it. State names are `exp_avg` and `exp_avg_sq`. torch's fused kernel was
    measured against torch._foreach on 400 small CPU tensors: 0.9 ms and 7.7 ms a step.

    Args:
        params: parameters or param groups; floating point, updated in their own dtype.
        betas: decay rates of the running means of the gradient and its square.
        eps: added to the square root of the second.
        weight_decay: decoupled from the gradient when `adam_w_mode`, else added to it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0},
        )
        self.adam_w_mode = adam_w_mode

    def initialize_state(self) -> None:
        """Allocate the running means of every parameter that has none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
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
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        step = torch.tensor(float(group["step"]), device=parameters[0].device)
        kernel(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
