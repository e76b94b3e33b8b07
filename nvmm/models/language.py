"""A decoder-only language model: ChatQA, ChatQA-2, RankRAG, Nemotron-4, the LLM of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nvmm.batch import Batch, MediaKind
from nvmm.config.choices import require
from nvmm.modules.attention import visible_keys
from nvmm.modules.cross_attention import CrossAttention
from nvmm.modules.flops import Training, language_flops, segment_lengths, sizes, training_of
from nvmm.modules.output import fused_loss
from nvmm.modules.rope_scaling import Scaling
from nvmm.modules.rotary import Rotary, RotaryAttention
from nvmm.modules.specs import backend_provider, block_spec, layer_spec
from nvmm.parallel import context_parallel
from nvmm.parallel.setup import Chunk

PositionEmbedding = Literal["rope", "learned_absolute"]


class LanguageModel(GPTModel):
    """mcore's GPTModel over a `Batch`, with a padded vocabulary that the softmax does not see.

    Args:
        transformer: partial of mcore's TransformerConfig; sizes of the layout and dtypes are added.
        vocab_size: tokens of the tokenizer.
        padded_vocab_size: rows of the embedding, a config number that does not depend on TP.
            Rows from vocab_size on take no part in the softmax.
        rotary_base: RoPE base period; rotary_percent: rotated share of each head.
        rope_scaling: a class of `nvmm.modules.rope_scaling`; null for RoPE as it is.
        share_embeddings_and_output_weights: tied input and output embeddings.
        max_sequence_length: longest sequence; longer data and prompts are refused.
        causal: False lets every token attend to its whole row or segment (embedders).
        position_embedding_type: rope, or learned_absolute: a learned vector for each position is
            added to the embeddings (OPT), also to those of media in the sequence.
        position_offset: rows of the table in front of position 0's (OPT: 2), which nothing reads.
        cross_attention: layers that read media beside the sequence; None for none.
        chunk: which part of the model this rank builds.
    """

    extras: frozenset[str] = frozenset()
    """Names of `Batch.extras` that the model reads, where the data give them."""

    def __init__(
        self,
        transformer: Callable[..., Any],
        vocab_size: int,
        padded_vocab_size: int,
        rotary_base: float = 10000,
        rotary_percent: float = 1.0,
        rope_scaling: Scaling | None = None,
        share_embeddings_and_output_weights: bool = False,
        max_sequence_length: int = 4096,
        causal: bool = True,
        position_embedding_type: PositionEmbedding = "rope",
        position_offset: int = 0,
        *,
        cross_attention: CrossAttention | None = None,
        chunk: Chunk,
    ) -> None:
        if padded_vocab_size < vocab_size:
            raise ValueError(
                f"model.padded_vocab_size={padded_vocab_size} must be at least"
                f" model.vocab_size={vocab_size}"
            )
        require("model.position_embedding_type", position_embedding_type, PositionEmbedding)
        learned = position_embedding_type == "learned_absolute"
        config = chunk.transformer_config(transformer)
        backend = backend_provider(chunk.backend)
        mask = AttnMaskType.causal if causal else AttnMaskType.padding
        layer = layer_spec(config, backend, mask, attention=RotaryAttention)
        layers = cross_attention.layers(layer, backend) if cross_attention is not None else layer
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, backend, layers, chunk.vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length + position_offset,
            pre_process=chunk.pre_process,
            post_process=chunk.post_process,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            # mcore's "rope" would build a table of its own; `Rotary` says why that one is not used.
            position_embedding_type="learned_absolute" if learned else "none",
            scatter_embedding_sequence_parallel=False,
            vp_stage=chunk.vp_stage,
        )
        self.max_sequence_length = max_sequence_length
        self.position_offset = position_offset
        self.rotary: Rotary | None = None
        if not learned:
            dim = int(self.config.kv_channels * rotary_percent)
            self.rotary = Rotary(rotary_base, dim, rope_scaling)
        elif self.pre_process:
            # mcore makes the table in fp32 on the CPU.
            self.embedding.position_embeddings.to(chunk.device, config.params_dtype)
        self.unpadded_vocab_size = vocab_size
        self.input_needs_gradient = chunk.input_needs_gradient

    reads: frozenset[MediaKind] = frozenset()
    """The kinds of media that the model takes; others are refused."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [b, s] as words [s, b, h], whole on every TP rank."""
        return self.embedding.word_embeddings(tokens).transpose(0, 1).contiguous()

    def forward(
        self,
        batch: Batch,
        *,
        output: str = "loss",
        hidden: Tensor | None = None,
        context: Tensor | None = None,
        context_spans: Tensor | None = None,
        key_spans: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            batch: the micro-batch.
            output: the last stage's result: "loss" (per token, [b, s]), "logits" (gathered
                over TP, without padding rows, [b, s, vocab_size]) or "hidden" ([s, b, h]). Under
                context parallelism s is that of `context_parallel.share(batch)`.
            hidden: input embeddings [s, b, h] instead of those of `batch.tokens` (media merged).
            context, context_spans: media that cross-attention reads and which of them each position
                sees, as `GatedCrossAttention` takes them (this rank's positions).
            key_spans: int32 [b, 2], the valid keys (first, last + 1) of each row; None when all
                are valid, which right-padded causal rows always are.
            inference_context: mcore's KV cache; "logits" are then those of the last position.

        Returns: on the last stage as `output` says; else hidden states [s, b, h] for the next one.
        """
        if hidden is None and self.pre_process:
            batch.require(self.reads, f"model._target_={type(self).__name__}")
        # 1. This context-parallel rank's part of the row: tokens [b, s / cp]. Packed segments are
        #    described whole, and merged media [s, b, h] are dealt like the tokens.
        packed = packed_seq_params(batch)
        rotations = None if self.rotary is None else self.rotary.table(batch)
        if hidden is not None:
            hidden = context_parallel.shard(hidden, batch)
        batch = context_parallel.share(batch)
        # 2. On the first stage the block's input [s / cp, b, h], [s / (cp tp), b, h] with SP.
        if self.pre_process:
            hidden = self.embed(batch.tokens) if hidden is None else hidden
            hidden = self._enter(self._add_positions(hidden, batch))
        # 3. This chunk's layers; the shape stays. On later stages mcore puts in what arrived.
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=key_spans,
            context=context,
            context_mask=context_spans,
            inference_context=inference_context,
            rotary_pos_emb=rotations,
            packed_seq_params=packed,
        )
        if not self.post_process or output == "hidden":
            return hidden
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else None
        )
        # 4. The loss [b, s / cp] from the hidden states directly where a kernel can do it.
        if output == "loss":
            loss = fused_loss(
                self.output_layer, hidden, batch.labels, self.unpadded_vocab_size, weight
            )
            if loss is not None:
                return loss
        # 5. Logits [s, b, padded vocabulary / tp]: gathered without the padding rows, or into the
        #    loss with the padding rows out of the softmax.
        gather = output == "logits"
        if inference_context is not None:
            hidden = hidden[-1:]  # only the last position's logits choose the next token
        logits, _ = self.output_layer(hidden, weight=weight, runtime_gather_output=gather)
        if gather:
            return logits[..., : self.unpadded_vocab_size].transpose(0, 1).contiguous()
        return self.compute_language_model_loss(batch.labels, self._mask_padding_rows(logits))

    def flops(self, batch: Batch) -> dict[str, float]:
        """Count model FLOPs of a micro-batch's forward and backward, {"language": ...}."""
        training = training_of(self, behind=False)
        return {"language": self.count_flops(batch, training)}

    def count_flops(self, batch: Batch, training: Training) -> float:
        """Count matrix-multiply FLOPs over the batch's sequences."""
        return language_flops(
            **sizes(self.config),
            vocab_size=self.unpadded_vocab_size,
            segment_lengths=segment_lengths(batch),
            windows=visible_keys(self.config),
            training=training,
        )

    def _add_positions(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Add learned positions, where the model has them, to this rank's embeddings [s, b, h].

        Raises ValueError for a sequence that is longer than the table.
        """
        if self.rotary is not None:
            return hidden
        longest = int(batch.lengths.max())
        if longest > self.max_sequence_length:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than model.max_sequence_length="
                f"{self.max_sequence_length}, the learned positions"
            )
        # Padding, which nobody sees, may lie behind the last position.
        rows = batch.position_ids.clamp(max=self.max_sequence_length - 1) + self.position_offset
        return hidden + self.embedding.position_embeddings(rows).transpose(0, 1)

    def _enter(self, hidden: Tensor) -> Tensor:
        """Turn embeddings into the block's input: scatter, dropout, a gradient where it must."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
            with tensor_parallel.get_cuda_rng_tracker().fork():
                hidden = self._embedding_dropout(hidden)
        else:
            hidden = self._embedding_dropout(hidden)
        return self.block_input(hidden)

    def block_input(self, x: Tensor) -> Tensor:
        """Make an input of the block require a gradient where it must (`Chunk`)."""
        if self.input_needs_gradient and self.training and torch.is_grad_enabled():
            if not x.requires_grad:
                return x.detach().requires_grad_()
        return x

    def _embedding_dropout(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.dropout(hidden, self.config.hidden_dropout, self.training)

    def _mask_padding_rows(self, logits: Tensor) -> Tensor:
        """Set padding rows of logits [s, b, padded vocabulary / TP] to the dtype's minimum."""
        width = logits.shape[-1]
        first = width * self.pg_collection.tp.rank()
        if first + width <= self.unpadded_vocab_size:
            return logits
        padding = torch.arange(first, first + width, device=logits.device)
        return logits.masked_fill(
            padding >= self.unpadded_vocab_size, torch.finfo(logits.dtype).min
        )


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
