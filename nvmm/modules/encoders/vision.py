"""Vision transformers on mcore's TransformerBlock: InternViT, and CLIP / SigLIP by config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.modules.encoders.base import Encoder, empty
from nvmm.modules.encoders.layers import QKNorm
from nvmm.modules.specs import backend_provider
from nvmm.parallel.setup import Chunk

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionTransformer(Encoder):
    """A bidirectional ViT over square patches of uint8 tiles.

    InternViT (NVLM section 3.1) is: class token first, learned absolute positions, pre-norm
    RMSNorm blocks with LayerScale, QKV without bias, QK-norm over all heads together, and no final
    norm. Its layout over ranks is Encoder's.

    Args:
        transformer: partial of mcore's TransformerConfig.
        image_size: native height and width in pixels; other sizes interpolate the positions. Of a
            size that is no multiple of patch_size, the pixels behind the last whole patch are
            dropped, as a convolution does (SigLIP-so400m/14 at 384: 27 x 27 patches of 378 pixels).
        patch_size: side of a patch in pixels.
        class_token: put a learned token first; drop_class_token: leave it out of the output.
        patch_bias: bias of the patch embedding.
        pre_layernorm: norm before the first layer (CLIP); post_layernorm: after the last (SigLIP).
        qk_norm: "joint" or None.
        layer_scale: initial LayerScale, None for none.
        image_mean, image_std: of pixels in [0, 1].
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        image_size: int,
        patch_size: int,
        class_token: bool = True,
        patch_bias: bool = True,
        pre_layernorm: bool = False,
        post_layernorm: bool = False,
        qk_norm: QKNorm | None = None,
        layer_scale: float | None = None,
        drop_class_token: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        *,
        chunk: Chunk,
    ) -> None:
        if image_size < patch_size:
            raise ValueError(
                f"model.vision.image_size={image_size} must be at least"
                f" model.vision.patch_size={patch_size}"
            )
        super().__init__(
            transformer,
            "vision",
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            post_layernorm=post_layernorm,
            chunk=chunk,
        )
        config = self.config
        self.image_size = image_size
        self.patch_size = patch_size
        self.drop_class_token = class_token and drop_class_token
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

        self.conv1 = PatchEmbedding(config, patch_size, patch_bias)
        if class_token:
            self.class_token = Parameter(empty(config, 1, 1, config.hidden_size))
            config.init_method(self.class_token)
        else:
            self.register_parameter("class_token", None)
        self.position_embeddings = PositionEmbedding(config, image_size // patch_size, class_token)
        self.ln_pre = None
        if pre_layernorm:
            norm = backend_provider(chunk.backend).layer_norm(config.normalization == "RMSNorm")
            self.ln_pre = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.mark_replicated()

    def grid(self, tiles: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches of tiles [n, 3, height, width].

        Raises ValueError when the patches do not cover tiles of another size than the native one.
        """
        height, width = tiles.shape[-2:]
        native = height == width == self.image_size
        if not native and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"tiles of {height} x {width} pixels must be a multiple of"
                f" model.vision.patch_size={self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    @property
    def num_extra_tokens(self) -> int:  # type: ignore[override]
        """The class token."""
        return int(self.class_token is not None)

    def blank(self, device: torch.device) -> Tensor:
        """Return one black tile."""
        shape = (1, 3, self.image_size, self.image_size)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def front_end_flops(self, tiles: Tensor) -> float:
        """Count the FLOPs of one tile's patch embedding."""
        rows, columns = self.grid(tiles)
        return 2.0 * 3 * self.patch_size**2 * self.config.hidden_size * rows * columns

    def encode(self, tiles: Tensor) -> Tensor:
        """Encode tiles, uint8 [n, 3, height, width], to [n, tokens, hidden_size].

        Tokens are row-major, after the class token where that is kept.
        """
        grid = self.grid(tiles)
        x = self.conv1(self._normalize(tiles))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position_embeddings(grid)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = self.transform(x)
        return x[:, 1:] if self.drop_class_token else x

    def _normalize(self, tiles: Tensor) -> Tensor:
        """Normalise uint8 pixels in fp32 and cast them to the parameters' dtype."""
        mean, std = (
            torch.tensor(x, device=tiles.device).view(3, 1, 1)
            for x in (self.image_mean, self.image_std)
        )
        return ((tiles.float() / 255 - mean) / std).to(self.config.params_dtype)


class PatchEmbedding(torch.nn.Module):
    """A convolution whose kernel equals its stride, as one matrix product.

    weight: [hidden_size, 3, patch_size, patch_size], bias: [hidden_size] or None.
    """

    def __init__(self, config: TransformerConfig, patch_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = Parameter(empty(config, config.hidden_size, 3, patch_size, patch_size))
        config.init_method(self.weight)
        if bias:
            self.bias = Parameter(empty(config, config.hidden_size).zero_())
        else:
            self.register_parameter("bias", None)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pixels [n, 3, height, width] as patches [n, patches, hidden_size], row-major.

        Pixels behind the last whole patch are dropped.
        """
        p = self.weight.shape[-1]
        n, channels, height, width = pixels.shape
        rows, columns = height // p, width // p
        whole = pixels[:, :, : rows * p, : columns * p]
        patches = whole.reshape(n, channels, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PositionEmbedding(torch.nn.Module):
    """Learned absolute positions of a square grid, interpolated to others.

    weight: [class token + side * side, hidden_size].
    """

    def __init__(self, config: TransformerConfig, side: int, class_token: bool) -> None:
        super().__init__()
        self.side = side
        self.num_class_tokens = int(class_token)
        self.weight = Parameter(
            empty(config, self.num_class_tokens + side * side, config.hidden_size)
        )
        config.init_method(self.weight)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return a grid's (rows, columns) positions, [class token + rows * columns, hidden_size].

        They are interpolated bicubically in fp32, but for the class token's row; the native grid's
        are the weight itself.
        """
        if grid == (self.side, self.side):
            return self.weight
        first, rest = self.weight.split([self.num_class_tokens, self.side * self.side])
        image = rest.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([first, image[0].flatten(1).t().to(self.weight.dtype)])
