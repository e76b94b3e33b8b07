"""Layers of small parts that every rank holds whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.parallel.setup import default_device


class Linear(torch.nn.Module):
    """A linear layer that is whole on every rank. weight: [output, input]."""

    def __init__(
        self, config: TransformerConfig, input_size: int, output_size: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = Parameter(empty(config, output_size, input_size))
        config.init_method(self.weight)
        self.bias = Parameter(empty(config, output_size).zero_()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., input] to [..., output]."""
        return F.linear(x, self.weight, self.bias)


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last axis, whole on every rank."""

    def __init__(self, config: TransformerConfig, size: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Parameter(empty(config, size).fill_(1.0))
        self.bias = Parameter(empty(config, size).zero_())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.epsilon)


def empty(config: TransformerConfig, *shape: int) -> Tensor:
    """Return an uninitialised tensor for a parameter."""
    return torch.empty(*shape, dtype=config.params_dtype, device=default_device(config))
