"""NV-Embed for Transformers: copied into exported folders, where `trust_remote_code` runs it.

It uses nothing of nvmm. Without `pool_mask` the model returns a vector a token, which
sentence-transformers averages and normalises; with it, one unit vector a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class NVEmbedConfig(PretrainedConfig):
    """The config of an embedder.

    text_config: of the decoder; latent_attention_config: sizes, or None for plain pooling.
    """

    model_type = "nvembed"

    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        latent_attention_config: dict[str, Any] | None = None,
        causal: bool = False,
        instruction_masking: str = "sentence_transformers",
        hidden_size: int = 4096,
        max_position_embeddings: int = 4096,
        **kwargs: Any,
    ) -> None:
        self.text_config = text_config
        self.latent_attention_config = latent_attention_config
        self.causal = causal
        self.instruction_masking = instruction_masking
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class CrossAttention(nn.Module):
    """Attention of tokens to latents."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let x [b, s, h] attend to context [latents, h]; the shape stays."""
        q = self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim))
            for part in self.to_kv(context).chunk(2, dim=-1)
        )
        scores = torch.einsum("bshd,lhd->bhsl", q, k) / math.sqrt(self.head_dim)
        attended = torch.einsum("bhsl,lhd->bshd", scores.softmax(-1), v)
        return self.to_out(attended.flatten(2))


class GEGLU(nn.Module):
    """The product of the first half and gelu of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., 2 f] to [..., f]."""
        value, gate = x.chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)


class FeedForward(nn.Module):
    """An MLP of linear, GEGLU, linear."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(hidden_size, 2 * ffn_hidden_size),
            GEGLU(),
            nn.Linear(ffn_hidden_size, hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., h] to the same shape."""
        return self.net(x)


class PreNorm(nn.Module):
    """A module behind a LayerNorm, and one for its context where it has one."""

    def __init__(self, hidden_size: int, fn: nn.Module, context: bool) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(hidden_size)
        self.norm_context = nn.LayerNorm(hidden_size) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Call the module on normed inputs."""
        if self.norm_context is None:
            return self.fn(self.norm(x))
        return self.fn(self.norm(x), self.norm_context(context))


class LatentAttentionModel(nn.Module):
    """Cross-attention to latents and an MLP, each with a residual."""

    def __init__(self, hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(config["num_latents_value"], hidden_size))
        attention = CrossAttention(hidden_size, config["num_cross_heads"], config["cross_dim_head"])
        feed_forward = FeedForward(hidden_size, config["ffn_hidden_size"])
        self.cross_attend_blocks = nn.ModuleList(
            [
                PreNorm(hidden_size, attention, context=True),
                PreNorm(hidden_size, feed_forward, context=False),
            ]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens [b, s, h] to the same shape."""
        attend, feed_forward = self.cross_attend_blocks
        hidden = attend(hidden, self.latents) + hidden
        return feed_forward(hidden) + hidden


def decoder(text_config: dict[str, Any] | None) -> Any:
    """Build the decoder of a config.json's text_config, without an output layer."""
    fields = dict(text_config or {})
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModel.from_config(config, attn_implementation="sdpa")


def visible(attention_mask: Tensor, causal: bool) -> Tensor:
    """Return which keys a query sees, bool [b, 1, s, s], of the mask of tokens that are no padding.

    A row of padding sees the whole of itself: a soft-max over nothing is not a number.
    """
    size = attention_mask.shape[1]
    seen = attention_mask.bool()[:, None, None, :].expand(-1, 1, size, -1)
    if causal:
        seen = seen & torch.ones_like(seen).tril()
    return seen | ~seen.any(-1, keepdim=True)


def pooled(hidden: Tensor, pool_mask: Tensor) -> Tensor:
    """Return the unit vectors [b, h] of the means of a mask's [b, s] tokens of hidden [b, s, h]."""
    weights = pool_mask.to(hidden.dtype)[..., None]
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class NVEmbedModel(PreTrainedModel):
    """A decoder, bidirectional unless config.causal, and latent attention where it has one."""

    config_class = NVEmbedConfig

    def __init__(self, config: NVEmbedConfig) -> None:
        super().__init__(config)
        self.embedding_model = decoder(config.text_config)
        sizes = config.latent_attention_config
        self.latent_attention_model = (
            LatentAttentionModel(config.hidden_size, sizes) if sizes else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's input embeddings."""
        return self.embedding_model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """input_ids [b, s], padded on the right; masks [b, s].

        Returns last_hidden_state [b, s, h], and with pool_mask pooler_output [b, h], the unit
        vectors of its tokens' means.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.embedding_model(
            input_ids=input_ids,
            attention_mask=visible(attention_mask, self.config.causal),
            use_cache=False,
        ).last_hidden_state
        if self.latent_attention_model is not None:
            hidden = self.latent_attention_model(hidden)
        vectors = None if pool_mask is None else pooled(hidden, pool_mask)
        if not return_dict:
            return (hidden,) if vectors is None else (hidden, vectors)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=vectors)
