"""BERT's embedding of tokens: words, learned positions and token types, then a norm."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.parallel.setup import default_device


class NormedEmbedding(MegatronModule):
    """norm(word + position + token type), with dropout; names are those of mcore's embedding.

    mcore's own has no norm, and makes positions and types in fp32 whatever the parameters' dtype.

    num_tokens: rows of the vocabulary; num_positions: the longest sequence.
    num_token_types: 0 for none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        num_tokens: int,
        num_positions: int,
        num_token_types: int,
    ) -> None:
        super().__init__(config=config)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=num_tokens,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
        )
        self.position_embeddings = self._table(num_positions)
        self.tokentype_embeddings = self._table(num_token_types) if num_token_types else None
        norm = backend.layer_norm(config.normalization == "RMSNorm")
        self.layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def _table(self, rows: int) -> torch.nn.Embedding:
        """Return a table that is whole on every tensor-parallel rank."""
        config = self.config
        weight = torch.empty(
            rows, config.hidden_size, dtype=config.params_dtype, device=default_device(config)
        )
        table = torch.nn.Embedding(rows, config.hidden_size, _weight=weight)
        config.embedding_init_method(table.weight)
        return table

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """Embed int64 [b, s] each as [s, b, h]; with sequence parallelism as [s / tp, b, h].

        token_types: None for type 0 throughout.
        """
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        if self.tokentype_embeddings is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types
            x = x + self.tokentype_embeddings(types)
        x = x.transpose(0, 1).contiguous()
        if not self.config.sequence_parallel:
            return self._dropout(self.layernorm(x))
        # The norm's gradient is summed over TP, so it must see this rank's positions alone.
        x = self.layernorm(tensor_parallel.scatter_to_sequence_parallel_region(x))
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return self._dropout(x)

    def _dropout(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.config.hidden_dropout, self.training)
