"""Work on tokens that rank 0 orders and all ranks do: scoring and continuing given token ids.

Rank 0 calls `order`, the others `follow` until it calls `release`. Model-parallel ranks work
together; data-parallel ranks share the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nvmm.batch import Sample, Text
from nvmm.inference.decoding import gather, generate, share

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored


def order(
    model: Restored, kind: str, rows: Sequence[Any], options: Mapping[str, Any], batch_size: int
) -> list[Any]:
    """Have all ranks do work, called on rank 0; return the rows' results, in order.

    kind: `score` gives (log-probability, whether it is the likeliest) of (token ids, how many at
        the end are scored); `generate` gives the text that follows token ids, `options` being
        until, max_new_tokens and those of `nvmm.inference.decoding.generate`.
    batch_size: rows of a forward pass, on each data-parallel rank.
    """
    dist.broadcast_object_list([(kind, list(rows), dict(options), batch_size)], src=0)
    return _do(model, kind, rows, options, batch_size)


def follow(model: Restored) -> Any:
    """Do what rank 0's model is asked, on another rank, until `release`; return what that gives."""
    while True:
        order: list[Any] = [None]
        dist.broadcast_object_list(order, src=0)
        if order[0][0] == "end":
            return order[0][1]
        _do(model, *order[0])


def release(result: Any) -> None:
    """End the other ranks' `follow`, which returns `result` there."""
    dist.broadcast_object_list([("end", result)], src=0)


def _do(
    model: Restored, kind: str, rows: Sequence[Any], options: Mapping[str, Any], size: int
) -> list[Any]:
    """Do this rank's share of a portion of work, and gather all shares."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    mine = [rows[i] for i in share(len(rows), parallel_state.get_data_parallel_rank(), ranks)]
    results: list[Any] = []
    for start in range(0, len(mine), size):
        some = mine[start : start + size]
        if kind == "score":
            from nvmm.inference.likelihood import likelihoods

            results += likelihoods(model.model, some, model.tokenizer.pad_id)
        else:
            results += _texts(model, some, **options)
    return gather(results, len(rows))


def _texts(
    model: Restored,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """Return answers to prompts of token ids, in front of their stop strings."""
    words = model.tokenizer

    def ended(tokens: Sequence[int]) -> bool:
        """Return whether a stop string is there, whole; half a character is none yet."""
        text = words.decode(tokens)
        return any(stop in text for stop in until)

    answers = generate(
        model.model,
        [_sample(tokens) for tokens in prompts],
        max_new_tokens=max_new_tokens,
        stop_ids=model.stop_ids,
        pad_id=words.pad_id,
        ended=ended if until else None,
        **options,
    )
    return [cut(words.decode(ids), until) for ids in answers]


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings in it."""
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def _sample(tokens: Sequence[int]) -> Sample:
    """Return a prompt; a drawn answer depends on its tokens, whatever batch they are in."""
    ids = torch.tensor(tokens)
    number = hash(tuple(tokens)) & (2**62 - 1)  # hashes of numbers are the same everywhere
    return Sample((Text(ids, torch.zeros(len(tokens))),), number)
