"""Encoder, connector and language model, with media merged into the decoder's input: NVLM-D."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nvmm.batch import ATTENDED, IMAGE, Batch, Media
from nvmm.models.language import LanguageModel
from nvmm.modules.connector import MLPConnector
from nvmm.modules.encoders.vision import VisionTransformer
from nvmm.modules.flops import flops_per_step, segment_lengths
from nvmm.modules.lora import only_adapters_train
from nvmm.modules.merge import merge
from nvmm.parallel.setup import Chunk


class MultimodalModel(MegatronModule):
    """Decoder-only multimodal model (NVLM section 3.2.1).

    Encoder and connector are part of the first pipeline stage's first chunk; elsewhere they are
    None. The config is the language model's.

    Args:
        language: partial of LanguageModel, still without its chunk.
        vision: partial of VisionTransformer, still without its chunk.
        connector: partial of MLPConnector, still without sizes and chunk.
        chunk: which part of the model this rank builds.
    """

    extras: frozenset[str] = frozenset()

    def __init__(
        self,
        language: Callable[..., LanguageModel],
        vision: Callable[..., VisionTransformer],
        connector: Callable[..., MLPConnector],
        *,
        chunk: Chunk,
    ) -> None:
        language_model = language(chunk=chunk)
        super().__init__(config=language_model.config)
        self.language = language_model
        self.vision: VisionTransformer | None = None
        self.connector: MLPConnector | None = None
        if chunk.pre_process:
            self.vision = vision(chunk=chunk)
            self.connector = connector(
                input_size=self.vision.config.hidden_size,
                output_size=self.config.hidden_size,
                chunk=chunk,
            )
        # What mcore's schedules and gradient finalisation read from a model.
        self.model_type = language_model.model_type
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = (
            language_model.share_embeddings_and_output_weights
        )
        self.overlap_grad_reduce = chunk.parallel.overlap_grad_reduce

    @property
    def decoder(self) -> torch.nn.Module:
        """The language model's transformer block."""
        return self.language.decoder

    def flops(self, batch: Batch) -> dict[str, float]:
        """Model FLOPs of a micro-batch's forward and backward, {"language", "vision"}.

        Of the whole model, whatever the layout; known to the first stage's first chunk.
        """
        return flops_per_step(**self._flops_arguments(batch))

    def _flops_arguments(self, batch: Batch) -> dict[str, Any]:
        assert self.vision is not None and self.connector is not None
        vision = copy.copy(self.vision.config)
        vision.num_attention_heads = vision.num_query_groups = self.vision.num_attention_heads
        parts: dict[str, torch.nn.Module] = {
            "language": self.language,
            "vision": self.vision,
            "connector": self.connector,
        }
        return {
            "language": self.config,
            "vision": vision,
            "vocab_size": self.language.unpadded_vocab_size,
            "segment_lengths": segment_lengths(batch),
            "num_tiles": sum(media.values.shape[0] for media in batch.media.values()),
            "image_size": self.vision.image_size,
            "patch_size": self.vision.patch_size,
            "class_token": self.vision.class_token is not None,
            "downsample": self.connector.downsample,
            "connector_hidden_size": self.connector.hidden_size,
            "trained": [name for name, part in parts.items() if _is_trained(part)],
            "adapted": [name for name, part in parts.items() if only_adapters_train(part)],
        }

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive the previous stage's hidden states [s, b, h]."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The language model's tied embedding, on the first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def forward(
        self,
        batch: Batch,
        *,
        output: str = "loss",
        key_spans: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
    ) -> Tensor:
        """Run this chunk; arguments and result as LanguageModel's.

        `batch.media["image"]` holds the tiles, where the batch has any: decoding with a cache has
        them in its first step alone.
        """
        hidden = self.embed(batch) if self.pre_process else None
        return self.language(
            batch,
            output=output,
            hidden=hidden,
            key_spans=key_spans,
            inference_context=inference_context,
        )

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings [s, b, h] with the media at their placeholders; first stage only."""
        if ATTENDED in batch.media:
            raise ValueError(
                "the data leave tiles to cross-attention, and model._target_ has none: set"
                " data.train.build.attended=none, or use CrossAttendingModel"
            )
        media = batch.media.get(IMAGE)
        if media is None or media.values.shape[0] == 0:
            return self._without_media(self.language.embed(batch.tokens))
        return merge(self._words(batch, media), self._encode(media.values), media, batch)

    def _words(self, batch: Batch, media: Media) -> Tensor:
        """Embeddings [s, b, h]; the placeholder's id may lie outside the vocabulary."""
        words = batch.tokens.masked_fill(batch.tokens == media.placeholder_id, 0)
        return self.language.embed(words)

    def _encode(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, height, width] -> encoded, shuffled and projected, [n, tokens, h]."""
        assert self.vision is not None and self.connector is not None
        return self.connector(self.vision(tiles), self.vision.grid(tiles))

    def _without_media(self, hidden: Tensor) -> Tensor:
        """`hidden`, tied to the idle parameters where mcore waits for a gradient of each.

        With overlap_grad_reduce a bucket is reduced when all its parameters have a gradient in the
        last micro-batch; black tiles at weight 0 give them one. A frozen encoder does not run.
        """
        assert self.vision is not None and self.connector is not None
        if not (self.overlap_grad_reduce and self.training and torch.is_grad_enabled()):
            return hidden
        if not (_is_trained(self.vision) or _is_trained(self.connector)):
            return hidden
        size = self.vision.image_size
        tiles = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=hidden.device)
        grid = self.vision.grid(tiles)
        if _is_trained(self.vision):
            features = self.vision(tiles)
        else:
            features = hidden.new_zeros(1, grid[0] * grid[1], self.vision.config.hidden_size)
        return hidden + 0 * self.connector(features, grid).sum()


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
