"""Sum the gradients that no reduction of mcore's covers, and find those that are missing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module

from nvmm.parallel.parameters import sharded_parameters


def sum_replicated_gradients(models: Sequence[Any]) -> None:
    """Sum over TP the gradients of parameters marked `sum_gradients_over_tensor_parallel`.

    Those are the parameters of an encoder that is whole on every TP rank and sees a share of the
    tiles. Runs after mcore's finalisation: everything there is linear, so the order is free, and
    overlapped reductions over DP have finished.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    gradients = [
        parameter.main_grad
        for model in models
        for parameter in model.parameters()
        if parameter.requires_grad
        and getattr(parameter, "sum_gradients_over_tensor_parallel", False)
    ]
    if not gradients:
        return
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    parts = torch._utils._unflatten_dense_tensors(flat, gradients)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part)


def _mark(marked: set[int], ids: list[int], *arguments: object) -> None:
    """Add ids to a set, as a hook of a module or parameter whose arguments do not matter."""
    marked.update(ids)


class GradientCheck:
    """A context manager over one step that finds used trainable parameters without a gradient.

    A parameter counts as used when the module that owns it was called. mcore's reentrant
    checkpoint, for one, silently gives no gradients behind an input that needs none.
    """

    def __init__(self, chunks: Sequence[Module]) -> None:
        self.chunks = chunks
        self.used: set[int] = set()
        self.reached: set[int] = set()
        self.handles: list[Any] = []

    def __enter__(self) -> GradientCheck:
        for chunk in self.chunks:
            for module in chunk.modules():
                ids = [id(p) for p in module.parameters(recurse=False) if p.requires_grad]
                if ids:
                    use = functools.partial(_mark, self.used, ids)
                    self.handles.append(module.register_forward_pre_hook(use))
            for parameter in chunk.parameters():
                if parameter.requires_grad:
                    reach = functools.partial(_mark, self.reached, [id(parameter)])
                    self.handles.append(parameter.register_hook(reach))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def missing(self) -> list[str]:
        """List the global names of this rank's used trainable parameters without a gradient."""
        return [
            sharded.name
            for sharded in sharded_parameters(self.chunks)
            if id(sharded.parameter) in self.used - self.reached
        ]

    def raise_on_missing(self) -> None:
        """Raise ValueError on every rank when a parameter is missing on any; collective."""
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, self.missing())
        names = sorted({name for names in gathered for name in names})
        if names:
            raise ValueError(
                "these trainable parameters were used but got no gradient: " + ", ".join(names)
            )
