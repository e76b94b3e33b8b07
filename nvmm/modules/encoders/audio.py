"""An audio encoder on mcore's TransformerBlock: Whisper's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.modules.encoders.base import Encoder, empty
from nvmm.parallel.setup import Chunk

_LONGEST_WAVELENGTH = 10_000
_KERNEL = 3


class AudioEncoder(Encoder):
    """Whisper's encoder (Radford et al. 2022, section 2.2) over log-mel windows, and Audio Flamingo
    3's (arXiv:2507.08128), which is Whisper's with an average behind the last layer.

    Two convolutions of three frames with GELU, the second at stride 2, fixed sinusoidal positions,
    pre-norm LayerNorm blocks and a final norm. Its layout over ranks is Encoder's.

    The positions are a parameter that is never trained, so that a checkpoint holds them as the
    published models do. Adding a vector to all keys changes no softmax: a key bias, which Whisper
    does not have, changes nothing here whatever it holds.

    Args:
        transformer: partial of mcore's TransformerConfig.
        num_mel_bins: 80, or 128 from large-v3 on.
        max_source_positions: most tokens of a window, half its frames.
        pool: tokens that become their mean in front of the final norm; those of a last group that
            is not full are dropped. 1: Whisper, 2: Audio Flamingo 3; all of a window's: one feature
            a window, as layers over windows (`WindowTransformer`) take it.
        chunk: which part of the model this rank builds.
    """

    reads_extents = True

    def __init__(
        self,
        transformer: Callable[..., Any],
        num_mel_bins: int = 80,
        max_source_positions: int = 1500,
        pool: int = 1,
        *,
        chunk: Chunk,
    ) -> None:
        super().__init__(
            transformer,
            "audio",
            qk_norm=None,
            layer_scale=None,
            post_layernorm=True,
            chunk=chunk,
        )
        width = self.config.hidden_size
        if width % 2 or width < 4:
            raise ValueError(
                f"model.audio.transformer.hidden_size={width} must be even and at least 4: half of"
                " it are sines, half cosines"
            )
        if not 1 <= pool <= max_source_positions:
            raise ValueError(
                f"model.encoders.audio.encoder.pool={pool} must be in 1..max_source_positions="
                f"{max_source_positions}"
            )
        self.num_mel_bins = num_mel_bins
        self.max_source_positions = max_source_positions
        self.pool = pool
        if pool > 1:
            self.decoder.final_layernorm.register_forward_pre_hook(self._pooled)
        self.conv1 = Convolution(self.config, num_mel_bins, stride=1)
        self.conv2 = Convolution(self.config, width, stride=2)
        self.position_embeddings = SinusoidalPositions(self.config, max_source_positions)
        self.mark_replicated()

    def grid(self, windows: Tensor) -> tuple[int, int]:
        """Return one row of half as many tokens as frames, pooled."""
        return 1, self.num_tokens(windows) // self.pool

    def num_tokens(self, media: Tensor) -> int:
        """Return half as many tokens as frames."""
        return -(-media.shape[2] // 2)

    def num_features(self, extents: Tensor) -> Tensor:
        """Return the pooled tokens that are of frames of sound alone."""
        return (extents + 1) // 2 // self.pool

    def blank(self, device: torch.device) -> Tensor:
        """Return one silent window of full length."""
        shape = (1, self.num_mel_bins, 2 * self.max_source_positions)
        return torch.zeros(shape, device=device)

    def front_end_flops(self, windows: Tensor) -> float:
        """Count the FLOPs of one window's two convolutions."""
        width, frames = self.config.hidden_size, windows.shape[2]
        inner = self.num_mel_bins * frames + width * self.num_tokens(windows)
        return 2.0 * _KERNEL * width * inner

    def encode(self, windows: Tensor) -> Tensor:
        """Encode log-mel windows [n, num_mel_bins, frames] to features [n, tokens, hidden_size].

        tokens = ceil(frames / 2) // pool.
        """
        return self.transform(self._tokens(windows))

    def encode_parts(self, media: Tensor, extents: Tensor) -> Tensor:
        """Encode windows; no token attends to those behind the tokens of `extents` frames.

        The convolutions see all frames, as Audio Flamingo 3's do.
        """
        ends = (extents + 1) // 2
        spans = torch.stack([torch.zeros_like(ends), ends], dim=1)
        return self.transform(self._tokens(media), spans.to(torch.int32))

    def _tokens(self, windows: Tensor) -> Tensor:
        """Return the input of the layers [n, ceil(frames / 2), hidden_size].

        Raises ValueError for another number of bins and for windows longer than the positions.
        """
        bins, frames = windows.shape[1:]
        if bins != self.num_mel_bins or -(-frames // 2) > self.max_source_positions:
            raise ValueError(
                f"audio windows of {bins} bins x {frames} frames must have model.audio.num_mel_bins"
                f"={self.num_mel_bins} bins and at most 2 * model.audio.max_source_positions="
                f"{2 * self.max_source_positions} frames"
            )
        x = F.gelu(self.conv1(windows.to(self.config.params_dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        return x + self.position_embeddings.weight[: x.shape[1]]

    def _pooled(self, norm: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the final norm's input [tokens, n, hidden_size] with groups as their means."""
        [x] = inputs
        groups = x.shape[0] // self.pool
        return (x[: groups * self.pool].unflatten(0, (groups, self.pool)).mean(1),)


class Convolution(torch.nn.Module):
    """A 1-D convolution of three frames over all channels, with bias.

    weight: [hidden_size, input_size * 3], the three taps of a channel side by side.
    """

    def __init__(self, config: TransformerConfig, input_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = Parameter(empty(config, config.hidden_size, input_size * _KERNEL))
        config.init_method(self.weight)
        self.bias = Parameter(empty(config, config.hidden_size).zero_())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [n, input_size, frames] to [n, hidden_size, ceil(frames / stride)]."""
        weight = self.weight.unflatten(1, (-1, _KERNEL))
        return F.conv1d(x, weight, self.bias, stride=self.stride, padding=_KERNEL // 2)


class SinusoidalPositions(torch.nn.Module):
    """Sines, then cosines, of wavelengths from 2 pi to 2 pi * 10,000 (Vaswani et al. 2017).

    weight: [positions, hidden_size], not trained.
    """

    def __init__(self, config: TransformerConfig, positions: int) -> None:
        super().__init__()
        values = sinusoids(positions, config.hidden_size)
        weight = empty(config, positions, config.hidden_size)
        self.weight = Parameter(weight.copy_(values), requires_grad=False)


def sinusoids(positions: int, width: int) -> Tensor:
    """Return the sinusoidal positions, fp32 [positions, width]."""
    step = math.log(_LONGEST_WAVELENGTH) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2, dtype=torch.float32))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
