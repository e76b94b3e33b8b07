"""Batches of prompts that share a beginning."""

from __future__ import annotations

import random
from itertools import combinations

import torch

from nvmm.batch import Sample, Text
from nvmm.inference.prefix import saved_tokens, shared_tokens
from nvmm.jobs.prompts import _PASS, batches


def samples(*texts: list[int]) -> dict[int, Sample]:
    return {
        number: Sample((Text(torch.tensor(tokens), torch.zeros(len(tokens))),))
        for number, tokens in enumerate(texts)
    }


def cost(some: list[Sample]) -> int:
    """The columns that a batch runs: what it shares once, the others in every row, and a pass."""
    once = max(len(one.text.tokens) for one in some)
    shared = shared_tokens(some)
    return shared + len(some) * (once - shared) + _PASS


def test_prompts_of_one_beginning_share_a_batch() -> None:
    first, second = [1] * 300, [2] * 300
    prompts = samples([*second, 5], [*first, 7, 7], [*second, 6], [*first, 8], [*first, 9])
    assert batches(prompts, 4, share_prefix=True) == [[1, 3, 4], [0, 2]]
    assert batches(prompts, 2, share_prefix=True) == [[1], [3, 4], [0, 2]]
    assert [len(some) for some in batches(prompts, 4)] == [4, 1], "by length otherwise"
    # What differs at once shares a batch for the sake of fewer passes.
    assert len(batches(samples(*([n] * 5 for n in range(6))), 6, share_prefix=True)) == 1
    assert batches({}, 3, share_prefix=True) == []


def test_no_other_cut_of_the_sorted_prompts_runs_less() -> None:
    draw = random.Random(3)
    for _ in range(20):
        texts = [[draw.randint(0, 1) for _ in range(draw.randint(1, 6))] * 40 for _ in range(7)]
        prompts = samples(*texts)
        found = batches(prompts, 3, share_prefix=True)
        order = [number for some in found for number in some]
        assert sorted(order) == list(range(7))
        assert [texts[number] for number in order] == sorted(texts)
        ways = [
            [order[a:b] for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
            for count in range(7)
            for cuts in combinations(range(1, 7), count)
        ]
        costs = [
            sum(cost([prompts[n] for n in some]) for some in way)
            for way in ways
            if max(map(len, way)) <= 3
        ]
        assert sum(cost([prompts[n] for n in some]) for some in found) == min(costs)


def test_saved_tokens_are_of_all_but_the_longest() -> None:
    prompts = list(samples([1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 9, 9]).values())
    assert shared_tokens(prompts) == 2
    assert saved_tokens(prompts) == [1, 0, 0]
