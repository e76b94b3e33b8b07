"""Poolings of the hidden states of a text's tokens: first or last token, mean, latent attention.

NV-Embed (arXiv:2405.17428) section 3.1 and its released model. A pooling takes the whole sequence
on every tensor-parallel rank and leaves L2 normalisation to the model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module, Parameter

from nvmm.batch import Batch
from nvmm.modules.specs import backend_provider, block_spec, layer_spec
from nvmm.parallel.groups import own_group
from nvmm.parallel.setup import Chunk, Normal, default_device


def num_texts(batch: Batch) -> int:
    """Count the rows, or the segments of a packed row that are not its padding."""
    return int((batch.lengths > 0).sum())


def text_of(batch: Batch) -> Tensor:
    """Return each position's text (row, or segment of a packed row), int64 [b, s]."""
    if batch.cu_seqlens is None:
        numbers = torch.arange(batch.tokens.shape[0], device=batch.tokens.device)
        return numbers[:, None].expand_as(batch.tokens)
    sizes = torch.diff(batch.cu_seqlens)
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)[None]


def pool_mask(batch: Batch) -> Tensor:
    """Return the mask of the tokens that are pooled, bool [b, s].

    Those are a text's tokens from `batch.extras["pool_from"]` to its end. It is int64 [texts] and
    follows the convention of instruction masking; where it is absent, texts begin at 0.
    """
    text = text_of(batch)
    mask = batch.position_ids < batch.lengths.long()[text]
    start = batch.extras.get("pool_from")
    if start is not None:
        # A packed row's padding is a last segment without an entry.
        start = F.pad(start, (0, batch.lengths.numel() - start.numel()))
        mask = mask & (batch.position_ids >= start[text])
    return mask


class CLS(Module):
    """The first token of each text."""

    def __init__(self, *, hidden_size: int, chunk: Chunk) -> None:
        super().__init__()

    def forward(
        self, hidden: Tensor, batch: Batch, spans: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """hidden [s, b, h] -> [texts, h]."""
        if batch.cu_seqlens is None:
            return hidden[0, : num_texts(batch)]
        return hidden[batch.cu_seqlens[: num_texts(batch)].long(), 0]


class EOS(Module):
    """The last token of each text."""

    def __init__(self, *, hidden_size: int, chunk: Chunk) -> None:
        super().__init__()

    def forward(
        self, hidden: Tensor, batch: Batch, spans: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """hidden [s, b, h] -> [texts, h]."""
        last = batch.lengths[batch.lengths > 0].long() - 1
        if batch.cu_seqlens is None:
            return hidden[last, torch.arange(len(last), device=hidden.device)]
        return hidden[last + batch.cu_seqlens[: len(last)].long(), 0]


class Mean(Module):
    """The mean over the pooled tokens of each text, taken in fp32."""

    def __init__(self, *, hidden_size: int, chunk: Chunk) -> None:
        super().__init__()

    def forward(
        self, hidden: Tensor, batch: Batch, spans: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """hidden [s, b, h] -> fp32 [texts, h]."""
        return mean(*select(hidden, batch), num_texts(batch))


def select(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The pooled tokens [t, h] of hidden states [s, b, h], and the text of each, int64 [t]."""
    mask = pool_mask(batch)
    return hidden.transpose(0, 1)[mask], text_of(batch)[mask]


def mean(tokens: Tensor, text: Tensor, count: int) -> Tensor:
    """Tokens [t, h] of texts [t] -> their means, fp32 [count, h]; 0 of a text without tokens."""
    sums = tokens.new_zeros(count, tokens.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, text, tokens.float())
    sizes = torch.bincount(text, minlength=count).clamp(min=1)
    return sums / sizes[:, None]


class LatentAttention(MegatronModule):
    """Cross-attention of tokens to trained latents, a GEGLU MLP, then the mean.

    The tokens are the queries and the latents keys and values (the paper's figure 2 and the
    released code), so every token is treated alone: masked ones are left out beforehand, and keys
    and values are computed once a forward pass, whatever the batch. Heads are split over TP.

    Args:
        num_latents: rows of the latent array, drawn from N(0, 1).
        num_heads: heads; head_dim: width of each (None: hidden_size, as NV-Embed).
        ffn_hidden_size: width between the MLP's linears (None: 4 x hidden_size).
        init_method_std: of the linears' weights.
        hidden_size: of the language model.
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        ffn_hidden_size: int | None = None,
        layernorm_epsilon: float = 1e-5,
        init_method_std: float = 0.02,
        *,
        hidden_size: int,
        chunk: Chunk,
    ) -> None:
        head_dim, width = head_dim or hidden_size, ffn_hidden_size or 4 * hidden_size
        config = _config(chunk, hidden_size, num_heads, width, init_method_std, head_dim)
        super().__init__(config=config)
        self.head_dim = head_dim
        backend = backend_provider(chunk.backend)
        norm = functools.partial(backend.layer_norm(), config, hidden_size, layernorm_epsilon)
        device = default_device(config)
        self.latents = Parameter(
            torch.empty(num_latents, hidden_size, dtype=config.params_dtype, device=device)
        )
        Normal(1.0)(self.latents)
        self.norm_query, self.norm_latents, self.norm_mlp = norm(), norm(), norm()
        column = functools.partial(backend.column_parallel_linear(), gather_output=False)
        row = functools.partial(backend.row_parallel_linear(), input_is_parallel=True)
        options: Any = {
            "config": config,
            "init_method": config.init_method,
            "skip_bias_add": False,
            "is_expert": False,
        }
        inner = num_heads * head_dim
        self.linear_q = column(hidden_size, inner, bias=False, **options)
        self.linear_kv = column(hidden_size, 2 * inner, bias=False, **options)
        self.linear_proj = row(inner, hidden_size, bias=False, **options)
        self.linear_fc1 = column(hidden_size, 2 * width, bias=True, **options)
        self.linear_fc2 = row(width, hidden_size, bias=True, **options)

    def forward(
        self, hidden: Tensor, batch: Batch, spans: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """hidden [s, b, h] -> fp32 [texts, h]."""
        tokens, text = select(hidden, batch)
        if self.config.recompute_granularity is not None and torch.is_grad_enabled():
            # mcore's reentrant checkpoint gives no gradients behind an input that needs none.
            if not tokens.requires_grad:
                tokens = tokens.detach().requires_grad_()
            tokens = tensor_parallel.checkpoint(self.attend, False, tokens)
        else:
            tokens = self.attend(tokens)
        return mean(tokens, text, num_texts(batch))

    def attend(self, tokens: Tensor) -> Tensor:
        """Let each of the tokens [t, h] attend to the latents; the shape stays."""
        query, _ = self.linear_q(self.norm_query(tokens))
        key_value, _ = self.linear_kv(self.norm_latents(self.latents))
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1).unsqueeze(0)
            for x in (query, *key_value.chunk(2, dim=-1))
        )
        attended = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        tokens = tokens + self.linear_proj(attended)[0]
        value, gate = self.linear_fc1(self.norm_mlp(tokens))[0].chunk(2, dim=-1)
        return tokens + self.linear_fc2(value * F.gelu(gate))[0]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's, cut so that a rank holds a part of keys and values, of value and gate."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("linear_kv.weight", "linear_fc1.weight", "linear_fc1.bias"):
            key = f"{prefix}{name}"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class SelfAttention(MegatronModule):
    """One pre-norm layer of bidirectional self-attention and MLP, then the mean.

    NV-Embed compares with it in an ablation.

    num_heads: heads; ffn_hidden_size: of the MLP (None: 4 x hidden_size).
    """

    def __init__(
        self,
        num_heads: int = 8,
        ffn_hidden_size: int | None = None,
        init_method_std: float = 0.02,
        *,
        hidden_size: int,
        chunk: Chunk,
    ) -> None:
        width = ffn_hidden_size or 4 * hidden_size
        config = _config(chunk, hidden_size, num_heads, width, init_method_std, None)
        super().__init__(config=config)
        backend = backend_provider(chunk.backend)
        alone = own_group()
        self.block = TransformerBlock(
            config,
            block_spec(config, backend, layer_spec(config, backend, AttnMaskType.padding)),
            post_layer_norm=False,
            pg_collection=ProcessGroupCollection(
                tp=parallel_state.get_tensor_model_parallel_group(), pp=alone, cp=alone
            ),
        )

    def forward(
        self, hidden: Tensor, batch: Batch, spans: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """hidden [s, b, h] -> fp32 [texts, h]."""
        hidden = self.block(hidden, attention_mask=spans, packed_seq_params=packed)
        return mean(*select(hidden, batch), num_texts(batch))


def _config(
    chunk: Chunk,
    hidden_size: int,
    num_heads: int,
    ffn_hidden_size: int,
    init_method_std: float,
    kv_channels: int | None,
) -> TransformerConfig:
    """Return a layer's config: whole sequences on every rank, heads split over TP."""
    return chunk.encoder_config(
        functools.partial(
            TransformerConfig,
            num_layers=1,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            kv_channels=kv_channels,
            ffn_hidden_size=ffn_hidden_size,
            normalization="LayerNorm",
            attention_dropout=0.0,
            hidden_dropout=0.0,
            init_method_std=init_method_std,
        ),
        tensor_model_parallel_size=chunk.parallel.tensor_model_parallel_size,
    )
