"""Connectors as a user writes them: learned queries over a tile's features, without a grid."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nvmm.parallel.setup import Chunk


class Silent(MegatronModule):
    """The mean of a tile's features, `num_queries` times; it says nothing of itself."""

    def __init__(
        self, num_queries: int = 16, *, input_size: int, output_size: int, chunk: Chunk
    ) -> None:
        super().__init__(config=chunk.encoder_config(_config(input_size)))
        self.num_queries = num_queries
        self.linear = torch.nn.Linear(input_size, output_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.linear(features.mean(1, keepdim=True)).expand(-1, self.num_queries, -1)


class Resampler(Silent):
    """The same, which says what its tokens are, and what it costs."""

    tokens_of_tile = "num_queries"

    def flops(self, num_tiles: int, grid: tuple[int, int], training: Any) -> float:
        return 2.0 * num_tiles * self.linear.weight.numel()


def _config(hidden_size: int) -> Any:
    import functools

    from megatron.core.transformer.transformer_config import TransformerConfig

    return functools.partial(
        TransformerConfig, num_layers=1, hidden_size=hidden_size, num_attention_heads=1
    )
