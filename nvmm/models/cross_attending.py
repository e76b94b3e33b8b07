"""A decoder that reads media by gated cross-attention: NVLM-X, NVLM-H, Flamingo's kind.

One graph. What the sequence holds is the data's choice: nothing (X: every tile is attended), the
thumbnails at their placeholders (H: the regular tiles are attended, with their tags), or anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from nvmm.batch import ATTENDED, Batch, Media, MediaKind
from nvmm.models.language import LanguageModel
from nvmm.models.multimodal import MultimodalModel
from nvmm.modules.cross_attention import CrossAttention
from nvmm.modules.encoders.base import Encoder
from nvmm.modules.flops import Training, cross_attention_flops, segment_lengths
from nvmm.modules.lora import only_adapters_train
from nvmm.modules.merge import behind_tags
from nvmm.modules.spans import query_spans
from nvmm.parallel import context_parallel, payload
from nvmm.parallel.setup import Chunk

_BLOCK = re.compile(
    r"^(.*)language\.decoder\.layers\.(\d+)\.cross_attention(?:_block)?\.(.*)$", re.DOTALL
)


_BLOCK_NAMES = (".cross_attention", ".cross_attention_block")


class CrossAttendingModel(MultimodalModel):
    """Encoder, connector and a decoder with cross-attention (NVLM sections 3.3 and 3.4).

    The attended features are computed once, on the first stage, and travel behind the hidden
    states to the stages after it. Global names of the blocks are `cross_attention.layers.<n>.*`,
    so that `freeze: [language.*]` leaves them alone and the language model's are a plain one's.

    Args:
        language, vision, connector, encoders: as MultimodalModel's.
        cross_attention: the layers that attend, and the form of their blocks.
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        language: Callable[..., LanguageModel],
        cross_attention: CrossAttention,
        vision: Callable[..., Encoder] | None = None,
        connector: Callable[..., Any] | None = None,
        encoders: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
        *,
        chunk: Chunk,
    ) -> None:
        if (
            chunk.parallel.pipeline_model_parallel_size > 1
            and not chunk.parallel.variable_seq_lengths
        ):
            raise ValueError(
                "parallel.variable_seq_lengths=false must be true with cross-attention: what a"
                " stage sends depends on the micro-batch's number of tiles"
            )
        self.feature_size = cross_attention.kv_size
        super().__init__(
            functools.partial(language, cross_attention=cross_attention),
            vision,
            connector,
            encoders,
            chunk=chunk,
        )
        width = cross_attention.kv_size or 0
        if width > self.config.hidden_size:
            raise ValueError(
                f"model.cross_attention.kv_size={width} must be at most the decoder's hidden_size="
                f"{self.config.hidden_size}: stages send media and hidden states in one width"
            )
        self.cross_attention = cross_attention
        self.received: Tensor | None = None

    @property
    def reads(self) -> frozenset[MediaKind]:
        """Every modality that has an encoder, in the sequence or attended.

        Features of a width of their own (cross_attention.kv_size) are attended alone.
        """
        placed = frozenset() if self.feature_size else super().reads
        return placed | {MediaKind(modality, ATTENDED) for modality in self.modalities}

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive the previous stage's hidden states with the media behind them."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        batch: Batch,
        *,
        output: str = "loss",
        key_spans: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
    ) -> Tensor:
        """Run this chunk; arguments and result as MultimodalModel's.

        `batch.media` holds the attended media and those in the sequence. Before the
        last stage the result carries the attended media behind the hidden states.
        """
        # 1. words and placed media [s, b, h], and the keys of attended ones [m, b, h]: computed on
        #    the first stage, behind the hidden states on later ones
        attended = _attended(batch)
        if self.pre_process:
            hidden, keys = self._embed_and_attend(batch, attended)
        else:
            hidden, keys = None, self._receive(batch, attended)
        # 2. this stage's layers; each position sees its span of the keys
        hidden = self.language(
            batch,
            output=output,
            hidden=hidden,
            context=keys,
            context_spans=self._spans(batch, attended, inference_context),
            key_spans=key_spans,
            inference_context=inference_context,
        )
        assert hidden is not None
        # 3. the keys go on with the hidden states
        if self.post_process or keys is None:
            return hidden
        return payload.pack(hidden, {ATTENDED: keys})

    def _embed_and_attend(
        self, batch: Batch, attended: Media | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed the words with the placed media [s, b, h], and the attended media [m, b, h]."""
        batch.require(self.reads, f"model._target_={type(self).__name__}")
        kinds = {kind: media for kind, media in batch.media.items() if len(media.positions)}
        # 1. a modality's tiles go through its encoder and connector together, however placed:
        #    [n, tokens_per_item, h]
        features: dict[MediaKind, Tensor] = {}
        for modality in dict.fromkeys(kind.modality for kind in kinds):
            same_modality = [kind for kind in kinds if kind.modality == modality]
            # Placed tiles first: the sums of a batch's gradients depend on the order.
            same_modality.sort(key=lambda kind: kind.placement == ATTENDED)
            media = [kinds[kind] for kind in same_modality]
            encoded = self.encode(modality, media).split([len(m.values) for m in media])
            features |= dict(zip(same_modality, encoded, strict=True))
        # 2. words, and placed features among them: [s, b, h]
        placed = {kind: media for kind, media in kinds.items() if kind.placement != ATTENDED}
        hidden = self.place(batch, placed, features)
        if attended is None or not len(attended.positions):
            return hidden, None
        # 3. one list of keys, folded to the batch's width: [m, b, h], or a rank's part of it
        [kind] = [kind for kind in kinds if kind.placement == ATTENDED]
        keys = self._keys(features[kind], attended).to(hidden.dtype)
        b = hidden.shape[1]
        rows = self._rows(batch, attended)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, rows * b - keys.shape[0]))
        keys = keys.view(-1, b, keys.shape[-1])
        if self.config.sequence_parallel:
            keys = tensor_parallel.scatter_to_sequence_parallel_region(keys)
        return hidden, self.language.block_input(keys)

    def _keys(self, features: Tensor, media: Media) -> Tensor:
        """Put features [n, tokens_per_item, h] behind their tags' embeddings: [keys, h]."""
        if media.counts is not None:
            raise ValueError(
                "cross-attention reads as many features of every window;"
                " data.train.build.mask_padding must be false"
            )
        n, length = media.positions.numel(), media.tokens_per_item
        if tuple(features.shape[:2]) != (n, length):
            raise ValueError(
                f"the encoder and connector give {features.shape[0]} tiles x {features.shape[1]}"
                f" tokens, the batch has {n} attended tiles x {length}; the builder's"
                " tokens_per_tile must be the model's (grid / downsample)^2"
            )
        # Features of another width travel in the hidden states' width, with zeros behind.
        missing = self.config.hidden_size - features.shape[2]
        features = torch.nn.functional.pad(features, (0, missing)) if missing else features
        if media.tag_ids is None or media.tag_ids.numel() == 0:
            return features.flatten(0, 1)
        if self.feature_size:
            raise ValueError(
                f"model.cross_attention.kv_size={self.feature_size} must be null with tags among"
                " the keys, which have the decoder's width"
            )
        tags = self.language.embed(media.tag_ids[media.tag_ids >= 0][None])[:, 0]
        return behind_tags(features, tags, media)

    def _rows(self, batch: Batch, attended: Media | None) -> int:
        """Return m, the rows [m, b] that hold the micro-batch's keys; 0 without any."""
        if attended is None:
            return 0
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        unit = ranks * batch.tokens.shape[0]
        return -(-attended.num_keys // unit) * ranks

    def _receive(self, batch: Batch, attended: Media | None) -> Tensor | None:
        """Hand the hidden states that arrived to the decoder, and return the keys behind them."""
        assert self.received is not None
        rows = self._rows(batch, attended)
        if self.config.sequence_parallel:
            rows //= self.config.tensor_model_parallel_size
        hidden, tensors = payload.unpack(self.received, {ATTENDED: rows})
        self.language.set_input_tensor(hidden)
        self.received = None
        return tensors[ATTENDED] if rows else None

    def _spans(self, batch: Batch, attended: Media | None, inference_context: Any) -> Tensor | None:
        """Return the spans of this rank's positions, None without attended media.

        In decoding a new token has the span that words behind the prompt have.
        """
        sees = self.cross_attention.text_sees
        if inference_context is None:
            if attended is None:
                return None
            return context_parallel.shard(query_spans(attended, batch, sees), batch)
        memory = inference_context.key_value_memory_dict
        if attended is None:
            spans: Tensor | None = memory.get("cross_attention.spans")
            return spans
        with_next = query_spans(attended, batch, sees, num_following=1)
        memory["cross_attention.spans"] = with_next[-1:]
        return with_next[:-1]

    def payload_bytes(self, batch: Batch) -> tuple[int, int]:
        """Return the bytes of hidden states and of media that a stage sends for `batch`."""
        width = self.config.hidden_size * self.config.params_dtype.itemsize
        split = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        positions = batch.tokens.numel() // self.config.context_parallel_size
        media = self._rows(batch, _attended(batch)) * batch.tokens.shape[0]
        return positions * width // split, media * width // split

    def flops(self, batch: Batch) -> dict[str, float]:
        """Count FLOPs as MultimodalModel does; cross-attention counts as language."""
        attended = _attended(batch)
        if attended is None:
            return super().flops(batch)
        flops, reached = self._media_flops(batch)
        # 1. Gradients pass a part when something in front of it is trained; blocks count apart.
        blocks = [m for n, m in self.language.named_modules() if n.endswith(_BLOCK_NAMES)]
        in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
        trained = [p for p in self.language.parameters() if p.requires_grad]
        trains_blocks = any(id(parameter) in in_blocks for parameter in trained)
        trains_others = any(id(parameter) not in in_blocks for parameter in trained)
        language = _training(trains_others, reached or trains_blocks)
        cross = _training(trains_blocks, reached or trains_others)
        if only_adapters_train(self.language):
            language = cross = "passed"
        # 2. The pairs of queries and keys that see each other, from the spans.
        heads, groups, width = self.cross_attention.sizes(self.config)
        spans = query_spans(attended, batch, self.cross_attention.text_sees).long()
        flops["language"] = self.language.count_flops(batch, language) + cross_attention_flops(
            num_blocks=sum(map(self.cross_attention.is_at, range(self.config.num_layers))),
            hidden_size=self.config.hidden_size,
            kv_size=self.feature_size,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=width,
            ffn_hidden_size=self.cross_attention.ffn_hidden_size,
            gated_linear_unit=self.cross_attention.has_gated_linear_unit(self.config),
            num_queries=sum(segment_lengths(batch)),
            num_keys=attended.num_keys,
            num_pairs=int((spans[..., 1] - spans[..., 0]).sum()),
            training=cross,
        )
        return flops

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return mcore's, with the blocks under `cross_attention.layers.<n>`."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        for entry in state.values():
            if block := _BLOCK.match(entry.key):
                prefix, layer, name = block.groups()
                entry.key = f"{prefix}cross_attention.layers.{layer}.{name}"
        return state


def _training(trained: bool, behind: bool) -> Training:
    return "trained" if trained else "passed" if behind else "frozen"


def _attended(batch: Batch) -> Media | None:
    """Return the media that cross-attention reads, None without any.

    Raises ValueError for several modalities: a position sees one span of the list of keys.
    """
    kinds = [kind for kind in batch.media if kind.placement == ATTENDED]
    if len(kinds) > 1:
        raise ValueError(f"cross-attention reads one modality a micro-batch, got {kinds}")
    return batch.media[kinds[0]] if kinds else None
