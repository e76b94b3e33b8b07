"""What a training objective is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch


class Run(Protocol):
    """A forward-only pass over micro-batches through the training schedule, given by the trainer.

    weights: "current", or "reference" for the weights the run started from.
    Returns one output per micro-batch on the last pipeline stage, an empty list elsewhere. Random
    numbers of the pass that follows are the same.
    """

    def __call__(self, batches: list[Batch], weights: str = "current") -> list[Tensor]: ...


@runtime_checkable
class Objective(Protocol):
    """Batch -> loss. Optional third method:

    `prepare(run, batches) -> (batches, metrics)` runs once a step on every rank before the
    training pass, and before that of a validation batch (in eval mode, without gradients), and
    returns the batches with `extras` filled.
    """

    def forward(self, model: Module, batch: Batch) -> Tensor:
        """Run the model on every pipeline stage; the last stage's result goes to `loss`."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Last stage: (local sum, local int count, metrics).

        `batch` holds this rank's part of the sequence, as `output` does: under context parallelism
        the parts' sums and counts add up. Nobody divides here: the schedule divides gradients by
        the global count once. Weights enter the sum; the count is an int tensor. Each metric is a
        tensor [sum, count].
        """
        ...
