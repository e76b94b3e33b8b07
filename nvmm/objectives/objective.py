"""The base class of training objectives, which make a loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch


class Run(Protocol):
    """A forward-only pass over micro-batches through the training schedule, given by the trainer.

    weights: "current", or "reference" for the weights that the run started from (its `init_from`,
    else the seed's), also after a resume; for an objective that `needs_reference`.

    It returns one output per micro-batch on the last pipeline stage, an empty list elsewhere. The
    current weights run as in training and with the random numbers of the pass that follows; the
    reference runs in eval mode, without dropout.
    """

    def __call__(self, batches: list[Batch], weights: str = "current") -> list[Tensor]: ...


class Objective(ABC):
    """A function from a batch to its loss.

    output: the model's output that it needs, its `forward`'s `output`.
    extras: names of the `Batch.extras` that the data must have for it. The trainer refuses batches
        that lack one, or have one that neither the objective nor the model reads.
    needs_reference: whether it runs the reference weights; the trainer keeps them only then.
    """

    output: str = "loss"
    extras: frozenset[str] = frozenset()
    needs_reference: bool = False

    def samples_in_loss(self, global_batch: int, micro_batch: int, data_parallel: int) -> int:
        """Return how many samples of a step one loss compares with each other.

        Where that depends on the micro-batch or the data-parallel size, so does the loss: a resume
        that changes it says so, and a proof of a layout does not expect equality. The default is 1:
        samples add up one by one, however they are dealt.
        """
        return 1

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """Return the batches to train on, with more `extras`, and metrics that replace `loss`'s.

        The trainer calls it once a step on every rank before the training pass, and before that of
        a validation batch (in eval mode, without gradients). The default changes nothing.
        """
        return batches, {}

    def forward(self, model: Module, batch: Batch) -> Tensor:
        """Run the model on every pipeline stage; the last stage's result goes to `loss`."""
        return model(batch, output=self.output)

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return, on the last stage, (local sum, local int count, metrics).

        `batch` holds this rank's part of the sequence, as `output` does: under context parallelism
        the parts' sums and counts add up. Nobody divides here: the schedule divides gradients by
        the global count once. Weights enter the sum; the count is an int tensor. Each metric is a
        tensor [sum, count].
        """
