"""Prompts as a job's items: the samples of shards, or what a job makes of its own items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nvmm.batch import Sample
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from nvmm.inference.restore import Restored
from nvmm.jobs.job import digest


def open_shards(shards: str | Sequence[str], model: Restored) -> tuple[Dataset, str]:
    """Return the samples of shards, and a digest of them: their keys and sizes, shard by shard."""
    dataset = Dataset(shards, model.builder)
    columns = dataset.index.columns
    keys = [dataset.index.key(number) for number in range(len(dataset))]
    sizes = (columns["stop"] - columns["start"]).tolist()
    return dataset, digest(keys, sizes)


def continuation_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of `job.continuations`.

    Raises ValueError for a continuation without tokens, and for two of the same tokens.
    """
    tokens = [tokenizer.encode(text) for text in texts]
    if not all(tokens) or len({tuple(ids) for ids in tokens}) < len(tokens) or not tokens:
        raise ValueError(
            f"job.continuations={list(texts)} must be different texts of at least one token each;"
            f" they are {tokens}"
        )
    return tokens


def build(
    members: Callable[[int], dict[str, Any]],
    numbers: Iterable[int],
    make: Callable[[dict[str, Any]], Sample],
    longest: int,
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Return (number -> sample, number -> what is wrong with it) of these items.

    members: of an item by number; a ValueError is what is wrong with it. longest: the most tokens
    that a text of a sample may have.
    """
    samples: dict[int, Sample] = {}
    errors: dict[int, str] = {}
    for number in numbers:
        try:
            sample = make(members(number))
        except ValueError as error:  # BadSample too
            errors[number] = str(error)
        else:
            tokens = max(len(text.tokens) for text in sample.texts)
            if tokens > longest:
                errors[number] = f"{sample.source}: {tokens} tokens, at most {longest}"
            else:
                samples[number] = dataclasses.replace(sample, sample_id=number)
    return samples, errors


def batches(samples: dict[int, Sample], size: int) -> list[list[int]]:
    """Return the numbers of the samples in batches; samples of like length share one."""
    order = sorted(samples, key=lambda number: (samples[number].num_tokens, number))
    return [order[start : start + size] for start in range(0, len(order), size)]
