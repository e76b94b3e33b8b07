"""Next-token cross-entropy: pretraining, SFT, long context."""

from __future__ import annotations

import torch
from torch import Tensor

from nvmm.batch import Batch
from nvmm.objectives.objective import Objective


class NextToken(Objective):
    """Sum of `loss_mask` x cross-entropy over the micro-batch, counted in supervised tokens."""

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum, number of supervised tokens, {"loss": [sum, count]}).

        output: [b, s], the loss of each token.
        """
        total = (output.float() * batch.loss_mask).sum()
        count = (batch.loss_mask != 0).sum().to(torch.int)
        return total, count, {"loss": torch.stack([total.detach(), count.float()])}
