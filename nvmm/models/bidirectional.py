"""A BERT-like encoder (arXiv:1810.04805) that gives one vector a text: Dragon, E5, MiniLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from nvmm.batch import Batch, MediaKind
from nvmm.models.embedder import embed_texts, key_spans
from nvmm.models.language import packed_seq_params
from nvmm.modules.embedding import NormedEmbedding
from nvmm.modules.flops import Training, language_flops, segment_lengths, sizes, training_of
from nvmm.modules.post_norm import post_norm_spec
from nvmm.modules.specs import backend_provider, block_spec
from nvmm.parallel.setup import Chunk


class BidirectionalEncoder(MegatronModule):
    """Post-norm layers over words, learned positions and token types, then a pooling.

    Args:
        transformer: partial of mcore's TransformerConfig; sizes of the layout and dtypes are added.
        vocab_size: tokens of the tokenizer.
        padded_vocab_size: rows of the embedding, a config number that does not depend on TP.
        pooling: partial of a class of `nvmm.modules.pooling`; hidden_size and chunk are added.
        max_sequence_length: learned positions; longer data are refused.
        num_token_types: rows of the table of token types; 0 for none.
        normalize: give every vector the length 1; False leaves a dot product its lengths (Dragon).
        chunk: which part of the model this rank builds.
    """

    extras = frozenset({"pool_from"})
    reads: frozenset[MediaKind] = frozenset()

    def __init__(
        self,
        transformer: Callable[..., Any],
        vocab_size: int,
        padded_vocab_size: int,
        pooling: Callable[..., Any],
        max_sequence_length: int = 512,
        num_token_types: int = 2,
        normalize: bool = True,
        *,
        chunk: Chunk,
    ) -> None:
        if padded_vocab_size < vocab_size:
            raise ValueError(
                f"model.padded_vocab_size={padded_vocab_size} must be at least"
                f" model.vocab_size={vocab_size}"
            )
        size = chunk.parallel.context_parallel_size
        if size > 1:
            raise ValueError(f"parallel.context_parallel_size={size} must be 1 for an embedder")
        config = chunk.transformer_config(transformer)
        super().__init__(config=config)
        # mcore's schedules and gradient finalisation read these from a model.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = chunk.pre_process, chunk.post_process
        self.vp_stage = chunk.vp_stage
        self.share_embeddings_and_output_weights = False
        self.max_sequence_length = max_sequence_length
        self.normalize = normalize
        self.input_needs_gradient = chunk.input_needs_gradient
        backend = backend_provider(chunk.backend)
        if self.pre_process:
            self.embedding = NormedEmbedding(
                config, backend, padded_vocab_size, max_sequence_length, num_token_types
            )
        layer = post_norm_spec(config, backend, AttnMaskType.padding)
        self.decoder = TransformerBlock(
            config,
            block_spec(config, backend, layer, chunk.vp_stage),
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=chunk.vp_stage,
        )
        if self.post_process:
            self.pooling = pooling(hidden_size=config.hidden_size, chunk=chunk)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive the previous stage's hidden states [s, b, h], alone or in a list of one."""
        if isinstance(input_tensor, list):
            [input_tensor] = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> None:
        """Return None: no output layer shares the embedding."""

    def forward(
        self, batch: Batch, *, output: str = "embedding", token_types: Tensor | None = None
    ) -> Tensor:
        """Run this chunk.

        batch: one text a row or packed segment; `extras["pool_from"]` as `pooling.pool_mask` says.
        output: the last stage's result: "embedding" (fp32 [texts, h]) or "hidden" ([s, b, h]).
        token_types: int64 [b, s]; None for type 0.

        Returns: on the last stage as `output` says; else hidden states [s, b, h] for the next one.
        Raises ValueError for a text longer than the learned positions.
        """
        hidden = None
        if self.pre_process:
            batch.require(self.reads, f"model._target_={type(self).__name__}")
            longest = int(batch.lengths.max())
            if longest > self.max_sequence_length:
                raise ValueError(
                    f"a text of {longest} tokens is longer than"
                    f" model.max_sequence_length={self.max_sequence_length}"
                )
            # Padding, which nobody sees, may lie behind the last position.
            positions = batch.position_ids.clamp(max=self.max_sequence_length - 1)
            hidden = self.block_input(self.embedding(batch.tokens, positions, token_types))
        spans = None if batch.cu_seqlens is not None else key_spans(batch)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=spans,
            packed_seq_params=packed_seq_params(batch),
        )
        if not self.post_process:
            return hidden
        return embed_texts(self, hidden, batch, spans, output)

    def block_input(self, x: Tensor) -> Tensor:
        """Make an input of the block require a gradient where it must (`Chunk`)."""
        if self.input_needs_gradient and self.training and torch.is_grad_enabled():
            if not x.requires_grad:
                return x.detach().requires_grad_()
        return x

    def flops(self, batch: Batch) -> dict[str, float]:
        """Count model FLOPs of a micro-batch's forward and backward, {"language": ...}."""
        return {"language": self.count_flops(batch, training_of(self, behind=False))}

    def count_flops(self, batch: Batch, training: Training) -> float:
        """Count matrix-multiply FLOPs over the batch's texts, every token seen by every other.

        They are the whole model's, whatever the layout.
        """
        return language_flops(
            **sizes(self.config),
            vocab_size=0,
            segment_lengths=segment_lengths(batch),
            training=training,
            causal_attention_factor=1.0,
        )
