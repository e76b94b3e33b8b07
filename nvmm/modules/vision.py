"""Vision transformers on mcore's TransformerBlock: InternViT, and CLIP / SigLIP by config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.modules.encoder import EncoderAttention, EncoderLayer, padded_heads
from nvmm.modules.specs import backend_provider, block_spec, layer_spec
from nvmm.parallel.groups import encoder_groups
from nvmm.parallel.setup import Chunk, default_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionTransformer(MegatronModule):
    """A bidirectional ViT over square patches of uint8 tiles.

    InternViT (NVLM section 3.1) is: class token first, learned absolute positions, pre-norm
    RMSNorm blocks with LayerScale, QKV without bias, QK-norm over all heads together, and no final
    norm.

    `parallel.encoder=replicated` keeps it whole on every tensor-parallel rank: each encodes a share
    of the tiles, and its parameters, marked `sum_gradients_over_tensor_parallel`, get partial
    gradients. `sharded` splits heads and MLP; heads are padded with zeros where they do not divide.
    Both have the same parameters in a checkpoint. Where no parameter is trained it runs without
    autograd.

    Args:
        transformer: partial of mcore's TransformerConfig.
        image_size: native height and width in pixels; other sizes interpolate the positions.
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
        qk_norm: str | None = None,
        layer_scale: float | None = None,
        drop_class_token: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        *,
        chunk: Chunk,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"model.vision.image_size={image_size} must be a multiple of"
                f" model.vision.patch_size={patch_size}"
            )
        config, num_heads = _config(transformer, chunk)
        super().__init__(config=config)
        groups = encoder_groups(chunk.parallel)
        self.tp_group = groups.tp
        self.model_tp_group = parallel_state.get_tensor_model_parallel_group()
        self.is_replicated = self.tp_group.size() < self.model_tp_group.size()
        self.num_attention_heads = num_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.drop_class_token = class_token and drop_class_token
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

        backend = backend_provider(chunk.backend)
        norm = backend.layer_norm(config.normalization == "RMSNorm")
        self.conv1 = PatchEmbedding(config, patch_size, patch_bias)
        if class_token:
            self.class_token = Parameter(_empty(config, 1, 1, config.hidden_size))
            config.init_method(self.class_token)
        else:
            self.register_parameter("class_token", None)
        self.position_embeddings = PositionEmbedding(config, image_size // patch_size, class_token)
        self.ln_pre = (
            norm(config, config.hidden_size, config.layernorm_epsilon) if pre_layernorm else None
        )
        layer = layer_spec(config, backend, AttnMaskType.no_mask, EncoderLayer, EncoderAttention)
        layer.params["layer_scale"] = layer_scale
        layer.submodules.self_attention.params |= {"num_heads": num_heads, "qk_norm": qk_norm}
        self.decoder = TransformerBlock(
            config,
            block_spec(config, backend, layer),
            post_layer_norm=post_layernorm,
            pg_collection=groups,
        )
        if self.is_replicated:
            for parameter in self.parameters():
                # mcore marks its linears as split even in a group of one.
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
                parameter.sum_gradients_over_tensor_parallel = True  # type: ignore[attr-defined]

    def grid(self, tiles: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of tiles [n, 3, height, width].

        Raises ValueError when the patches do not cover the tiles.
        """
        height, width = tiles.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"tiles of {height} x {width} pixels must be a multiple of"
                f" model.vision.patch_size={self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tiles: uint8 [n, 3, height, width], n > 0, the same on every tensor-parallel rank.

        Returns: [n, tokens, hidden_size] on every tensor-parallel rank; tokens row-major, after the
        class token where that is kept.
        """
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if not self.is_replicated:
                return self._encode(tiles)
            features = self._encode(self._share(tiles))
            # The connector's input gradient is whole on every rank: backward takes a part of it.
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                features, tensor_parallel_output_grad=False, group=self.model_tp_group
            )
            return gathered[: tiles.shape[0]]

    def _share(self, tiles: Tensor) -> Tensor:
        """This rank's tiles, as many on every rank; the last are black where they do not divide."""
        size, rank = self.model_tp_group.size(), self.model_tp_group.rank()
        count = -(-tiles.shape[0] // size)
        mine = tiles[rank * count : (rank + 1) * count]
        missing = count - mine.shape[0]
        return torch.cat([mine, mine.new_zeros(missing, *mine.shape[1:])]) if missing else mine

    def _encode(self, tiles: Tensor) -> Tensor:
        grid = self.grid(tiles)
        x = self.conv1(self._normalize(tiles))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position_embeddings(grid)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = x.transpose(0, 1).contiguous()
        recompute = self.config.recompute_granularity == "full" and self.training
        if recompute and torch.is_grad_enabled() and not x.requires_grad:
            # mcore's reentrant checkpoint gives no gradients behind an input that needs none.
            x = x.detach().requires_grad_()
        x = self.decoder(hidden_states=x, attention_mask=None)
        if self.drop_class_token:
            x = x[1:]
        return x.transpose(0, 1)

    def _normalize(self, tiles: Tensor) -> Tensor:
        """uint8 pixels -> the parameters' dtype, computed in fp32."""
        mean, std = (
            torch.tensor(x, device=tiles.device).view(3, 1, 1)
            for x in (self.image_mean, self.image_std)
        )
        return ((tiles.float() / 255 - mean) / std).to(self.config.params_dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """mcore's; a replicated encoder's entries name their true tensor-parallel rank."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_replicated:
            # Built in a group of one, every rank would claim to be the one that saves.
            rank = self.model_tp_group.rank()
            for entry in state.values():
                entry.replica_id = (*entry.replica_id[:-2], rank, entry.replica_id[-1])
        return state


def _config(transformer: Callable[..., Any], chunk: Chunk) -> tuple[TransformerConfig, int]:
    """The encoder's config, with heads padded to its tensor-parallel size, and its real heads."""
    given: dict[str, Any] = getattr(transformer, "keywords", {})
    num_heads = given["num_attention_heads"]
    groups = given.get("num_query_groups") or num_heads
    if groups != num_heads:
        raise ValueError(
            f"model.vision.transformer.num_query_groups={groups} must equal"
            f" num_attention_heads={num_heads}: an encoder has no grouped queries"
        )
    kv_channels = given.get("kv_channels") or given["hidden_size"] // num_heads
    sharded = chunk.parallel.encoder == "sharded"
    padded = padded_heads(num_heads, chunk.parallel.tensor_model_parallel_size if sharded else 1)
    config = chunk.encoder_config(
        transformer,
        num_attention_heads=padded,
        num_query_groups=padded,
        kv_channels=kv_channels,
    )
    for name in ("hidden_dropout", "attention_dropout"):
        if getattr(config, name) != 0:
            raise ValueError(f"model.vision.transformer.{name}={getattr(config, name)} must be 0.0")
    return config, num_heads


def _empty(config: TransformerConfig, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=config.params_dtype, device=default_device(config))


class PatchEmbedding(torch.nn.Module):
    """A convolution whose kernel equals its stride, as one matrix product.

    weight: [hidden_size, 3, patch_size, patch_size], bias: [hidden_size] or None.
    """

    def __init__(self, config: TransformerConfig, patch_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = Parameter(_empty(config, config.hidden_size, 3, patch_size, patch_size))
        config.init_method(self.weight)
        if bias:
            self.bias = Parameter(_empty(config, config.hidden_size).zero_())
        else:
            self.register_parameter("bias", None)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, height, width] -> [n, patches, hidden_size], row-major."""
        p = self.weight.shape[-1]
        n, channels, height, width = pixels.shape
        patches = pixels.view(n, channels, height // p, p, width // p, p)
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
            _empty(config, self.num_class_tokens + side * side, config.hidden_size)
        )
        config.init_method(self.weight)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """grid (rows, columns) -> [class token + rows * columns, hidden_size].

        Bicubic in fp32, the class token's row untouched; the identity at the native grid.
        """
        if grid == (self.side, self.side):
            return self.weight
        first, rest = self.weight.split([self.num_class_tokens, self.side * self.side])
        image = rest.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([first, image[0].flatten(1).t().to(self.weight.dtype)])
