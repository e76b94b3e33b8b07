"""Losses of reward models: regression of attributes, and Bradley-Terry over pairs of answers.

HelpSteer2 (arXiv:2406.08673) trains Nemotron-4-340B-Reward by regression; its pairs come with how
much better the chosen answer is, which the margin and the scaled loss use (arXiv:2410.01257).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch
from nvmm.config.choices import require
from nvmm.objectives.objective import Objective

Margin = Literal["none", "margin", "scaled"]
NAMES = "data.train.build.attributes"


class Regression(Objective):
    """Mean squared error over the labels of the trained attributes that are there.

    The sum runs over all labels of the global batch and is divided by their number: an answer with
    three labels counts three times one with a single label.

    Args:
        attributes: names of the model's outputs, in their order.
        trained: those that are learned; the others' labels are not looked at. None: all.

    Metrics: the loss; `<attribute>_error`, the mean squared error of each trained attribute; and
    `mean_label` and `mean_score` over the labels that are there.
    """

    output = "score"
    extras = frozenset({"attributes"})

    def __init__(self, attributes: Sequence[str], trained: Sequence[str] | None = None) -> None:
        _require_names("objective.attributes", attributes)
        self.attributes = tuple(attributes)
        self.trained = self.attributes if trained is None else tuple(trained)
        _require_names("objective.trained", self.trained)
        unknown = [name for name in self.trained if name not in self.attributes]
        if unknown:
            raise ValueError(
                f"objective.trained={list(self.trained)}: {', '.join(unknown)} must be among"
                f" objective.attributes={list(self.attributes)}"
            )

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum of squared errors, number of labels, metrics).

        output: [texts, attributes]. `extras["attributes"]`: float32 of the same shape, NaN where a
        text has no label.

        Raises ValueError where model, data and objective differ in the number of attributes.
        """
        labels = batch.extras["attributes"]
        if output.shape != labels.shape or output.shape[1] != len(self.attributes):
            raise ValueError(
                f"model.num_outputs={output.shape[1]}, {NAMES} has {labels.shape[1]} and"
                f" objective.attributes {len(self.attributes)} names: all must be the same"
            )
        columns = [self.attributes.index(name) for name in self.trained]
        labels, scores = labels[:, columns].to(output.dtype), output[:, columns]
        known = ~labels.isnan() & is_counted(batch)[:, None]
        errors = (scores - labels.masked_fill(~known, 0)).square().masked_fill(~known, 0)
        counts = known.sum(0).to(torch.int)
        # Zero times the scores keeps the graph of a batch without labels.
        total = errors.sum() + 0 * output.sum()
        sums = errors.detach().sum(0)
        metrics = {
            f"{name}_error": _metric(sums[i], counts[i]) for i, name in enumerate(self.trained)
        }
        metrics["mean_score"] = _metric(scores.detach().masked_fill(~known, 0).sum(), counts.sum())
        metrics["mean_label"] = _metric(labels.masked_fill(~known, 0).sum(), counts.sum())
        metrics["loss"] = _metric(sums.sum(), counts.sum())
        return total, counts.sum().to(torch.int), metrics


class BradleyTerry(Objective):
    """-log sigmoid of the chosen answer's score minus the rejected one's, the mean over pairs.

    With d that difference and m how much better the chosen answer was judged, the difference of
    the two `reward`s:

    - margin=none: -logsigmoid(d);
    - margin=margin: -logsigmoid(d - |m|);
    - margin=scaled: -|m| logsigmoid(d).

    Args:
        margin: what is done with m, which every pair must have but for none.
        index: the model's output that is an answer's score.
        weights: in place of `index`, a weight of each output: the score is their weighted sum.

    Metrics: the loss; accuracy, the share of pairs whose chosen answer scores higher; the mean
    scores `chosen_score` and `rejected_score`.
    """

    output = "score"
    extras = frozenset({"chosen", "reward"})

    def __init__(
        self, margin: Margin = "none", index: int = 0, weights: Sequence[float] | None = None
    ) -> None:
        require("objective.margin", margin, Margin)
        if index < 0:
            raise ValueError(f"objective.index={index} must be at least 0")
        if weights is not None and index:
            raise ValueError(
                f"objective.index={index} does nothing beside objective.weights; leave one out"
            )
        if weights is not None and not any(weights):
            raise ValueError(f"objective.weights={list(weights)} must have one that is not 0")
        self.margin = margin
        self.index = index
        self.weights = None if weights is None else tuple(weights)

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum over pairs, their number, metrics).

        output: [texts, outputs]. `extras["chosen"]`: int64 [texts], 1 or 0 (rejected);
        `extras["reward"]`: float32 [texts], NaN where it is not known.

        Raises ValueError naming the samples that are no pair, or have no rewards where they must.
        """
        scores = self.scalar(output)
        chosen, rejected = pairs(batch)
        difference = scores[chosen] - scores[rejected]
        losses = -F.logsigmoid(difference)
        if self.margin != "none":
            reward = batch.extras["reward"].to(scores.dtype)
            margin = (reward[chosen] - reward[rejected]).abs()
            if bool(margin.isnan().any()):
                samples = batch.sample_ids[batch.owners[chosen[margin.isnan()]]].tolist()
                raise ValueError(
                    f"objective.margin={self.margin} needs the rewards of both answers; samples"
                    f" {samples} lack them"
                )
            if self.margin == "margin":
                losses = -F.logsigmoid(difference - margin)
            else:
                losses = losses * margin
        count = torch.tensor(len(chosen), dtype=torch.int, device=output.device)
        metrics = {
            "loss": losses,
            "accuracy": (difference > 0).to(scores.dtype),
            "chosen_score": scores[chosen],
            "rejected_score": scores[rejected],
        }
        # Zero times the scores keeps the graph of a batch without pairs.
        total = losses.sum() + 0 * output.sum()
        return total, count, {k: _metric(v.detach().sum(), count) for k, v in metrics.items()}

    def scalar(self, output: Tensor) -> Tensor:
        """Scores [texts, outputs] -> [texts]; ValueError for an output that is not there."""
        outputs = output.shape[1]
        if self.weights is None:
            if self.index >= outputs:
                raise ValueError(
                    f"objective.index={self.index} must be below model.num_outputs={outputs}"
                )
            return output[:, self.index]
        if len(self.weights) != outputs:
            raise ValueError(
                f"objective.weights has {len(self.weights)} numbers, model.num_outputs={outputs}"
            )
        return output @ output.new_tensor(self.weights)


def is_counted(batch: Batch) -> Tensor:
    """Return bool [texts], the texts whose loss this rank counts.

    They are those of real samples. Context-parallel ranks all have the whole texts' scores: the
    first one counts them, and the sum over ranks has each of them once.
    """
    from megatron.core import parallel_state

    valid = (batch.sample_ids >= 0)[batch.owners]
    return valid & (parallel_state.get_context_parallel_rank() == 0)


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the texts of the chosen and of the rejected answers that are counted, int64 [pairs].

    Raises ValueError naming the samples that have not one of each.
    """
    is_chosen, counted = batch.extras["chosen"] == 1, is_counted(batch)
    chosen = (is_chosen & counted).nonzero()[:, 0]
    rejected = (~is_chosen & counted).nonzero()[:, 0]
    if not torch.equal(batch.owners[chosen], batch.owners[rejected]):
        count = len(batch.sample_ids)
        owners = batch.owners
        unlike = owners[chosen].bincount(minlength=count) != 1
        unlike |= owners[rejected].bincount(minlength=count) != 1
        samples = batch.sample_ids[unlike & (batch.sample_ids >= 0)].tolist()
        raise ValueError(f"samples {samples} must each have one chosen and one rejected answer")
    return chosen, rejected


def _metric(total: Tensor, count: Tensor) -> Tensor:
    return torch.stack([total, count.to(total.dtype)])


def _require_names(key: str, names: Sequence[str]) -> None:
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"{key}={names} must list different names, at least one")
