"""Seeded shuffles with random access: a place gives its number, without a list of all numbers.

The same size and key give the same shuffle on every machine and numpy version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 8


class Permutation:
    """A bijection of [0, size), computed for the places that are asked for.

    An alternating Feistel network on the next power of two, whose outputs beyond `size` are put
    through it again until they fall inside (cycle walking, Black and Rogaway 2002): less than two
    passes on average. key: numbers and texts that select the shuffle.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"size={size} of a permutation must be in [1, 2**62]")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """Return the numbers at `places`: int64 [n] -> int64 [n].

        Raises IndexError outside [0, size).
        """
        at = np.atleast_1d(np.asarray(places, dtype=np.int64))
        if at.size and (at.min() < 0 or at.max() >= self.size):
            raise IndexError(f"places {at.min()}..{at.max()} of a permutation of {self.size}")
        numbers = self._once(at.astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= self.size)).size:
            numbers[outside] = self._once(numbers[outside])
        return numbers.astype(np.int64)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values & self._low, values >> self._low_bits
        for number, key in enumerate(self._keys):
            if number % 2:
                high ^= _mixed(low, key) & self._high
            else:
                low ^= _mixed(high, key) & self._low
        return high << self._low_bits | low


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each value (the finaliser of splitmix64)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class LocalPermutation:
    """Runs of numbers (the samples of a shard) shuffled, then numbers within windows of places.

    The samples of a window lie in about window / (samples of a shard) shards.

    starts, sizes: int64 [runs], first number and length of each run. window: places shuffled
    together; the last window may be shorter.
    """

    def __init__(self, starts: ArrayLike, sizes: ArrayLike, window: int, *key: int | str) -> None:
        lengths = np.asarray(sizes, dtype=np.int64)
        order = Permutation(len(lengths), *key, "runs")(np.arange(len(lengths)))
        self._ends = np.cumsum(lengths[order])
        self._shift = np.asarray(starts, dtype=np.int64)[order] - (self._ends - lengths[order])
        self._window = window
        self._key = key
        self.size = int(self._ends[-1])

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """Return the numbers at `places`: int64 [n] -> int64 [n].

        Raises IndexError outside [0, size).
        """
        at = np.atleast_1d(np.asarray(places, dtype=np.int64))
        windows = at // self._window
        shuffled = np.empty_like(at)
        for number in np.unique(windows).tolist():
            first = number * self._window
            permutation = Permutation(min(self._window, self.size - first), *self._key, number)
            in_window = windows == number
            shuffled[in_window] = first + permutation(at[in_window] - first)
        return shuffled + self._shift[np.searchsorted(self._ends, shuffled, side="right")]
