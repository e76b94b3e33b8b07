"""HTS-AT, the Swin encoder of CLAP's audio branch, over log-mel windows: one vector a window.

Chen et al. 2022 (arXiv:2202.00874) fold a spectrogram of few bins and many frames into a square
picture, whose patches go through a Swin transformer (arXiv:2103.14030). LAION's CLAP and
Microsoft's (ClapCap) have the same encoder and another projection.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.config.choices import require
from nvmm.modules.dense import LayerNorm, Linear
from nvmm.modules.encoders.base import MediaEncoder, empty
from nvmm.modules.flops import ATTENTION_COST, LINEAR_COST, Training
from nvmm.parallel.setup import Chunk

Projection = Literal["none", "laion", "clapcap"]
_BLOCKED = -100.0
"""What is added to the scores of tokens that the cyclic shift made neighbours, as Swin has it."""


class HTSAT(MediaEncoder):
    """CLAP's audio encoder: log-mel windows to one vector each.

    Every tensor-parallel rank holds it whole and encodes a share of the windows, whatever
    `parallel.encoder` says: its heads number 4 to 32 and its layers are narrow. The norm over mel
    bins keeps its statistics, which are parameters that are never trained: CLAP is frozen in every
    stage of Audio Flamingo.

    Args:
        num_mel_bins: of the windows.
        picture: side of the square that a window is folded to; a multiple of num_mel_bins. Windows
            of fewer frames than picture^2 / num_mel_bins are stretched to that many.
        patch_size: side of a patch and step between patches.
        hidden_size: width of the first stage; each later one is twice as wide.
        depths, num_heads: layers and heads of the stages; each later one has half the side.
        window_size: side of the squares in which tokens attend; it divides every stage's side.
        ffn_ratio: width of a layer's MLP over that of the layer.
        qkv_bias: biases of queries, keys and values.
        layernorm_epsilon: of the layers' norms.
        projection: none; laion: linear, ReLU, linear; clapcap: linear, GELU, linear, added to the
            first linear's output, and a norm, without biases.
        projection_size: its width.
        init_method_std: of linears, patches and position biases.
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        num_mel_bins: int = 64,
        picture: int = 256,
        patch_size: int = 4,
        hidden_size: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 8,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        layernorm_epsilon: float = 1e-5,
        projection: Projection = "clapcap",
        projection_size: int = 1024,
        init_method_std: float = 0.02,
        *,
        chunk: Chunk,
    ) -> None:
        require("model.encoders.audio.encoder.projection", projection, Projection)
        _check(num_mel_bins, picture, patch_size, hidden_size, depths, num_heads, window_size)
        last = hidden_size * 2 ** (len(depths) - 1)
        config = chunk.encoder_config(
            functools.partial(
                TransformerConfig,
                num_layers=1,
                hidden_size=last if projection == "none" else projection_size,
                num_attention_heads=chunk.parallel.tensor_model_parallel_size,
                normalization="LayerNorm",
                init_method_std=init_method_std,
            )
        )
        super().__init__(config, chunk, whole=True)
        self.num_mel_bins = num_mel_bins
        self.fold = picture // num_mel_bins
        self.frames = picture * self.fold
        self.patch_size = patch_size
        self.bin_norm = StoredNorm(config, num_mel_bins)
        self.patches = Patches(config, hidden_size, patch_size)
        self.patch_norm = LayerNorm(config, hidden_size)
        stages = [
            Stage(
                config,
                hidden_size * 2**number,
                side=picture // patch_size // 2**number,
                depth=depth,
                num_heads=heads,
                window=window_size,
                ffn_size=int(ffn_ratio * hidden_size * 2**number),
                qkv_bias=qkv_bias,
                epsilon=layernorm_epsilon,
                merges=number < len(depths) - 1,
            )
            for number, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        ]
        self.stages = torch.nn.ModuleList(stages)
        self.flops_of_stages = [stage.multiplications() for stage in stages]
        self.norm = LayerNorm(config, last)
        self.projection: LaionProjection | ClapCapProjection | None = None
        if projection == "laion":
            self.projection = LaionProjection(config, last, projection_size)
        elif projection == "clapcap":
            self.projection = ClapCapProjection(config, last, projection_size)
        self.mark_replicated()

    def grid(self, media: Tensor) -> tuple[int, int]:
        """Return one feature a window."""
        return 1, 1

    def blank(self, device: torch.device) -> Tensor:
        """Return one silent window of full length."""
        return torch.zeros(1, self.num_mel_bins, self.frames, device=device)

    def flops(self, media: Tensor, training: Training) -> float:
        """Count matrix-multiply FLOPs of windows [n, ...], forward and backward of `training`."""
        tokens = self.frames * self.num_mel_bins // self.patch_size**2
        linear = tokens * self.patches.weight.numel()
        linear += sum(linear for linear, _ in self.flops_of_stages)
        attention = sum(attention for _, attention in self.flops_of_stages)
        if self.projection is not None:
            linear += sum(p.numel() for p in self.projection.parameters() if p.dim() == 2)
        cost = linear * LINEAR_COST[training] + attention * ATTENTION_COST[training]
        return 2.0 * cost * len(media)

    def encode(self, windows: Tensor) -> Tensor:
        """Encode log-mel windows [n, num_mel_bins, frames] to [n, 1, hidden_size].

        Raises ValueError for another number of bins and for too many frames.
        """
        if windows.shape[1] != self.num_mel_bins or windows.shape[2] > self.frames:
            raise ValueError(
                f"audio windows of {windows.shape[1]} bins x {windows.shape[2]} frames must have"
                f" model.encoders.audio.encoder.num_mel_bins={self.num_mel_bins} bins and at most"
                f" {self.frames} frames"
            )
        # 1. Bins get mean 0 and variance 1, in fp32: decibels need more than bf16's 8 bits.
        x = self.bin_norm(windows.float()).to(self.config.params_dtype)
        # 2. The picture [n, 1, side, side]: `fold` pieces of the time, one above the other.
        if x.shape[2] < self.frames:
            size = (self.num_mel_bins, self.frames)
            x = F.interpolate(x[:, None], size, mode="bicubic", align_corners=True)[:, 0]
        x = x.unflatten(2, (self.fold, -1)).transpose(1, 2).flatten(1, 2)[:, None]
        # 3. Patches [n, side, side, hidden_size], the stages, and the mean over all tokens.
        x = self.patch_norm(self.patches(x))
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x).mean((1, 2))
        return (x if self.projection is None else self.projection(x))[:, None]


def _check(
    num_mel_bins: int,
    picture: int,
    patch_size: int,
    hidden_size: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
) -> None:
    """Raise ValueError for sizes that do not fit each other."""
    at = "model.encoders.audio.encoder."
    if len(depths) != len(num_heads) or not depths or min(depths) < 1:
        raise ValueError(
            f"{at}depths={list(depths)} and num_heads={list(num_heads)} must be lists of one"
            " length, depths of at least 1"
        )
    if picture % num_mel_bins:
        raise ValueError(f"{at}picture={picture} must be a multiple of num_mel_bins={num_mel_bins}")
    smallest = patch_size * window_size * 2 ** (len(depths) - 1)
    if picture % smallest:
        raise ValueError(
            f"{at}picture={picture} must be a multiple of patch_size * window_size *"
            f" 2^(stages - 1) = {smallest}"
        )
    for number, heads in enumerate(num_heads):
        if hidden_size * 2**number % heads:
            raise ValueError(
                f"{at}num_heads={list(num_heads)}: {heads} must divide the stage's width"
                f" {hidden_size * 2**number}"
            )


class StoredNorm(torch.nn.Module):
    """Batch normalisation by stored statistics, which no batch changes.

    weight, bias: [size]. mean, variance: [size], not trained.
    """

    def __init__(self, config: TransformerConfig, size: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Parameter(empty(config, size).fill_(1.0))
        self.bias = Parameter(empty(config, size).zero_())
        self.mean = Parameter(empty(config, size).zero_(), requires_grad=False)
        self.variance = Parameter(empty(config, size).fill_(1.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [n, size, ...] in its own dtype."""
        mean, variance = self.mean.to(x.dtype), self.variance.to(x.dtype)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.epsilon)


class Patches(torch.nn.Module):
    """Patches of a picture of one channel, projected. weight: [hidden_size, patch^2]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = Parameter(empty(config, hidden_size, patch_size**2))
        config.init_method(self.weight)
        self.bias = Parameter(empty(config, hidden_size).zero_())

    def forward(self, x: Tensor) -> Tensor:
        """Project a picture [n, 1, h, w] to [n, h / patch, w / patch, hidden_size]."""
        p = self.patch_size
        weight = self.weight.view(-1, 1, p, p)
        return F.conv2d(x, weight, self.bias, stride=p).permute(0, 2, 3, 1)


class Stage(torch.nn.Module):
    """Layers of one width and side; behind all but the last stage four tokens become one."""

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        *,
        side: int,
        depth: int,
        num_heads: int,
        window: int,
        ffn_size: int,
        qkv_bias: bool,
        epsilon: float,
        merges: bool,
    ) -> None:
        super().__init__()
        self.side = side
        layers = [
            SwinLayer(
                config,
                width,
                num_heads=num_heads,
                window=window,
                # A picture of one window has nothing to shift.
                shift=window // 2 if number % 2 and side > window else 0,
                ffn_size=ffn_size,
                qkv_bias=qkv_bias,
                epsilon=epsilon,
            )
            for number in range(depth)
        ]
        self.layers = torch.nn.ModuleList(layers)
        self.num_linear = sum(
            part.weight.numel() for part in layers[0].children() if isinstance(part, Linear)
        )
        self.attended, self.width = window**2, width
        self.merge_norm = LayerNorm(config, 4 * width) if merges else None
        self.merge = Linear(config, 4 * width, 2 * width, bias=False) if merges else None

    def multiplications(self) -> tuple[int, int]:
        """Return the multiplications of linears and of attention for one picture."""
        tokens = self.side**2
        linear = tokens * len(self.layers) * self.num_linear
        attention = tokens * len(self.layers) * 2 * self.attended * self.width
        if self.merge is not None:
            linear += tokens // 4 * self.merge.weight.numel()
        return linear, attention

    def forward(self, x: Tensor) -> Tensor:
        """Run x [n, side, side, width]; the result has half the side and twice the width."""
        for layer in self.layers:
            x = layer(x)
        if self.merge is None or self.merge_norm is None:
            return x
        corners = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.merge(self.merge_norm(torch.cat(corners, dim=-1)))


class SwinLayer(torch.nn.Module):
    """A pre-norm layer whose tokens attend within windows, shifted in every second layer.

    position_bias: [(2 window - 1)^2, heads], added to the scores by relative row and column.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        *,
        num_heads: int,
        window: int,
        shift: int,
        ffn_size: int,
        qkv_bias: bool,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.input_norm = LayerNorm(config, width, epsilon)
        self.query = Linear(config, width, width, bias=qkv_bias)
        self.key = Linear(config, width, width, bias=qkv_bias)
        self.value = Linear(config, width, width, bias=qkv_bias)
        self.position_bias = Parameter(empty(config, (2 * window - 1) ** 2, num_heads))
        config.init_method(self.position_bias)
        self.proj = Linear(config, width, width)
        self.ffn_norm = LayerNorm(config, width, epsilon)
        self.fc1 = Linear(config, width, ffn_size)
        self.fc2 = Linear(config, ffn_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run x [n, side, side, width]; the shape stays."""
        x = x + self._attend(self.input_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        n, side = x.shape[:2]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        tiles = _windows(x, self.window)
        q, k, v = (
            part(tiles).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        index = relative_index(self.window).to(x.device)
        bias = self.position_bias[index].permute(2, 0, 1)[None]
        if self.shift:
            # [windows, heads, tokens, tokens], the same for every picture.
            bias = bias + shift_bias(side, self.window, self.shift).to(bias)[:, None]
            bias = bias.repeat(n, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = _picture(self.proj(out.transpose(1, 2).flatten(2)), side, self.window)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


def _windows(x: Tensor, window: int) -> Tensor:
    """Cut [n, side, side, c] into [n * windows, window^2, c]."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _picture(x: Tensor, side: int, window: int) -> Tensor:
    """Put windows [n * windows, window^2, c] together to [n, side, side, c]."""
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, side // window, side // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@functools.cache
def relative_index(window: int) -> Tensor:
    """Return the row of `position_bias` of each pair, int64 [window^2, window^2]."""
    places = torch.arange(window**2)
    rows, columns = places // window, places % window
    down = rows[:, None] - rows + window - 1
    across = columns[:, None] - columns + window - 1
    return down * (2 * window - 1) + across


@functools.cache
def shift_bias(side: int, window: int, shift: int) -> Tensor:
    """Return what keeps tokens apart that a shift made neighbours, [windows, tokens, tokens]."""
    place = torch.arange(side)
    band = (place >= side - window).long() + (place >= side - shift).long()
    region = (3 * band[:, None] + band)[None, :, :, None]
    region = _windows(region, window)[..., 0]
    return (region[:, :, None] != region[:, None]).float() * _BLOCKED


class LaionProjection(torch.nn.Module):
    """LAION-CLAP's: linear, ReLU, linear, with biases."""

    def __init__(self, config: TransformerConfig, input_size: int, size: int) -> None:
        super().__init__()
        self.linear1 = Linear(config, input_size, size)
        self.linear2 = Linear(config, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Project x [n, input] to [n, size]."""
        return self.linear2(self.linear1(x).relu())


class ClapCapProjection(torch.nn.Module):
    """Microsoft CLAP's: e = linear1(x), then norm(e + linear2(GELU(e))), without biases."""

    def __init__(self, config: TransformerConfig, input_size: int, size: int) -> None:
        super().__init__()
        self.linear1 = Linear(config, input_size, size, bias=False)
        self.linear2 = Linear(config, size, size, bias=False)
        self.layernorm = LayerNorm(config, size)

    def forward(self, x: Tensor) -> Tensor:
        """Project x [n, input] to [n, size]."""
        embedded = self.linear1(x)
        return self.layernorm(embedded + self.linear2(F.gelu(embedded)))
