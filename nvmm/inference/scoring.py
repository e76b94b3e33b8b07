"""One number of a reward model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEMOTRON4_340B_REWARD = (0.0, 0.0, 0.0, 0.0, 0.3, 0.74, 0.46, 0.47, -0.33)
"""Weights of the released model's nine outputs (nvidia/Nemotron-4-340B-Reward's card)."""


def weights_of(weights: Sequence[float] | None, outputs: int, key: str) -> Tensor:
    """Return a weight of each output, fp64 [outputs].

    weights: None for 1 of a single output, and for the released model's of nine.
    key: the config's, for messages.

    Raises ValueError for another number of outputs without weights, and for another number of
    weights.
    """
    if weights is None:
        weights = {1: (1.0,), 9: NEMOTRON4_340B_REWARD}.get(outputs)
    if weights is None:
        raise ValueError(f"{key} must be given for a model of {outputs} outputs: a weight of each")
    if len(weights) != outputs:
        raise ValueError(f"{key}={list(weights)} must have {outputs} numbers, one for each output")
    return torch.tensor(list(weights), dtype=torch.float64)


def scalars(scores: Tensor, weights: Sequence[float] | None, key: str) -> Tensor:
    """Scores [texts, outputs] -> their weighted sums, fp64 [texts]."""
    return scores.double() @ weights_of(weights, scores.shape[1], key)
