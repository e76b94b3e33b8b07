"""A decoder that gives one unit vector a text instead of logits: NV-Embed (arXiv:2405.17428)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from nvmm.batch import Batch
from nvmm.models.language import LanguageModel, packed_seq_params
from nvmm.modules.attention import visible_keys
from nvmm.modules.flops import (
    Training,
    language_flops,
    latent_attention_flops,
    segment_lengths,
    sizes,
)
from nvmm.modules.lora import only_adapters_train
from nvmm.modules.pooling import LatentAttention
from nvmm.modules.rope_scaling import Scaling
from nvmm.parallel.setup import Chunk


class EmbeddingModel(LanguageModel):
    """LanguageModel without an output layer, and a pooling over its final hidden states.

    Global names are LanguageModel's, so that a converted or trained decoder's checkpoint is its
    `init_from`; the pooling's begin with `pooling.`.

    Args:
        transformer, vocab_size, padded_vocab_size, rotary_base, rope_scaling, max_sequence_length:
            see LanguageModel.
        pooling: partial of a class of `nvmm.modules.pooling`; hidden_size and chunk are added.
        causal: keep the decoder's causal mask; False (NV-Embed) lets a token see its whole text.
        normalize: give every vector the length 1; False leaves a dot product its lengths.
        chunk: which part of the model this rank builds.
    """

    extras = frozenset({"pool_from"})

    def __init__(
        self,
        transformer: Callable[..., Any],
        vocab_size: int,
        padded_vocab_size: int,
        pooling: Callable[..., Any],
        rotary_base: float = 10000,
        rope_scaling: Scaling | None = None,
        max_sequence_length: int = 4096,
        causal: bool = False,
        normalize: bool = True,
        *,
        chunk: Chunk,
    ) -> None:
        size = chunk.parallel.context_parallel_size
        if size > 1:
            raise ValueError(f"parallel.context_parallel_size={size} must be 1 for an embedder")
        super().__init__(
            transformer,
            vocab_size,
            padded_vocab_size,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            max_sequence_length=max_sequence_length,
            causal=causal,
            chunk=chunk,
        )
        self.is_causal = causal
        self.normalize = normalize
        # Known to the first stage too, which counts FLOPs; the pooling itself is on the last.
        self.latent_sizes = latent_sizes(pooling, self.config.hidden_size)
        if self.post_process:
            del self.output_layer
            self.pooling = pooling(hidden_size=self.config.hidden_size, chunk=chunk)

    def forward(self, batch: Batch, *, output: str = "embedding", **options: Any) -> Tensor:
        """Run this chunk.

        batch: one text a row or packed segment; `extras["pool_from"]` as `pooling.pool_mask` says.
        output: the last stage's result: "embedding" (fp32 [texts, h]) or "hidden" ([s, b, h]).

        Returns: on the last stage as `output` says; else hidden states [s, b, h] for the next one.
        """
        spans = None if batch.cu_seqlens is not None else key_spans(batch)
        if not self.is_causal:
            options["key_spans"] = spans
        hidden = super().forward(batch, output="hidden", **options)
        if not self.post_process:
            return hidden
        return embed_texts(self, hidden, batch, spans, output)

    def count_flops(self, batch: Batch, training: Training) -> float:
        """Count model FLOPs of a micro-batch's forward and backward, latent attention among them.

        They are the whole model's, whatever the layout and `training`: the pooling is always
        trained, and stands on the last stage alone. A self-attention pooling's layer is not
        counted.
        """
        flops = language_flops(
            **sizes(self.config),
            vocab_size=0,
            segment_lengths=segment_lengths(batch),
            windows=visible_keys(self.config),
            training="passed" if only_adapters_train(self.decoder) else "trained",
            causal_attention_factor=0.5 if self.is_causal else 1.0,
        )
        if self.latent_sizes is not None:
            pooled = sum(segment_lengths(batch))
            if "pool_from" in batch.extras:
                pooled -= int(batch.extras["pool_from"].sum())
            flops += latent_attention_flops(**self.latent_sizes, num_tokens=pooled)  # type: ignore[arg-type]
        return flops

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's for any module: the one for language models asks for an output layer."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


def embed_texts(
    model: Any, hidden: Tensor, batch: Batch, spans: Tensor | None, output: str
) -> Tensor:
    """Pool the last hidden states [s, b, h], [s / tp, b, h] with SP, to fp32 [texts, h].

    model: its `config`, `pooling` and `normalize` are read.
    output: "embedding", or "hidden" for the states [s, b, h] themselves.
    """
    if model.config.sequence_parallel:
        # The pooling's input gradient is whole on every rank: backward takes a part of it.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False
        )
    if output == "hidden":
        return hidden
    pooled: Tensor = model.pooling(hidden, batch, spans, packed_seq_params(batch)).float()
    return F.normalize(pooled, dim=-1) if model.normalize else pooled


def latent_sizes(pooling: Callable[..., Any], hidden_size: int) -> dict[str, int] | None:
    """Return a partial's arguments of `latent_attention_flops`; None unless LatentAttention's."""
    if getattr(pooling, "func", None) is not LatentAttention:
        return None
    bound = inspect.signature(LatentAttention).bind_partial(**pooling.keywords)  # type: ignore[attr-defined]
    bound.apply_defaults()
    sizes = {key: bound.arguments[key] for key in ("num_latents", "num_heads")}
    return sizes | {
        "head_dim": bound.arguments["head_dim"] or hidden_size,
        "ffn_hidden_size": bound.arguments["ffn_hidden_size"] or 4 * hidden_size,
        "hidden_size": hidden_size,
    }


def key_spans(batch: Batch) -> Tensor | None:
    """Return rows' first and last + 1 valid keys, int32 [b, 2]; None if all are valid.

    Rows are padded on the right.
    """
    if bool((batch.lengths == batch.tokens.shape[1]).all()):
        return None
    return torch.stack([torch.zeros_like(batch.lengths), batch.lengths], dim=1).int()
