"""Rotary positions of the decoder: each token has its own angles, and one kernel applies them.

mcore would derive positions from shapes, walk packed segments one by one in every layer, round
cosines and sines to the model's dtype, and turn the whole KV cache again for each new token. Here
the angles follow from the batch's position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.batch import Batch
from nvmm.kernels.rope import rope
from nvmm.modules.rope_scaling import Scaling, wavelengths
from nvmm.parallel import context_parallel

REFUSED = ("rotary_interleaved", "fused_single_qkv_rope", "flash_decode")
"""Fields of TransformerConfig that would turn in another order, or in another place."""
_MASK_TYPE = 4
"""Place of the mask's type in what mcore's step returns."""


class Rotary:
    """The angles by which a decoder turns queries and keys.

    Args:
        base: RoPE base period.
        dim: channels of a head that turn, the first ones.
        scaling: None for none.
    """

    def __init__(self, base: float, dim: int, scaling: Scaling | None = None) -> None:
        self.base = base
        self.dim = dim
        self.scaling = scaling
        # Computed on the CPU whatever the device, which may be "meta" while a model is built.
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._fixed: Tensor | None = None
        if scaling is None:
            self._fixed = 1.0 / wavelengths(base, dim)
        elif not scaling.by_length:
            self._fixed = scaling.frequencies(base, dim, nothing)

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Return radians per position, float32 [dim / 2], or [..., dim / 2] of lengths [...]."""
        if self._fixed is None:
            assert self.scaling is not None
            return self.scaling.frequencies(self.base, self.dim, lengths)
        self._fixed = self._fixed.to(lengths.device)
        return self._fixed

    def table(self, batch: Batch) -> Tensor:
        """Return cosines and sines of every token's angles, as `kernels.rope` takes them.

        batch: the whole micro-batch, of which `context_parallel.share` makes this rank's part.

        Returns: float32 [s / cp, b, dim].
        """
        positions = context_parallel.shard(batch.position_ids.t(), batch)
        lengths = positions
        if self._fixed is None:
            lengths = context_parallel.shard(token_lengths(batch).t(), batch)
        angles = positions.float().unsqueeze(-1) * self.frequencies(lengths)
        table = torch.cat([angles.cos(), angles.sin()], -1)
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        return table if magnitude == 1.0 else table * magnitude


def token_lengths(batch: Batch) -> Tensor:
    """Return the valid tokens of the row or packed segment that each token is in, int64 [b, s]."""
    if batch.cu_seqlens is None:
        return batch.lengths.long()[:, None].expand_as(batch.tokens)
    sizes = torch.diff(batch.cu_seqlens).long()
    return batch.lengths.long().repeat_interleave(sizes, output_size=batch.tokens.shape[1])[None]


class RotaryAttention(SelfAttention):
    """mcore's self-attention whose `rotary_pos_emb` is a `Rotary.table`; None turns nothing.

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
