"""Self-attention over the windows of sounds, between encoder and decoder (Audio Flamingo).

Audio Flamingo (arXiv:2402.01831) gives each window one vector of CLAP's, and lets three layers with
norms behind their branches look over a clip's windows before the decoder reads them. The windows of
a micro-batch are one packed list: nothing is padded to the most windows or the most clips.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.config.choices import require
from nvmm.modules.dense import LayerNorm, Linear
from nvmm.modules.flops import ATTENTION_COST, LINEAR_COST, Training
from nvmm.parallel.setup import Chunk

Scope = Literal["clip", "text"]
_LONGEST_WAVELENGTH = 10_000


class WindowTransformer(MegatronModule):
    """Layers over one vector a window: x + positions, a norm, then the layers.

    It is whole on every tensor-parallel rank, which all compute the same: input and output are
    whole, and so are the gradients.

    Args:
        num_layers, num_heads, head_size, ffn_size: of the layers; q, k, v and output have no bias.
        scope: the windows that see each other. clip: those of one clip, whose positions begin at
            0, so that no clip changes what is heard of another. text: those of all clips of one
            text, with positions that run on, as Audio Flamingo's released code has it; the silent
            windows that it fills up every text with, and attends to, are not there.
        windows_per_clip: positions that a clip takes in a text, with scope=text.
        attention_dropout: share of attention's weights that are left out in training; the released
            code of Audio Flamingo has 0.1, by its class's default alone.
        layernorm_epsilon: of all norms.
        init_method_std: of the linears.
        input_size: width of the windows' vectors; output_size: what the decoder reads, the same.
        chunk: which part of the model this rank builds.
    """

    reads_items = True
    """Its forward and flops take the clips that windows belong to."""

    def __init__(
        self,
        num_layers: int = 3,
        num_heads: int = 8,
        head_size: int = 128,
        ffn_size: int = 2048,
        scope: Scope = "clip",
        windows_per_clip: int = 16,
        attention_dropout: float = 0.0,
        layernorm_epsilon: float = 1e-6,
        init_method_std: float = 0.02,
        *,
        input_size: int,
        output_size: int,
        chunk: Chunk,
    ) -> None:
        require("model.encoders.audio.connector.scope", scope, Scope)
        if input_size != output_size:
            raise ValueError(
                f"model.cross_attention.kv_size={output_size} must be {input_size}, the width of"
                " the encoder's features: layers over windows change no width"
            )
        if not 0 <= attention_dropout < 1:
            raise ValueError(
                f"model.encoders.audio.connector.attention_dropout={attention_dropout} must be at"
                " least 0 and less than 1"
            )
        if input_size % 2:
            raise ValueError(
                f"features of width {input_size} must have an even width for positions"
            )
        config = chunk.encoder_config(
            functools.partial(
                TransformerConfig,
                num_layers=1,
                hidden_size=input_size,
                num_attention_heads=chunk.parallel.tensor_model_parallel_size,
                normalization="LayerNorm",
                init_method_std=init_method_std,
            )
        )
        super().__init__(config=config)
        self.scope = scope
        self.windows_per_clip = windows_per_clip
        self.num_heads, self.head_size = num_heads, head_size
        self.norm = LayerNorm(config, input_size, layernorm_epsilon)
        sizes = (input_size, num_heads, head_size, ffn_size, layernorm_epsilon)
        layers = [Layer(config, *sizes, dropout=attention_dropout) for _ in range(num_layers)]
        self.layers = torch.nn.ModuleList(layers)
        self.num_linear = sum(p.numel() for p in self.layers.parameters() if p.dim() == 2)

    def forward(
        self, features: Tensor, grid: tuple[int, int], items: Tensor | None = None
    ) -> Tensor:
        """Map features [n, 1, width] of n windows to the same shape.

        items: int64 [3, n], text, clip and place (from 1) of each window; None: one clip's.
        Raises ValueError for an encoder of several features a window.
        """
        if grid != (1, 1):
            raise ValueError(
                f"an encoder of {grid[0]} x {grid[1]} features a window has no layers over windows;"
                " they need one, as model.encoders.audio.encoder=htsat has it"
            )
        x = features[:, 0]
        text, clip, place = self._items(items, x)
        position = place + self.windows_per_clip * clip if self.scope == "text" else place
        x = x * math.sqrt(x.shape[-1]) + sinusoids(position, x.shape[-1]).to(x)
        x = self.norm(x)
        seen = self._seen(text, clip)
        for layer in self.layers:
            x = layer(x, seen)
        return x[:, None]

    def _items(self, items: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return text, clip and place from 0 of each window."""
        if items is None:
            place = torch.arange(len(x), device=x.device)
            return torch.zeros_like(place), torch.zeros_like(place), place
        text, clip, place = items.to(x.device)
        return text, clip, place - 1

    def _seen(self, text: Tensor, clip: Tensor) -> Tensor:
        """Return which windows each one sees, bool [n, n]."""
        seen = text[:, None] == text
        return seen & (clip[:, None] == clip) if self.scope == "clip" else seen

    def flops(
        self,
        num_tiles: int,
        grid: tuple[int, int],
        training: Training,
        items: Tensor | None = None,
    ) -> float:
        """Count matrix-multiply FLOPs over some windows; of attention, the pairs that see each
        other."""
        pairs = num_tiles**2
        if items is not None:
            pairs = int(self._seen(items[0], items[1]).sum())
        attention = 2.0 * len(self.layers) * pairs * self.num_heads * self.head_size
        linear = float(self.num_linear * num_tiles)
        return 2.0 * (linear * LINEAR_COST[training] + attention * ATTENTION_COST[training])


class Layer(torch.nn.Module):
    """norm(x + attention(x)), then norm(x + FFN(x)) with ReLU."""

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        num_heads: int,
        head_size: int,
        ffn_size: int,
        epsilon: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        inner = num_heads * head_size
        self.query = Linear(config, width, inner, bias=False)
        self.key = Linear(config, width, inner, bias=False)
        self.value = Linear(config, width, inner, bias=False)
        self.proj = Linear(config, inner, width, bias=False)
        self.attention_norm = LayerNorm(config, width, epsilon)
        self.fc1 = Linear(config, width, ffn_size)
        self.fc2 = Linear(config, ffn_size, width)
        self.ffn_norm = LayerNorm(config, width, epsilon)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Run x [n, width]; seen: bool [n, n]."""
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None]
            for part in (self.query, self.key, self.value)
        )
        # Tensor-parallel ranks, which hold the same windows, share the generator.
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        x = self.attention_norm(x + self.proj(out[0].transpose(0, 1).flatten(1)))
        return self.ffn_norm(x + self.fc2(self.fc1(x).relu()))


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Return sines at even and cosines at odd channels, fp32 [n, width] (Vaswani et al. 2017)."""
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() * _LONGEST_WAVELENGTH ** (-channels / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
