"""Rotary positions of the decoder: each token has its own angles, and one kernel applies them.

mcore's RotaryEmbedding gives the frequencies (base, percent, Llama 3's scaling, interpolation). The
rest is not mcore's: it would derive positions from shapes, walk packed segments one by one in every
layer, round cosines and sines to the model's dtype, and turn the whole KV cache again for each new
token. Here the angles follow from the batch's position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.kernels.rope import rope

REFUSED = ("rotary_interleaved", "fused_single_qkv_rope", "flash_decode")
"""Fields of TransformerConfig that would turn in another order, or in another place."""
_MASK_TYPE = 4
"""Place of the mask's type in what mcore's step returns."""


def rotation_table(embedding: RotaryEmbedding, position_ids: Tensor) -> Tensor:
    """Return cosines and sines of every token's angles, as `kernels.rope` takes them.

    position_ids: int64 [b, s].

    Returns: float32 [s, b, dim], dim being mcore's share of the head that turns.
    """
    frequencies = embedding.inv_freq.to(position_ids.device)
    positions = position_ids.t().to(frequencies.dtype)
    if embedding.seq_len_interpolation_factor is not None:
        positions = positions * (1 / embedding.seq_len_interpolation_factor)
    angles = positions.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class RotaryAttention(SelfAttention):
    """mcore's self-attention whose `rotary_pos_emb` is a `rotation_table`; None turns nothing.

    mcore hands that argument through the block, and through activation recompute, as it is. Queries
    and keys are turned after their norms and before the key goes into a cache.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED:
            if getattr(config, name):
                raise ValueError(
                    f"transformer.{name}={getattr(config, name)} must be false: queries and keys"
                    " are turned by nvmm.kernels.rope, in the rotate-half order"
                )
        super().__init__(config, submodules, *args, **kwargs)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Turn query [s, b, heads, d] and key [s, b, groups, d], then do mcore's step.

        mcore calls this between the projection and its own rotation, in training too; it is handed
        no rotation, so that it has nothing left to turn. Behind a cache it turns off the mask, as
        for one new token: several keep it, aligned with the last key.
        """
        if rotary_pos_emb is not None:
            query, key = rope(query, key, rotary_pos_emb[0])
        adjusted = list(
            super()._adjust_key_value_for_inference(
                inference_context, query, key, value, None, *args, **kwargs
            )
        )
        if inference_context is not None and len(query) > 1:
            if inference_context.sequence_len_offset > 0:
                adjusted[_MASK_TYPE] = AttnMaskType.causal_bottom_right
        return tuple(adjusted)
