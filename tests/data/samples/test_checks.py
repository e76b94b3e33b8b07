"""Samples that a builder must not hand to training, each refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE, Sample, Text, TextMedia
from nvmm.data.loader import Data
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset

PLACEHOLDER = 90
MEDIA = TextMedia(
    values=torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
    positions=torch.tensor([1, 4]),
    items=torch.tensor([0, 0]),
    tiles=torch.tensor([1, 0]),
    placeholder_id=PLACEHOLDER,
    tokens_per_item=2,
)
TEXT = Text(
    tokens=torch.tensor([5, PLACEHOLDER, PLACEHOLDER, 6, PLACEHOLDER, PLACEHOLDER, 7, 8]),
    weights=torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1]),
    media={IMAGE: MEDIA},
)
GOOD = Sample((TEXT,), sample_id=3, source="a.tar:k7")


def changed(**changes: Any) -> Sample:
    return replace(GOOD, texts=(replace(TEXT, **changes),))


def short(size: int) -> Sample:
    """GOOD cut after `size` tokens, its last one supervised."""
    mask = torch.zeros(size)
    mask[-1] = 1
    return changed(tokens=TEXT.tokens[:size], weights=mask)


def with_tokens(*changes: tuple[int, int]) -> Sample:
    tokens = TEXT.tokens.clone()
    for place, token in changes:
        tokens[place] = token
    return changed(tokens=tokens)


BAD = {
    "no supervised token": changed(weights=torch.zeros(8)),
    "no supervised token; its answer": changed(weights=torch.eye(8)[0]),
    "5 placeholders (id 90) for 4 image features (2 tiles x 2)": with_tokens((6, PLACEHOLDER)),
    "3 placeholders (id 90) for 4 image features": with_tokens((5, 9)),
    "truncated media span: image placeholders 4..5, the text ends after 5": short(5),
    "image tile 1 has other tokens among its placeholders 4..5": with_tokens(
        (5, 9), (6, PLACEHOLDER)
    ),
    "7 weights in the loss mask for 8 tokens": changed(weights=torch.ones(7)),
}


@pytest.mark.parametrize("message", BAD)
def test_refused_with_shard_key_and_number(message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_sample(BAD[message])
    assert str(error.value).startswith("a.tar:k7 (sample 3): ")
    assert message in str(error.value)


def test_good_samples_pass() -> None:
    check_sample(GOOD)
    check_sample(short(7))
    check_sample(changed(tokens=torch.arange(8), media={}))
    # Of several texts one must have something to learn from.
    silent = replace(TEXT, weights=torch.zeros(8))
    check_sample(replace(GOOD, texts=(silent, TEXT)))
    with pytest.raises(ValueError, match="no supervised token"):
        check_sample(replace(GOOD, texts=(silent, silent)))


class Spoiling(Builder):
    """A user's builder that spoils one sample of a shard."""

    bad = BAD["no supervised token"]

    def __call__(self, members: dict[str, Any]) -> Sample:
        source = f"{members['__url__']}:{members['__key__']}"
        chosen = self.bad if members["__key__"].endswith("2") else GOOD
        return replace(chosen, source=source)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_loader_refuses_what_any_builder_makes(
    make_shards: Callable[..., str], tiny: Tokenizer, split: str
) -> None:
    shards = make_shards(4)
    dataset = Dataset(shards, Spoiling)
    data = Data(64, 0, dataset, Dataset(shards, Spoiling), on_error="stop", tokenizer=tiny, seed=7)
    batches = data.batches(split=split, global_batch_size=4, micro_batch_size=2)
    key = dataset.members(2)["__key__"]
    with pytest.raises(ValueError, match=rf"{key} \(sample 2\): no supervised token"):
        next(batches)
