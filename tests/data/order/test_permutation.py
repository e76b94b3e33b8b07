"""Shuffles with random access: bijections, local reads, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmm.data.order.permutation import LocalPermutation, Permutation

KEYS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**21))


@settings(max_examples=60)
@given(size=st.integers(1, 5000), key=KEYS)
def test_it_is_a_bijection(size: int, key: tuple[int, int]) -> None:
    numbers = Permutation(size, *key)(np.arange(size))
    assert np.array_equal(np.sort(numbers), np.arange(size))


@settings(max_examples=60)
@given(size=st.integers(10**9, 2**62), key=KEYS, first=st.integers(0, 10**9 - 2000))
def test_a_billion_samples_and_more_without_a_list(
    size: int, key: tuple[int, int], first: int
) -> None:
    shuffle = Permutation(size, *key)
    numbers = shuffle(np.arange(first, first + 2000))
    assert len(np.unique(numbers)) == 2000
    assert numbers.min() >= 0 and numbers.max() < size
    assert shuffle([first + 7])[0] == numbers[7], "seeking equals walking"


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum),
    window=st.integers(1, 300),
    key=KEYS,
)
def test_local_shuffles_are_bijections(sizes: list[int], window: int, key: tuple[int, int]) -> None:
    starts = np.cumsum(sizes) - sizes
    shuffle = LocalPermutation(starts, sizes, window, *key)
    numbers = shuffle(np.arange(shuffle.size))
    assert np.array_equal(np.sort(numbers), np.arange(sum(sizes)))
    assert shuffle([shuffle.size - 1])[0] == numbers[-1]


def test_local_reads_stay_in_few_shards() -> None:
    starts, sizes = np.arange(0, 10_000, 100), np.full(100, 100)
    shuffle = LocalPermutation(starts, sizes, 500, 1)
    numbers = shuffle(np.arange(10_000)).reshape(20, 500)
    touched = [len(np.unique(window // 100)) for window in numbers]
    assert touched == [5] * 20
    assert len({tuple(window % 100) for window in numbers}) == 20, "each is shuffled in its own way"
    everywhere = Permutation(10_000, 1)(np.arange(500)) // 100
    assert len(np.unique(everywhere)) > 90
    assert not np.array_equal(np.sort(numbers, axis=1)[:, 0] // 100, np.arange(0, 100, 5))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
def test_every_sample_comes_everywhere_equally_often(size: int) -> None:
    trials = 200 * size
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), Permutation(size, seed)(np.arange(size))] += 1
    expected = trials / size
    # the squared deviations are chi-square with (size - 1)^2 degrees of freedom
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), (size - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom) + 6


def test_it_is_the_same_on_every_machine() -> None:
    assert Permutation(8, 1234, 0)(np.arange(8)).tolist() == [2, 4, 0, 7, 3, 5, 1, 6]
    assert Permutation(10**12, 1234, 0)([0, 10**12 - 1]).tolist() == [135203150794, 866264506887]


def test_places_outside_are_refused() -> None:
    with pytest.raises(IndexError, match=r"places 0\.\.5 of a permutation of 5"):
        Permutation(5, 1)([0, 5])
    with pytest.raises(ValueError, match="size=0 of a permutation"):
        Permutation(0)
