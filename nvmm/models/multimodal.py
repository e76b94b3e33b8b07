"""Encoders, connectors and a language model, with media merged into its input: NVLM-D, MM-Embed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nvmm.batch import Batch, Media, MediaKind
from nvmm.models.language import LanguageModel
from nvmm.modules.encoders.base import Encoder
from nvmm.modules.flops import training_of
from nvmm.modules.merge import merge
from nvmm.parallel.setup import Chunk


class MultimodalModel(MegatronModule):
    """Decoder-only multimodal model (NVLM section 3.2.1).

    With an `EmbeddingModel` as its language model it is a multimodal embedder (MM-Embed,
    arXiv:2411.02571).

    Every modality has an encoder and a connector, which are part of the first pipeline stage's
    first chunk. The image's are called `vision` and `connector`, another modality's as it itself
    and `<modality>_connector`; their parameters' names begin so. The config is the language
    model's.

    Args:
        language: partial of LanguageModel, still without its chunk.
        vision: partial of VisionTransformer, still without its chunk; None: no images.
        connector: partial of MLPConnector, still without sizes and chunk.
        encoders: other modalities -> {"encoder": partial, "connector": partial}, as above.
        chunk: which part of the model this rank builds.

    Attributes:
        extras: the language model's.
        reads: the kinds of media that it takes; others are refused.
        encoders: modality -> (encoder, connector); empty on later stages and chunks.
    """

    extras: frozenset[str] = frozenset()
    feature_size: int | None = None
    """Width that connectors give out; None for the language model's."""

    def __init__(
        self,
        language: Callable[..., LanguageModel],
        vision: Callable[..., Encoder] | None = None,
        connector: Callable[..., Any] | None = None,
        encoders: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
        *,
        chunk: Chunk,
    ) -> None:
        language_model = language(chunk=chunk)
        super().__init__(config=language_model.config)
        self.language = language_model
        self.extras = language_model.extras
        partials = {m: (p["encoder"], p["connector"]) for m, p in (encoders or {}).items()}
        if vision is not None and connector is not None:
            partials = {"image": (vision, connector)} | partials
        elif vision is not None or connector is not None:
            raise ValueError("model.vision and model.connector must both be given, or neither")
        self.modalities = list(partials)
        for modality, (build_encoder, build_connector) in partials.items():
            first, second = _names(modality)
            setattr(self, first, None)
            setattr(self, second, None)
            if chunk.pre_process:
                encoder = build_encoder(chunk=chunk)
                setattr(self, first, encoder)
                sizes = {
                    "input_size": encoder.config.hidden_size,
                    "output_size": self.feature_size or self.config.hidden_size,
                }
                setattr(self, second, build_connector(**sizes, chunk=chunk))
        # mcore's schedules and gradient finalisation read these from a model.
        self.model_type = language_model.model_type
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = (
            language_model.share_embeddings_and_output_weights
        )
        self.overlap_grad_reduce = chunk.parallel.overlap_grad_reduce

    @property
    def reads(self) -> frozenset[MediaKind]:
        """Every modality that has an encoder, in the sequence."""
        return frozenset(MediaKind(modality) for modality in self.modalities)

    @property
    def encoders(self) -> dict[str, tuple[Any, Any]]:
        """Modality -> (encoder, connector), on the first stage's first chunk."""
        if not self.pre_process:
            return {}
        return {m: tuple(getattr(self, name) for name in _names(m)) for m in self.modalities}  # type: ignore[misc]

    @property
    def decoder(self) -> torch.nn.Module:
        """The language model's transformer block."""
        return self.language.decoder

    def flops(self, batch: Batch) -> dict[str, float]:
        """Count model FLOPs of a micro-batch's forward and backward: "language" and each modality.

        They are the whole model's, whatever the layout; the first stage's first chunk knows them.
        """
        flops, reached = self._media_flops(batch)
        training = training_of(self.language, behind=reached)
        flops["language"] = self.language.count_flops(batch, training)
        return flops

    def _media_flops(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """Count FLOPs of each modality; tell if gradients pass the language model to reach one."""
        flops = dict.fromkeys(self.modalities, 0.0)
        reached = False
        for modality, (encoder, connector) in self.encoders.items():
            for media in [m for kind, m in batch.media.items() if kind.modality == modality]:
                tiles = media.values
                if not len(tiles):
                    continue
                training = training_of(encoder, behind=False)
                flops[modality] += encoder.flops(tiles, training)
                training = training_of(connector, behind=training != "frozen")
                more = _items_for(connector, [media])
                flops[modality] += connector.flops(len(tiles), encoder.grid(tiles), training, *more)
                reached |= training != "frozen"
        return flops, reached

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive the previous stage's hidden states [s, b, h]."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the language model's tied embedding, on the first and last stage."""
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

        `batch.media` holds the tiles, where the batch has any: decoding with a cache has them in
        its first step alone.
        """
        # 1. words, and media at their placeholders: [s, b, h], on the first stage
        hidden = self.embed(batch) if self.pre_process else None
        # 2. this stage's layers, and on the last one the loss
        return self.language(
            batch,
            output=output,
            hidden=hidden,
            key_spans=key_spans,
            inference_context=inference_context,
        )

    def embed(self, batch: Batch) -> Tensor:
        """Embed the words, with the media at their placeholders: [s, b, h]; first stage only."""
        batch.require(self.reads, f"model._target_={type(self).__name__}")
        placed = {kind: media for kind, media in batch.media.items() if len(media.positions)}
        features = {kind: self.encode(kind.modality, [m]) for kind, m in placed.items()}
        return self.place(batch, placed, features)

    def place(
        self,
        batch: Batch,
        placed: Mapping[MediaKind, Media],
        features: Mapping[MediaKind, Tensor],
    ) -> Tensor:
        """Embed the words, with features at the placeholders of `placed`: [s, b, h].

        The parts of modalities that the batch lacks are kept in the graph (see `_idle`).
        """
        # A placeholder's id may lie outside the vocabulary.
        tokens = batch.tokens
        for media in placed.values():
            tokens = tokens.masked_fill(batch.tokens == media.placeholder_id, 0)
        hidden = self.language.embed(tokens)
        for kind, media in placed.items():
            hidden = merge(hidden, features[kind], media, batch)
        present = {kind.modality for kind, media in batch.media.items() if len(media.positions)}
        for modality in self.modalities:
            if modality not in present:
                hidden = self._idle(hidden, modality)
        return hidden

    def encode(self, modality: str, media: Sequence[Media]) -> Tensor:
        """Encode, shuffle and project the tiles of all `media` to features [n, tokens, h]."""
        encoder, connector = self.encoders[modality]
        tiles = torch.cat([m.values for m in media])
        features: Tensor = encoder(tiles, self._extents(encoder, media))
        out: Tensor = connector(features, encoder.grid(tiles), *_items_for(connector, media))
        return out

    def _extents(self, encoder: Any, media: Sequence[Media]) -> Tensor | None:
        """Return the frames of each tile that are looked at; None: all.

        Raises ValueError where the data count other features of them than the encoder.
        """
        if all(m.extents is None for m in media):
            return None
        extents = torch.cat(
            [
                torch.full_like(m.positions, m.values.shape[-1]) if m.extents is None else m.extents
                for m in media
            ]
        )
        counts = torch.cat([m.num_features for m in media])
        found = encoder.num_features(extents)
        if not torch.equal(found, counts):
            raise ValueError(
                f"windows of {extents.tolist()} frames of sound have {found.tolist()} features, and"
                f" the data {counts.tolist()} placeholders; data.train.build.tokens_per_window must"
                " be the encoder's"
            )
        return extents

    def _idle(self, hidden: Tensor, modality: str) -> Tensor:
        """Return `hidden`, tied to the idle parameters where mcore waits for a gradient of each.

        With overlap_grad_reduce a bucket is reduced when all its parameters have a gradient in the
        last micro-batch; a blank tile at weight 0 gives them one. A frozen encoder does not run.
        """
        if not (self.overlap_grad_reduce and self.training and torch.is_grad_enabled()):
            return hidden
        encoder, connector = self.encoders[modality]
        if not (_is_trained(encoder) or _is_trained(connector)):
            return hidden
        tiles = encoder.blank(hidden.device)
        grid = encoder.grid(tiles)
        if _is_trained(encoder):
            # In eval mode no FP8 history records the blank tile, which other layouts do not see.
            encoder.eval()
            features = encoder(tiles)
            encoder.train()
        else:
            features = hidden.new_zeros(1, grid[0] * grid[1], encoder.config.hidden_size)
        return hidden + 0 * connector(features, grid).sum()


def _names(modality: str) -> tuple[str, str]:
    """Return the attributes that hold a modality's encoder and connector."""
    if modality == "image":
        return "vision", "connector"
    return modality, f"{modality}_connector"


def _items_for(connector: Any, media: Sequence[Media]) -> list[Tensor]:
    """Return [text, item and place of each tile, int64 [3, n]] where a connector reads them."""
    if not getattr(connector, "reads_items", False):
        return []
    return [torch.cat([torch.stack([m.texts, m.items, m.tiles]) for m in media], dim=1)]


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
