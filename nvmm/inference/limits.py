"""What a model cannot decode or score: layouts, lengths, and caches whose angles would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module


def check_layout(model: Sequence[Module]) -> None:
    """Raise ValueError for a layout that cannot run one new token a step."""
    if len(model) != 1:
        raise ValueError(
            "parallel.virtual_pipeline_model_parallel_size must be null in generation, not"
            f" {len(model)}"
        )
    if model[0].training:
        raise ValueError("generate needs the model in eval mode")
    config: Any = model[0].config
    if config.sequence_parallel:
        raise ValueError("parallel.sequence_parallel must be false in generation (one new token)")
    if config.context_parallel_size > 1:
        raise ValueError(
            f"parallel.context_parallel_size={config.context_parallel_size} must be 1 in generation"
        )


def longest(model: Sequence[Module]) -> int:
    """Return the tokens of the model's longest sequence."""
    chunk: Any = model[0]
    return int(getattr(chunk, "language", chunk).max_sequence_length)


def check_length(
    model: Sequence[Module], tokens: int, samples: int | list[int], new_tokens: int = 0
) -> None:
    """Raise ValueError for a sequence that is longer than the model's longest."""
    limit = longest(model)
    if tokens + new_tokens > limit:
        answer = f" and max_new_tokens={new_tokens}" if new_tokens else ""
        raise ValueError(
            f"sample {samples}: {tokens} tokens{answer} are more than the model's"
            f" max_sequence_length={limit}"
        )


def check_cache(
    model: Sequence[Module], tokens: int, sample: int, new_tokens: int, first: int | None = None
) -> None:
    """Raise ValueError where keys of a cache would have other angles than without a cache.

    A RoPE scaling by the sequence's length gives all keys new angles as the sequence grows; those
    in a cache keep their old ones.

    tokens: of the whole prompt; new_tokens: the last one is never fed. first: tokens that are in
        the cache before the rest of the prompt runs; None where the prompt runs in one pass.
    """
    chunk: Any = model[0]
    rotary = getattr(chunk, "language", chunk).rotary
    start, last = tokens if first is None else first, tokens + new_tokens - 1
    way = "use_cache" if first is None else "share_prefix"
    if rotary is None or rotary.scaling is None:
        return
    if not rotary.scaling.is_constant(start, last):
        raise ValueError(
            f"sample {sample}: {type(rotary.scaling).__name__} scales RoPE by the length, which"
            f" grows from {start} to {last} tokens; a cache would keep the angles of the shorter"
            f" one, so {way} must be false"
        )
