"""Preference losses over two answers to one prompt: DPO, IPO, and RPO with reward differences.

A text's log-probability is the sum of its answer's tokens'. With the policy pi, the reference ref,
the chosen answer c and the rejected one r,

    gain    = log pi - log ref, of one answer
    reward  = beta x gain
    m       = reward(c) - reward(r), the margin

Nemotron-4's report (arXiv:2406.11704) section 3.3.2 says why an SFT term joins them: the losses
fall also where both answers become less likely.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch
from nvmm.config.choices import require
from nvmm.objectives.objective import Objective, Run
from nvmm.parallel import context_parallel

Where = Literal["step", "data"]
Divergence = Literal["bwd_kl", "fwd_kl", "sq"]


class Preference(Objective):
    """The base of losses that compare answers with a reference: it makes their log-probabilities.

    reference: where the reference's come from: a pass with the run's first weights in the "step"
        over the same micro-batches, or the "data" (the builder's `reference`, made by job=score).
    """

    extras = frozenset({"chosen", "reward"})
    needs_reference = True

    def __init__(self, beta: float, reference: Where = "step") -> None:
        require("objective.reference", reference, Where)
        if not beta > 0:
            raise ValueError(f"objective.beta={beta} must be above 0")
        self.beta = beta
        self.reference = reference
        if reference == "data":
            self.needs_reference = False
            self.extras = self.extras | {"reference"}

    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming samples, for a batch that the loss is not defined for."""

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """Run the reference where the data do not give its log-probabilities.

        extras["reference"]: [texts], the log-probability of each answer.
        """
        # Every rank sees a fault of the data, so that none waits for the others.
        for batch in batches:
            self.check(batch)
        if self.reference == "data":
            return batches, {}
        outputs = run(batches, weights="reference")
        if not outputs:
            return batches, {}  # This is not the last pipeline stage.
        prepared = []
        for output, batch in zip(outputs, batches, strict=True):
            sums, _ = log_probabilities(output, context_parallel.share(batch))
            prepared.append(batch.replace(extras=batch.extras | {"reference": sums}))
        return prepared, {}


class PairwiseLoss(Preference):
    """The base of losses of pairs: the mean over pairs of a function of both gains.

    Args:
        beta: strength of the KL penalty that the reward stands for.
        sft_weight: weight of minus the chosen answer's log-probability, the sum over its tokens.
        sft_per_token: divide that by its tokens.
        length_normalised: divide the gains by their answer's tokens.
        reference: as Preference's.
    """

    def __init__(
        self,
        beta: float,
        sft_weight: float = 0.0,
        sft_per_token: bool = False,
        length_normalised: bool = False,
        reference: Where = "step",
    ) -> None:
        super().__init__(beta, reference)
        if not sft_weight >= 0:
            raise ValueError(f"objective.sft_weight={sft_weight} must be at least 0")
        self.sft_weight = sft_weight
        self.sft_per_token = sft_per_token
        self.length_normalised = length_normalised

    @abstractmethod
    def per_pair(self, gains: Tensor, rewards: Tensor) -> Tensor:
        """Return [pairs], the loss of each.

        gains, rewards: [2, pairs], of chosen and rejected answers; rewards are the data's.
        """

    def check(self, batch: Batch) -> None:
        """Raise ValueError for samples without a chosen and a rejected answer."""
        valid = (batch.sample_ids >= 0)[batch.owners]
        counts = torch.stack(
            [
                torch.bincount(batch.owners[valid & chosen], minlength=len(batch.sample_ids))
                for chosen in (_is_chosen(batch), ~_is_chosen(batch))
            ]
        )
        wrong = (counts != 1).any(0) & (batch.sample_ids >= 0)
        if bool(wrong.any()):
            raise ValueError(
                f"{type(self).__name__} needs a chosen and a rejected answer, which samples"
                f" {batch.sample_ids[wrong].tolist()} do not have; objective=kto takes single ones"
            )

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum over pairs, number of pairs, metrics).

        output: [b, s], the loss of each token.
        """
        # 1. [2, pairs]: log-probabilities, tokens and gains of chosen and rejected answers.
        pairs = _pairs(batch)
        sums, tokens = (values[pairs] for values in log_probabilities(output, batch))
        gains = sums - batch.extras["reference"][pairs].to(sums)
        scaled = gains / tokens if self.length_normalised else gains
        # 2. The loss of each pair.
        losses = self.per_pair(scaled, batch.extras["reward"][pairs].to(sums))
        if self.sft_weight:
            chosen = sums[0] / tokens[0] if self.sft_per_token else sums[0]
            losses = losses - self.sft_weight * chosen
        # 3. The sum; zero times the output keeps the graph of a batch that is all filling.
        rewards = self.beta * scaled.detach()
        count = pairs.shape[1]
        values = {
            "loss": losses.detach(),
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "margin": rewards[0] - rewards[1],
            "accuracy": (rewards[0] > rewards[1]).to(sums),
            "log_probability_chosen": sums[0].detach(),
            "log_probability_rejected": sums[1].detach(),
            "kl": gains.detach().mean(0),
        }
        return counted_once(losses.sum() + 0 * output.sum(), count, values)


class Dpo(PairwiseLoss):
    """-log sigmoid(m) (arXiv:2305.18290), or with label_smoothing e the conservative
    -(1 - e) log sigmoid(m) - e log sigmoid(-m), where e is the share of flipped labels.

    Other arguments: as PairwiseLoss's.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        sft_per_token: bool = False,
        length_normalised: bool = False,
        reference: Where = "step",
    ) -> None:
        super().__init__(beta, sft_weight, sft_per_token, length_normalised, reference)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"objective.label_smoothing={label_smoothing} must be at least 0 and below 0.5"
            )
        self.label_smoothing = label_smoothing

    def per_pair(self, gains: Tensor, rewards: Tensor) -> Tensor:
        """Return [pairs], the loss of each; see `PairwiseLoss.per_pair`."""
        margin = self.beta * (gains[0] - gains[1])
        flipped = self.label_smoothing
        return -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)


class Ipo(PairwiseLoss):
    """(gain(c) - gain(r) - 1 / (2 beta))^2 (arXiv:2310.12036).

    TRL divides the gains by their tokens: length_normalised=true. Arguments: as PairwiseLoss's.
    """

    def __init__(
        self,
        beta: float = 0.1,
        sft_weight: float = 0.0,
        sft_per_token: bool = False,
        length_normalised: bool = False,
        reference: Where = "step",
    ) -> None:
        super().__init__(beta, sft_weight, sft_per_token, length_normalised, reference)

    def per_pair(self, gains: Tensor, rewards: Tensor) -> Tensor:
        """Return [pairs], the loss of each; see `PairwiseLoss.per_pair`."""
        return (gains[0] - gains[1] - 1 / (2 * self.beta)).square()


class Rpo(PairwiseLoss):
    """Reward-aware preference optimisation (Nemotron-4; arXiv:2502.00203): how far the margin m is
    from the target t = eta x (the data's reward of c - that of r).

    Args:
        divergence: with the distributions s(x) = (sigmoid(x), sigmoid(-x)),
            "bwd_kl": KL(s(t) || s(m)), the paper's; its gradient is sigmoid(m) - sigmoid(t);
            "fwd_kl": KL(s(m) || s(t));
            "sq": (m - t)^2.
        eta: scale of the rewards.
        beta, sft_weight, sft_per_token, length_normalised, reference: as PairwiseLoss's.
    """

    def __init__(
        self,
        beta: float = 0.1,
        eta: float = 1.0,
        divergence: Divergence = "bwd_kl",
        sft_weight: float = 0.0,
        sft_per_token: bool = False,
        length_normalised: bool = False,
        reference: Where = "step",
    ) -> None:
        super().__init__(beta, sft_weight, sft_per_token, length_normalised, reference)
        require("objective.divergence", divergence, Divergence)
        if not eta > 0:
            raise ValueError(f"objective.eta={eta} must be above 0")
        self.eta = eta
        self.divergence = divergence

    def check(self, batch: Batch) -> None:
        """Raise ValueError for samples without rewards: no target follows from the order alone."""
        super().check(batch)
        valid = (batch.sample_ids >= 0)[batch.owners]
        lacking = batch.owners[valid & batch.extras["reward"].isnan()].unique()
        if len(lacking):
            raise ValueError(
                f"Rpo needs rewards, and samples {batch.sample_ids[lacking].tolist()} have none;"
                " give chosen_reward and rejected_reward (build.fields names them), or use"
                " objective=dpo"
            )

    def per_pair(self, gains: Tensor, rewards: Tensor) -> Tensor:
        """Return [pairs], the loss of each; see `PairwiseLoss.per_pair`."""
        margin = self.beta * (gains[0] - gains[1])
        target = self.eta * (rewards[0] - rewards[1])
        if self.divergence == "sq":
            return (margin - target).square()
        first, second = (target, margin) if self.divergence == "bwd_kl" else (margin, target)
        return bernoulli_kl(first, second)


def bernoulli_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(s(first) || s(second)) of the distributions s(x) = (sigmoid(x), sigmoid(-x))."""
    return sum(
        torch.sigmoid(sign * first) * (F.logsigmoid(sign * first) - F.logsigmoid(sign * second))
        for sign in (1, -1)
    )  # type: ignore[return-value]


def log_probabilities(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (sums, numbers) of the log-probabilities of each text's supervised tokens, [texts].

    A text's parts on context-parallel ranks are added: every rank has the whole sums, and its
    gradient goes to its own part. fp32 at least.

    output: [b, s], the loss of each token. batch: this rank's part of the sequence, as output.
    """
    values = output if output.dtype == torch.float64 else output.float()
    mask = batch.loss_mask
    both = torch.stack([-values * mask, (mask != 0).to(values)])
    if batch.cu_seqlens is None:
        sums = both.sum(2)
    else:
        # Sums of slices have the same bits each time, which atomic additions have not.
        size = int(batch.cu_seqlens[-1]) // batch.tokens.shape[1]
        segments = (torch.diff(batch.cu_seqlens) // size).tolist()
        parts = both[:, 0].split(segments, dim=1)[: batch.owners.numel()]
        sums = torch.stack([part.sum(1) for part in parts], dim=1)
    whole = context_parallel.total(sums)
    return whole[0], whole[1].detach()


def counted_once(
    total: Tensor, count: int, values: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what `Objective.loss` does, of a loss that every context-parallel rank has whole.

    Its value, count and metrics are the first rank's; each rank has the gradient of its own part.

    values: the metrics of each unit that is counted.
    """
    first = context_parallel.is_first()
    if not first:
        total, count = total - total.detach(), 0
    number = torch.tensor(count, dtype=torch.int, device=total.device)
    sums = {name: value.sum() * first for name, value in values.items()}
    metrics = {name: torch.stack([value, number.to(value)]) for name, value in sums.items()}
    return total, number, metrics


def _is_chosen(batch: Batch) -> Tensor:
    """Return bool [texts], whether each is a chosen answer."""
    return batch.extras["chosen"] == 1


def _pairs(batch: Batch) -> Tensor:
    """Return [2, pairs], the texts of chosen and rejected answers of real samples."""
    valid, chosen = (batch.sample_ids >= 0)[batch.owners], _is_chosen(batch)
    return torch.stack([(valid & mask).nonzero()[:, 0] for mask in (chosen, ~chosen)])
