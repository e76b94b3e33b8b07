"""Keys and values of a prefix that prompts share, computed once and copied to every row's cache.

Prompts with the same beginning, such as a system message and passages before different questions,
run that beginning as one row. Its keys carry their positions already, so that they are right in the
cache of every row, wherever its padding ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.parallel import schedule


def common_prefix(first: Tensor, second: Tensor) -> int:
    """Return how many tokens two texts have in common at their beginning; tokens are [n]."""
    size = min(len(first), len(second))
    differ = (first[:size] != second[:size]).nonzero()
    return int(differ[0]) if len(differ) else size


def shared_tokens(prompts: Sequence[Sample]) -> int:
    """Return the tokens that all prompts begin with, fewer than the shortest prompt has.

    There are none with a single prompt, and none where a prompt has media: what a placeholder means
    is not in the tokens.
    """
    texts = [prompt.text for prompt in prompts]
    if len(texts) < 2 or any(text.media for text in texts):
        return 0
    shortest = min(len(text.tokens) for text in texts)
    return min(shortest - 1, *(common_prefix(texts[0].tokens, text.tokens) for text in texts[1:]))


def saved_tokens(prompts: Sequence[Sample]) -> list[int]:
    """Return how many tokens of each prompt are not run, because another prompt's are.

    The longest prompt pays for the prefix. A shorter one begins behind its padding, and what of the
    prefix lies in the columns behind the longest one's is run again.
    """
    length = shared_tokens(prompts)
    sizes = [prompt.num_tokens for prompt in prompts]
    longest = sizes.index(max(sizes))
    return [
        0 if number == longest else max(0, length - (max(sizes) - size))
        for number, size in enumerate(sizes)
    ]


def prefill(
    model: Sequence[Module],
    prompts: Sequence[Sample],
    batch: Batch,
    context: StaticInferenceContext,
) -> Batch:
    """Fill an empty cache with the prefix that prompts share; return the columns that remain.

    batch: the prompts, padded on the left. The cache's offset is moved behind the prefix.
    """
    length = shared_tokens(prompts)
    if not length:
        return batch
    firsts = (batch.tokens.shape[1] - batch.lengths).tolist()
    device = batch.tokens.device
    # 1. The prefix is a row of its own, with a cache of its own.
    tokens = prompts[0].text.tokens[:length]
    alone = collate([Sample((Text(tokens, torch.zeros(length)),))], pad_id=0, padding="left")
    source = StaticInferenceContext(1, length)
    schedule.outputs(
        model,
        [alone.to(device)],
        lambda chunk, row: chunk(row, output="logits", inference_context=source),
        keep=lambda value: value[:, -1],
    )
    # 2. Every row takes as much as lies before the columns that run next. Padding stays 0: it is
    # masked, but must be a number.
    for layer, memory in source.key_value_memory_dict.items():
        if isinstance(memory, tuple):
            context.key_value_memory_dict[layer] = tuple(
                _spread(values, firsts, context.max_sequence_length) for values in memory
            )
    context.sequence_len_offset = length
    return batch.replace(
        **{
            name: getattr(batch, name)[:, length:]
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
    )


def _spread(values: Tensor, firsts: Sequence[int], slots: int) -> Tensor:
    """Return a cache [slots, b, groups, d] with values [n, 1, groups, d] behind each padding."""
    length = len(values)
    cache: Any = values.new_zeros(slots, len(firsts), *values.shape[2:])
    for row, first in enumerate(firsts):
        if first < length:
            cache[first:length, row] = values[: length - first, 0]
    return cache
