"""A decoder that reads media by gated cross-attention: NVLM-X, NVLM-H, Flamingo's kind.

One graph. What the sequence holds is the data's choice: nothing (X: every tile is attended), the
thumbnails at their placeholders (H: the regular tiles are attended, with their tags), or anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from nvmm.batch import ATTENDED, IMAGE, Batch, Media
from nvmm.models.language import LanguageModel
from nvmm.models.multimodal import MultimodalModel
from nvmm.modules.connector import MLPConnector
from nvmm.modules.cross_attention import CrossAttention
from nvmm.modules.encoders.vision import VisionTransformer
from nvmm.modules.flops import flops_per_step
from nvmm.modules.merge import behind_tags, merge
from nvmm.modules.spans import query_spans
from nvmm.parallel import context_parallel, payload
from nvmm.parallel.setup import Chunk

_BLOCK = re.compile(
    r"^(.*)language\.decoder\.layers\.(\d+)\.cross_attention(?:_block)?\.(.*)$", re.DOTALL
)


class CrossAttendingModel(MultimodalModel):
    """Encoder, connector and a decoder with cross-attention (NVLM sections 3.3 and 3.4).

    The attended features are computed once, on the first stage, and travel behind the hidden
    states to the stages after it. Global names of the blocks are `cross_attention.layers.<n>.*`,
    so that `freeze: [language.*]` leaves them alone and the language model's are a plain one's.

    Args:
        language, vision, connector: as MultimodalModel's.
        cross_attention: which layers attend, and how.
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        language: Callable[..., LanguageModel],
        vision: Callable[..., VisionTransformer],
        connector: Callable[..., MLPConnector],
        cross_attention: CrossAttention,
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
        super().__init__(
            functools.partial(language, cross_attention=cross_attention),
            vision,
            connector,
            chunk=chunk,
        )
        self.cross_attention = cross_attention
        self.received: Tensor | None = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive what the previous stage sent: hidden states with the media behind them."""
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

        `batch.media[ATTENDED]` holds what cross-attention reads, `batch.media[IMAGE]` what stands
        in the sequence. Before the last stage the result carries the attended media behind the
        hidden states.
        """
        hidden, media = self._enter(batch) if self.pre_process else (None, self._receive(batch))
        hidden = self.language(
            batch,
            output=output,
            hidden=hidden,
            context=media,
            context_spans=self._spans(batch, inference_context),
            key_spans=key_spans,
            inference_context=inference_context,
        )
        assert hidden is not None
        if self.post_process or media is None:
            return hidden
        return payload.pack(hidden, {ATTENDED: media})

    def _enter(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Embeddings [s, b, h] with the placed media, and the attended ones [m, b, h]."""
        placed, attended = (_some(batch.media.get(kind)) for kind in (IMAGE, ATTENDED))
        if placed is None and attended is None:
            return self._without_media(self.language.embed(batch.tokens)), None
        # 1. both kinds through one encoder and one projector: [n, tokens_per_item, h]
        tiles = [media.values for media in (placed, attended) if media is not None]
        count = 0 if placed is None else placed.values.shape[0]
        features = self._encode(torch.cat(tiles))
        # 2. words, and placed features among them: [s, b, h]
        if placed is None:
            hidden = self.language.embed(batch.tokens)
        else:
            hidden = merge(self._words(batch, placed), features[:count], placed, batch)
        if attended is None:
            return hidden, None
        # 3. one list of keys, folded to the batch's width: [m, b, h], or a rank's part of it
        keys = self._keys(features[count:], attended).to(hidden.dtype)
        b = hidden.shape[1]
        keys = torch.nn.functional.pad(keys, (0, 0, 0, self._rows(batch) * b - keys.shape[0]))
        keys = keys.view(-1, b, keys.shape[-1])
        if self.config.sequence_parallel:
            keys = tensor_parallel.scatter_to_sequence_parallel_region(keys)
        return hidden, keys

    def _keys(self, features: Tensor, media: Media) -> Tensor:
        """Features [n, tokens_per_item, h], each tile's behind its tag's embeddings: [keys, h]."""
        n, length = media.positions.numel(), media.tokens_per_item
        if tuple(features.shape[:2]) != (n, length):
            raise ValueError(
                f"the encoder and connector give {features.shape[0]} tiles x {features.shape[1]}"
                f" tokens, the batch has {n} attended tiles x {length}; the builder's"
                " tokens_per_tile must be the model's (grid / downsample)^2"
            )
        if media.tag_ids is None or media.tag_ids.numel() == 0:
            return features.flatten(0, 1)
        tags = self.language.embed(media.tag_ids[media.tag_ids >= 0][None])[:, 0]
        return behind_tags(features, tags, media)

    def _rows(self, batch: Batch) -> int:
        """Rows [m, b] that hold the micro-batch's keys; 0 without any."""
        media = batch.media.get(ATTENDED)
        if media is None:
            return 0
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        unit = ranks * batch.tokens.shape[0]
        return -(-media.num_keys // unit) * ranks

    def _receive(self, batch: Batch) -> Tensor | None:
        """Hand the hidden states that arrived to the decoder, and return the media behind them."""
        assert self.received is not None
        rows = self._rows(batch)
        if self.config.sequence_parallel:
            rows //= self.config.tensor_model_parallel_size
        hidden, tensors = payload.unpack(self.received, {ATTENDED: rows})
        self.language.set_input_tensor(hidden)
        self.received = None
        return tensors[ATTENDED] if rows else None

    def _spans(self, batch: Batch, inference_context: Any) -> Tensor | None:
        """What this rank's positions see; in decoding, what the last prompt position's text saw."""
        media = batch.media.get(ATTENDED)
        sees = self.cross_attention.text_sees
        if inference_context is None:
            if media is None:
                return None
            return context_parallel.shard(query_spans(media, batch, sees), batch)
        memory = inference_context.key_value_memory_dict
        if media is None:
            spans: Tensor | None = memory.get("cross_attention.spans")
            return spans
        whole = query_spans(media, batch, sees, num_following=1)
        memory["cross_attention.spans"] = whole[-1:]
        return whole[:-1]

    def payload_bytes(self, batch: Batch) -> tuple[int, int]:
        """Bytes of hidden states and of media that a stage of this layout sends for `batch`."""
        width = self.config.hidden_size * self.config.params_dtype.itemsize
        split = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        positions = batch.tokens.numel() // self.config.context_parallel_size
        media = self._rows(batch) * batch.tokens.shape[0]
        return positions * width // split, media * width // split

    def flops(self, batch: Batch) -> dict[str, float]:
        """As MultimodalModel's; cross-attention counts as language."""
        arguments = self._flops_arguments(batch)
        media = batch.media.get(ATTENDED)
        if media is None:
            return flops_per_step(**arguments)
        heads, groups, width = self.cross_attention.sizes(self.config)
        spans = query_spans(media, batch, self.cross_attention.text_sees).long()
        parts = {
            "cross_attention" if ".cross_attention" in name else "language"
            for name, parameter in self.language.named_parameters()
            if parameter.requires_grad
        }
        arguments["trained"] = parts | (set(arguments["trained"]) - {"language"})
        if "language" in arguments["adapted"]:
            arguments["adapted"].append("cross_attention")
        return flops_per_step(
            **arguments,
            cross_attention={
                "num_blocks": sum(map(self.cross_attention.is_at, range(self.config.num_layers))),
                "num_attention_heads": heads,
                "num_query_groups": groups,
                "kv_channels": width,
                "ffn_hidden_size": self.cross_attention.ffn_hidden_size,
                "num_keys": media.num_keys,
                "num_pairs": int((spans[..., 1] - spans[..., 0]).sum()),
            },
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """mcore's, with the blocks under `cross_attention.layers.<n>`."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        for entry in state.values():
            found = _BLOCK.match(entry.key)
            if found:
                prefix, layer, name = found.groups()
                entry.key = f"{prefix}cross_attention.layers.{layer}.{name}"
        return state


def _some(media: Media | None) -> Media | None:
    return media if media is not None and media.positions.numel() else None
