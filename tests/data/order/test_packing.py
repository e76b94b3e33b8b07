"""The packing plan: every sample once, no row over its length, full rows, like work for ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nvmm.data.order.packing import Pack, plan

TILE_COST = 100_000


def mixture(count: int, capacity: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lengths and tiles: 60 % images of 1 to 7 tiles, 30 % short and 10 % long texts."""
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    tiles = np.where(kind < 0.6, rng.integers(1, 8, count), 0)
    short = rng.lognormal(5.0, 1.0, count).astype(int) + 8
    long = rng.lognormal(7.0, 0.8, count).astype(int) + 8
    lengths = np.where(kind < 0.6, 261 * tiles + short, np.where(kind < 0.9, short, long))
    return np.minimum(lengths, capacity), tiles


def total(packs: list[Pack], rank: int, size: int) -> int:
    return sum(pack.cost for pack in packs[rank::size])


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_and_no_row_too_long(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 3000))
    multiple = int(rng.choice([1, 4]))
    capacity += -capacity % multiple
    lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 300)))
    tiles = rng.integers(0, 8, len(lengths))
    packs = plan(lengths, capacity, tiles=tiles, tile_cost=9, segment_multiple=multiple, seed=seed)
    assert sorted(i for pack in packs for i in pack.samples) == list(range(len(lengths)))
    for pack in packs:
        assert list(pack.samples) == sorted(pack.samples)
        assert pack.length == sum(-(-lengths[i] // multiple) * multiple for i in pack.samples)
        assert pack.length <= capacity
        assert pack.cost == sum(lengths[i] ** 2 + 9 * tiles[i] for i in pack.samples)
    again = plan(lengths, capacity, tiles=tiles, tile_cost=9, segment_multiple=multiple, seed=seed)
    assert packs == again


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_the_texts_of_a_sample_are_padded_one_by_one(multiple: int) -> None:
    """Two answers of 5 tokens take 16 where segments are multiples of 4 or more, and not 12."""
    rng = np.random.default_rng(multiple)
    texts = rng.integers(1, 4, 400)
    sizes = [rng.integers(1, 40, count) for count in texts]
    lengths = np.array([sum(size) for size in sizes])
    padded = np.array([sum(-(-size // multiple) * multiple) for size in sizes])
    packs = plan(lengths, 256, segment_multiple=multiple, texts=texts)
    assert sorted(i for pack in packs for i in pack.samples) == list(range(400))
    assert all(padded[list(pack.samples)].sum() <= pack.length <= 256 for pack in packs)
    whole = plan(lengths, 256, segment_multiple=multiple)
    overfull = [pack for pack in whole if padded[list(pack.samples)].sum() > 256]
    assert bool(overfull) == (multiple > 1), "rounding whole samples is not enough"


def test_best_fit_by_hand() -> None:
    """6, 5, 4, 3, 2: 6 opens a row, 5 another; 4 fits the first exactly, 3 and 2 the second."""
    packs = plan([2, 3, 4, 5, 6], 10)
    assert sorted(pack.samples for pack in packs) == [(0, 1, 3), (2, 4)]
    assert [pack.length for pack in packs] == [10, 10]
    assert sorted(pack.cost for pack in packs) == [38, 52]


def test_rooms_beyond_the_first_block_are_found() -> None:
    """The only open row's room lies in a later block of the search than the sample's size."""
    (pack,) = plan([3000, 100, 1], 5000)
    assert pack.samples == (0, 1, 2)


def test_a_large_window_is_full_and_balanced() -> None:
    capacity = 8192
    lengths, tiles = mixture(100_000, capacity)
    packs = plan(lengths, capacity, tiles=tiles, tile_cost=TILE_COST)
    assert sum(lengths) / (len(packs) * capacity) >= 0.99
    for size in (2, 4, 8):
        totals = [total(packs, rank, size) for rank in range(size)]
        assert max(totals) - min(totals) < 0.05 * max(totals)
    steps = np.array([pack.cost for pack in packs[: len(packs) // 8 * 8]]).reshape(-1, 8)
    waiting = (steps.max(1) - steps.min(1)) / steps.max(1)
    assert waiting.mean() < 0.05


def test_steps_are_in_no_order_of_cost() -> None:
    lengths, tiles = mixture(2000, 2048)
    packs = plan(lengths, 2048, tiles=tiles, tile_cost=TILE_COST)
    steps = np.array([pack.cost for pack in packs[: len(packs) // 8 * 8]]).reshape(-1, 8).mean(1)
    place = np.arange(len(steps))
    assert abs(np.corrcoef(place, steps)[0, 1]) < 0.3
    other = plan(lengths, 2048, tiles=tiles, tile_cost=TILE_COST, seed=1)
    assert other != packs
    assert sorted(other, key=lambda p: p.samples) == sorted(packs, key=lambda p: p.samples)


@pytest.mark.parametrize(
    ("lengths", "multiple", "message"),
    [
        (
            [3, 9, 8],
            1,
            "sample 1 of the window has 9 tokens, with the padding of its texts a row takes 1 to 8",
        ),
        ([3, 0], 1, "sample 1 of the window has 0 tokens"),
        ([7], 3, r"has 7 tokens, .* takes 1 to 6 \(data\.sequence_length=8\)"),
    ],
)
def test_samples_that_fit_no_row_are_refused(
    lengths: list[int], multiple: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, 8, segment_multiple=multiple)


def test_an_empty_window_has_no_pack() -> None:
    assert plan([], 8) == []
