"""The base of media encoders: a bidirectional block, whole or split over TP ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.modules.dense import empty as empty
from nvmm.modules.encoders.layers import EncoderAttention, EncoderLayer, QKNorm, padded_heads
from nvmm.modules.flops import Training, encoder_flops, sizes
from nvmm.modules.specs import backend_provider, block_spec, layer_spec
from nvmm.parallel.groups import encoder_groups
from nvmm.parallel.setup import Chunk

_WHOLE = "{} takes windows whole; data.train.build.mask_padding must be false"


class MediaEncoder(MegatronModule):
    """A part that turns media into features in front of the language model.

    It is split over tensor-parallel ranks, or whole on each of them: then each encodes a share of
    the media, and its parameters, marked `sum_gradients_over_tensor_parallel`, get partial
    gradients. Where no parameter is trained it runs without autograd.

    A subclass builds its layers, calls `mark_replicated`, and gives `encode`, `grid`, `blank` and
    `flops`.

    Args:
        config: its hidden_size is the features' width.
        chunk: which part of the model this rank builds.
        whole: whether ranks hold it whole whatever `parallel.encoder` says.
    """

    reads_extents = False
    """Whether it can leave out frames at the end of its inputs."""

    def __init__(self, config: TransformerConfig, chunk: Chunk, *, whole: bool = False) -> None:
        super().__init__(config=config)
        self.groups = encoder_groups(chunk.parallel)
        self.tp_group = self.groups.tp
        self.model_tp_group = parallel_state.get_tensor_model_parallel_group()
        size = self.model_tp_group.size()
        self.is_replicated = size > 1 if whole else self.tp_group.size() < size

    def mark_replicated(self) -> None:
        """Tell the gradients' reduction about parameters that are whole on every rank."""
        if not self.is_replicated:
            return
        for parameter in self.parameters():
            # mcore marks its linears as split even in a group of one.
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
            parameter.sum_gradients_over_tensor_parallel = True  # type: ignore[attr-defined]

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Encode media [n, ...] to features [n, tokens, hidden_size], without thought of TP."""

    def encode_parts(self, media: Tensor, extents: Tensor) -> Tensor:
        """Encode media as `encode` does, and look at the first `extents` frames of each alone.

        Raises ValueError where the encoder takes its inputs whole.
        """
        raise ValueError(_WHOLE.format(type(self).__name__))

    def num_features(self, extents: Tensor) -> Tensor:
        """Return how many features are of `extents` frames alone, int64 [n]; errors as above."""
        raise ValueError(_WHOLE.format(type(self).__name__))

    @abstractmethod
    def grid(self, media: Tensor) -> tuple[int, int]:
        """Return rows and columns of the features that media [n, ...] of this shape get."""

    @abstractmethod
    def blank(self, device: torch.device) -> Tensor:
        """Return one blank input [1, ...], for encoders that are idle in a micro-batch."""

    @abstractmethod
    def flops(self, media: Tensor, training: Training) -> float:
        """Count matrix-multiply FLOPs of media [n, ...], forward and the backward of `training`."""

    def forward(self, media: Tensor, extents: Tensor | None = None) -> Tensor:
        """Encode media [n, ...], n > 0, the same on every tensor-parallel rank.

        extents: int64 [n], frames of each input that are looked at; None: all.

        Returns: [n, tokens, hidden_size] on every tensor-parallel rank.
        """
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if not self.is_replicated:
                return self._encode(media, extents)
            shared = None if extents is None else self._share(extents)
            features = self._encode(self._share(media), shared)
            # The connector's input gradient is whole on every rank: backward takes a part of it.
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                features, tensor_parallel_output_grad=False, group=self.model_tp_group
            )
            return gathered[: media.shape[0]]

    def _encode(self, media: Tensor, extents: Tensor | None) -> Tensor:
        return self.encode(media) if extents is None else self.encode_parts(media, extents)

    def _share(self, media: Tensor) -> Tensor:
        """Return this rank's media, as many on every rank; zeros fill up the last shares."""
        size, rank = self.model_tp_group.size(), self.model_tp_group.rank()
        count = -(-media.shape[0] // size)
        share = media[rank * count : (rank + 1) * count]
        missing = count - share.shape[0]
        return torch.cat([share, share.new_zeros(missing, *share.shape[1:])]) if missing else share

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's; a replicated encoder's entries name their true tensor-parallel rank."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_replicated:
            # Built in a group of one, every rank would claim to be the one that saves.
            rank = self.model_tp_group.rank()
            for entry in state.values():
                entry.replica_id = (*entry.replica_id[:-2], rank, entry.replica_id[-1])
        return state


class Encoder(MediaEncoder):
    """A bidirectional pre-norm encoder in front of the language model.

    `parallel.encoder=replicated` keeps it whole on every tensor-parallel rank: each encodes a share
    of the media, and its parameters, marked `sum_gradients_over_tensor_parallel`, get partial
    gradients. `sharded` splits heads and MLP; heads are padded with zeros where they do not divide.
    Both have the same parameters in a checkpoint. Where no parameter is trained it runs without
    autograd.

    A subclass builds its front end, calls `mark_replicated`, and gives `encode`, `grid`,
    `blank` and `front_end_flops`.

    Args:
        transformer: partial of mcore's TransformerConfig.
        part: what the model calls this encoder, for errors (`model.<part>.transformer...`).
        qk_norm: "joint" or None.
        layer_scale: initial LayerScale, None for none.
        post_layernorm: norm after the last layer.
        chunk: which part of the model this rank builds.
    """

    num_extra_tokens = 0
    """Tokens of an input beside its grid's, such as a class token."""

    def __init__(
        self,
        transformer: Callable[..., Any],
        part: str,
        *,
        qk_norm: QKNorm | None,
        layer_scale: float | None,
        post_layernorm: bool,
        chunk: Chunk,
    ) -> None:
        config, num_heads = _config(transformer, part, chunk)
        super().__init__(config, chunk)
        self.num_attention_heads = num_heads
        self.input_needs_gradient = chunk.input_needs_gradient
        backend = backend_provider(chunk.backend)
        layer = layer_spec(config, backend, AttnMaskType.no_mask, EncoderLayer, EncoderAttention)
        layer.params["layer_scale"] = layer_scale
        layer.submodules.self_attention.params |= {"num_heads": num_heads, "qk_norm": qk_norm}
        self.decoder = TransformerBlock(
            config,
            block_spec(config, backend, layer),
            post_layer_norm=post_layernorm,
            pg_collection=self.groups,
        )

    def num_tokens(self, media: Tensor) -> int:
        """Return the tokens of one input that go through the layers."""
        rows, columns = self.grid(media)
        return rows * columns + self.num_extra_tokens

    @abstractmethod
    def front_end_flops(self, media: Tensor) -> float:
        """Count one input's forward FLOPs before the layers."""

    def flops(self, media: Tensor, training: Training) -> float:
        """Count matrix-multiply FLOPs of media [n, ...], forward and the backward of `training`."""
        heads = {"num_attention_heads": self.num_attention_heads}
        return encoder_flops(
            **(sizes(self.config) | heads | {"num_query_groups": self.num_attention_heads}),
            num_tokens=self.num_tokens(media),
            front_end=self.front_end_flops(media),
            num_tiles=len(media),
            training=training,
        )

    def transform(self, x: Tensor, spans: Tensor | None = None) -> Tensor:
        """Run the layers on x [n, tokens, hidden_size]; the shape stays.

        spans: int32 [n, 2], first and last + 1 of the tokens that are looked at; None: all.
        """
        x = x.transpose(0, 1).contiguous()
        needed = self.input_needs_gradient and self.training and torch.is_grad_enabled()
        if needed and not x.requires_grad:
            x = x.detach().requires_grad_()
        return self.decoder(hidden_states=x, attention_mask=spans).transpose(0, 1)


def _config(
    transformer: Callable[..., Any], part: str, chunk: Chunk
) -> tuple[TransformerConfig, int]:
    """Return the encoder's config, with heads padded to its TP size, and its real heads."""
    fields: dict[str, Any] = getattr(transformer, "keywords", {})
    num_heads = fields["num_attention_heads"]
    groups = fields.get("num_query_groups") or num_heads
    if groups != num_heads:
        raise ValueError(
            f"model.{part}.transformer.num_query_groups={groups} must equal"
            f" num_attention_heads={num_heads}: an encoder has no grouped queries"
        )
    kv_channels = fields.get("kv_channels") or fields["hidden_size"] // num_heads
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
            raise ValueError(f"model.{part}.transformer.{name}={getattr(config, name)} must be 0.0")
    return config, num_heads
