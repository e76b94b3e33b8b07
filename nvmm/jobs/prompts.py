"""Prompts as a job's items: the samples of shards, or what a job makes of its own items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from nvmm.batch import Sample
from nvmm.data.samples.forms import Form
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from nvmm.inference.prefix import common_prefix
from nvmm.inference.restore import Restored
from nvmm.jobs.job import digest

_PASS = 64
"""Tokens that a batch costs besides its own, so that batches do not become tiny (our choice)."""


def open_shards(shards: str | Sequence[str], model: Restored) -> tuple[Dataset, str]:
    """Return the samples of shards, and a digest of them: their keys and sizes, shard by shard."""
    dataset = Dataset(shards, model.builder)
    return dataset, samples_digest(dataset)


def samples_digest(dataset: Dataset) -> str:
    """Return a digest of the samples of shards: their keys and sizes, shard by shard."""
    columns = dataset.index.columns
    keys = [dataset.index.key(number) for number in range(len(dataset))]
    sizes = (columns["stop"] - columns["start"]).tolist()
    return digest(keys, sizes)


def asking(model: Restored, form: Form, reserve: int = 0) -> InstructBuilder:
    """Return the builder of prompts from records of another form than that of training.

    reserve: tokens that a prompt leaves free for its answer.

    Raises ValueError for a checkpoint that was not trained on conversations.
    """
    model.require_answers()
    if not isinstance(model.builder, InstructBuilder):
        raise ValueError(
            f"{model.path} was trained by {type(model.builder).__name__}, and prompts of another"
            " form need an InstructBuilder"
        )
    return model.builder.asking(form=form, reserve=reserve)


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


def batches(
    samples: dict[int, Sample], size: int, *, share_prefix: bool = False
) -> list[list[int]]:
    """Return the numbers of the samples in batches; samples of like length share one.

    share_prefix: samples with the same beginning share one instead, so that the fewest tokens run
        when each batch runs what its samples have in common once.
    """
    if share_prefix:
        return _by_prefix(samples, size)
    order = sorted(samples, key=lambda number: (samples[number].num_tokens, number))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _by_prefix(samples: dict[int, Sample], size: int) -> list[list[int]]:
    """Sort by tokens, and cut that order where the fewest columns run, a pass counted as some."""
    order = sorted(samples, key=lambda number: (samples[number].text.tokens.tolist(), number))
    texts = [samples[number].text.tokens for number in order]
    alike = [0, *(common_prefix(*pair) for pair in pairwise(texts))]
    # best[n]: the fewest columns for the first n samples, and where the last batch of them begins.
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        choices: list[tuple[int, int]] = []
        shared, sizes = 0, []
        for start in range(stop - 1, max(stop - size, 0) - 1, -1):
            sizes.append(len(texts[start]))
            # What a prompt shares with all of a sorted run is the least of what neighbours share.
            shared = min(shared, alike[start + 1]) if len(sizes) > 1 else sizes[0]
            once = min(shared, min(sizes) - 1) if len(sizes) > 1 else 0
            columns = once + len(sizes) * (max(sizes) - once) + _PASS
            choices.append((best[start][0] + columns, start))
        best.append(min(choices))
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return [order[start:stop] for stop, start in reversed(list(pairwise(cuts)))]
