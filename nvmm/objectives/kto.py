"""KTO: a loss of single answers that are desirable or not (arXiv:2402.01306)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.batch import Batch
from nvmm.objectives.mismatch import mismatched
from nvmm.objectives.objective import Run
from nvmm.objectives.preference import Preference, Where, counted_once, log_probabilities
from nvmm.parallel import context_parallel


class Kto(Preference):
    """Mean over answers of w (1 - sigmoid(beta (gain - z))), or of undesirable ones (z - gain).

    gain is log pi - log ref of an answer. The reference point z estimates the policy's divergence
    from the reference: the mean gain of prompts with answers to other prompts, over the global
    batch, at least 0 and without a gradient; 0 where the batch has less than two samples. It costs
    a second pass of policy and reference. Pairs count as two answers.

    Args:
        beta: strength of the KL penalty.
        desirable_weight, undesirable_weight: w of chosen and of other answers.
        reference: as Preference's, of the answers. Which other answers the prompts get depends on
            the batch, so that the reference runs on these in the step in any case.
    """

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: Where = "step",
    ) -> None:
        super().__init__(beta, reference)
        self.needs_reference = True
        if not (desirable_weight >= 0 and undesirable_weight >= 0):
            raise ValueError(
                f"objective.desirable_weight={desirable_weight} and undesirable_weight="
                f"{undesirable_weight} must be at least 0"
            )
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def samples_in_loss(self, global_batch: int, micro_batch: int, data_parallel: int) -> int:
        """Return the global batch: all its samples share the reference point."""
        return global_batch

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """Run the reference, and both models for the reference point.

        extras["reference"]: as Preference's. extras["kl"]: fp64 [], the reference point.
        """
        prepared, metrics = super().prepare(run, batches)
        others = mismatched(batches)
        outputs = run(others) if others else []
        references = run(others, weights="reference") if others else []
        if others and not outputs:
            return batches, metrics  # This is not the last pipeline stage.
        sums = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
        for output, reference, batch in zip(outputs, references, others, strict=True):
            local = context_parallel.share(batch)
            gains = log_probabilities(output, local)[0] - log_probabilities(reference, local)[0]
            gains = gains[(batch.sample_ids >= 0)[batch.owners]].double()
            sums += torch.stack([gains.sum(), torch.ones_like(gains).sum()])
        _add_up(sums)
        point = (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
        return [batch.replace(extras=batch.extras | {"kl": point}) for batch in prepared], metrics

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum over answers, number of answers, metrics).

        output: [b, s], the loss of each token.
        """
        valid = (batch.sample_ids >= 0)[batch.owners]
        sums = log_probabilities(output, batch)[0][valid]
        gains = sums - batch.extras["reference"][valid].to(sums)
        chosen, point = batch.extras["chosen"][valid] == 1, batch.extras["kl"].to(sums)
        above = self.beta * (gains - point)
        weight = torch.where(chosen, self.desirable_weight, self.undesirable_weight).to(sums)
        losses = weight * (1 - torch.sigmoid(torch.where(chosen, above, -above)))
        total, count, metrics = counted_once(
            losses.sum() + 0 * output.sum(),
            len(losses),
            {"loss": losses.detach(), "kl": point.expand(len(losses))},
        )
        for name, mask in (("chosen", chosen), ("rejected", ~chosen)):
            values = {
                f"reward_{name}": self.beta * gains.detach()[mask],
                f"log_probability_{name}": sums.detach()[mask],
            }
            metrics |= counted_once(total, int(mask.sum()), values)[2]
        return total, count, metrics


def _add_up(sums: Tensor) -> None:
    """Add `sums` over data-parallel ranks, in place."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
