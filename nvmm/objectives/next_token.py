"""Next-token cross-entropy: pretraining, SFT, long context."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch


class NextToken:
    """Sum of `loss_mask` x cross-entropy over the micro-batch, counted in supervised tokens."""

    def forward(self, model: Module, batch: Batch) -> Tensor:
        """Per-token loss [b, s] on the last stage."""
        return model(batch, output="loss")

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum, number of supervised tokens, {"loss": [sum, count]})."""
        total = (output.float() * batch.loss_mask).sum()
        count = (batch.loss_mask != 0).sum().to(torch.int)
        return total, count, {"loss": torch.stack([total.detach(), count.float()])}
