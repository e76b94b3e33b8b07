"""A decoder that gives a text n scores instead of logits: Nemotron-4-340B-Reward (2406.11704)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.batch import Batch
from nvmm.models.language import LanguageModel
from nvmm.modules.attention import visible_keys
from nvmm.modules.flops import LINEAR_COST, Training, language_flops, segment_lengths, sizes
from nvmm.modules.lora import only_adapters_train
from nvmm.modules.rope_scaling import Scaling
from nvmm.parallel import context_parallel
from nvmm.parallel.setup import Chunk, Normal, default_device


class RewardModel(LanguageModel):
    """LanguageModel without an output layer, and a head that scores each text at its last token.

    The last token is that of the mask (`Batch.lengths`), whatever its id. Global names are
    LanguageModel's, so that a decoder's checkpoint is its `init_from`; the head's is `head.weight`.
    As the language model of a MultimodalModel it scores texts with pictures.

    Args:
        transformer, vocab_size, padded_vocab_size, rotary_base, rotary_percent, rope_scaling,
            max_sequence_length: see LanguageModel.
        num_outputs: scores of a text (Nemotron-4-340B-Reward: 9).
        chunk: which part of the model this rank builds.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        vocab_size: int,
        padded_vocab_size: int,
        num_outputs: int,
        rotary_base: float = 10000,
        rotary_percent: float = 1.0,
        rope_scaling: Scaling | None = None,
        max_sequence_length: int = 4096,
        *,
        chunk: Chunk,
    ) -> None:
        if num_outputs < 1:
            raise ValueError(f"model.num_outputs={num_outputs} must be at least 1")
        super().__init__(
            transformer,
            vocab_size,
            padded_vocab_size,
            rotary_base=rotary_base,
            rotary_percent=rotary_percent,
            rope_scaling=rope_scaling,
            max_sequence_length=max_sequence_length,
            chunk=chunk,
        )
        self.num_outputs = num_outputs
        if self.post_process:
            del self.output_layer
            self.head = Head(num_outputs, config=self.config)

    def forward(self, batch: Batch, *, output: str = "score", **options: Any) -> Tensor:
        """Run this chunk.

        batch: one text a row or packed segment, padded on the right.
        output: the last stage's result: "score" (fp32, fp64 of a model in double precision;
            [texts, num_outputs], whole on every tensor- and context-parallel rank) or "hidden"
            (this rank's part of [s, b, h]).

        Returns: on the last stage as `output` says; else hidden states [s, b, h] for the next one.
        """
        if output not in ("score", "hidden"):
            raise ValueError(f"a reward model has scores, and no output {output!r}")
        hidden = super().forward(batch, output="hidden", **options)
        if not self.post_process or output == "hidden":
            return hidden
        # 1. Each rank has the last tokens that lie in its part of the sequence, zeros for others.
        texts = _at_last_token(hidden, batch, _columns(batch, self.config.sequence_parallel))
        # 2. Under sequence parallelism the sum is the whole: every rank then applies the head.
        if self.config.sequence_parallel:
            texts = reduce_from_tensor_model_parallel_region(texts, group=self.pg_collection.tp)
        scores = self.head(texts)
        # 3. A text's last token is on one context-parallel rank; the others add zeros.
        group = parallel_state.get_context_parallel_group()
        return context_parallel.gather(scores, group).sum(0) if group.size() > 1 else scores

    def count_flops(self, batch: Batch, training: Training) -> float:
        """Count model FLOPs of a micro-batch's forward and backward; the head is always trained."""
        head = 2.0 * self.config.hidden_size * self.num_outputs * batch.owners.numel()
        return head * LINEAR_COST["trained"] + language_flops(
            **sizes(self.config),
            vocab_size=0,
            segment_lengths=segment_lengths(batch),
            windows=visible_keys(self.config),
            # The head, which a LoRA run trains whole, is no reason for gradients of weights below.
            training="passed" if only_adapters_train(self.decoder) else training,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's for any module: the one for language models asks for an output layer."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


class Head(MegatronModule):
    """One linear without a bias, whole on every rank: no server of reward models has a bias."""

    def __init__(self, num_outputs: int, *, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = Parameter(
            torch.empty(
                num_outputs,
                config.hidden_size,
                dtype=config.params_dtype,
                device=default_device(config),
            )
        )
        Normal(config.init_method_std)(self.weight)

    def forward(self, texts: Tensor) -> Tensor:
        """Texts [texts, h] -> [texts, num_outputs], in fp32 at least."""
        dtype = torch.promote_types(texts.dtype, torch.float32)
        return F.linear(texts.to(dtype), self.weight.to(dtype))


def last_tokens(batch: Batch) -> Tensor:
    """Return the column of each text's last valid token, int64 [texts], by the mask."""
    texts = batch.owners.numel()
    last = batch.lengths[:texts].long() - 1
    return last if batch.cu_seqlens is None else last + batch.cu_seqlens[:texts].long()


def _columns(batch: Batch, sequence_parallel: bool) -> Tensor:
    """Return the columns of the batch that this rank's hidden states are of, int64 [positions]."""
    size, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    if size > 1:
        columns = context_parallel.positions(batch, size, rank)
    else:
        columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    if not sequence_parallel:
        return columns
    parts = columns.chunk(parallel_state.get_tensor_model_parallel_world_size())
    return parts[parallel_state.get_tensor_model_parallel_rank()]


def _at_last_token(hidden: Tensor, batch: Batch, columns: Tensor) -> Tensor:
    """Take hidden states [positions, b, h] of these columns at each text's last token: [texts, h].

    Those of texts whose last token is not among the columns are zeros.
    """
    held = columns == last_tokens(batch)[:, None]
    texts = torch.arange(len(held), device=hidden.device)
    rows = texts if batch.cu_seqlens is None else torch.zeros_like(texts)
    found = hidden[held.int().argmax(1), rows]
    return found.masked_fill(~held.any(1)[:, None], 0)
