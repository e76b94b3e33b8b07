"""A blend: which dataset gives the n-th sample, by weights, at any n.

Every slot of the blend belongs to one source. Sources come in turn, as evenly as their weights
allow: at every prefix each source has given its share of the samples to within less than one
sample. The turns are a periodic table: for integer weights of sum W they repeat after W slots,
so that any slot is found without walking there.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 1 << 18
"""Weights whose integer sum is greater are rounded to multiples of 1 / MAX_PERIOD."""


@dataclass(frozen=True)
class Source:
    """One dataset's part in a blend.

    num_samples: of one epoch. weight: relative to the other sources. epochs: passes after which
    it leaves the blend, the others going on at their weights (None: it never does; 0: it never
    has a turn). consumed: samples taken from it before the blend's first slot.
    """

    name: str
    num_samples: int
    weight: Fraction
    epochs: int | None = None
    consumed: int = 0

    @property
    def remaining(self) -> int | None:
        """Samples that it still gives; None without end."""
        if self.epochs is None:
            return None
        return max(0, self.epochs * self.num_samples - self.consumed)


@dataclass(frozen=True)
class _Stretch:
    """Slots over which the same sources take turns.

    start: its first slot; stop: None for the last. active: int64 [k], indices of the sources;
    counts: int64 [k], samples that each has given before `start`. turns: int32 [W], index into
    `active` of each slot of a period; ranks: int32 [W], earlier turns of that source in it.
    """

    start: int
    stop: int | None
    active: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.int64]
    turns: NDArray[np.int32]
    ranks: NDArray[np.int32]

    def given(self, slots: int) -> NDArray[np.int64]:
        """int64 [k]: samples of each source in the stretch's first `slots` slots."""
        whole, rest = divmod(slots, len(self.turns))
        partial = np.bincount(self.turns[:rest], minlength=len(self.active))
        return whole * self.weights + partial


class Blend:
    """The endless sequence of slots over some sources; it ends when every source does."""

    def __init__(self, sources: Sequence[Source]) -> None:
        for source in sources:
            if source.weight <= 0 or source.num_samples < 1:
                raise ValueError(
                    f"data.blend: {source.name} has weight {source.weight} and"
                    f" {source.num_samples} samples; both must be positive"
                )
        self.sources = list(sources)
        self._stretches: list[_Stretch] = []

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and place in it, counted over its epochs, of slots [first, first + count).

        Returns two int64 [count]; fewer where the blend ends.
        """
        sources = np.empty(count, dtype=np.int64)
        places = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            stretch = self._stretch(first + done)
            if stretch is None:
                break
            stop = first + count if stretch.stop is None else min(first + count, stretch.stop)
            slots = np.arange(first + done, stop) - stretch.start
            periods, within = np.divmod(slots, len(stretch.turns))
            turn = stretch.turns[within]
            here = slice(done, done + len(slots))
            sources[here] = stretch.active[turn]
            places[here] = stretch.counts[turn] + periods * stretch.weights[turn]
            places[here] += stretch.ranks[within]
            done += len(slots)
        consumed = np.array([source.consumed for source in self.sources])
        return sources[:done], places[:done] + consumed[sources[:done]]

    def counts(self, slots: int) -> list[int]:
        """Samples taken from each source once the first `slots` slots are, with `consumed`."""
        taken = np.array([source.consumed for source in self.sources])
        stretch = self._stretch(slots - 1) if slots else None
        if stretch is not None:
            taken[stretch.active] += stretch.counts + stretch.given(slots - stretch.start)
            for index in set(range(len(taken))) - set(stretch.active.tolist()):
                taken[index] += self.sources[index].remaining or 0
        return taken.tolist()

    def _stretch(self, slot: int) -> _Stretch | None:
        """The stretch of a slot; None behind the end."""
        while True:
            for stretch in self._stretches:
                if stretch.stop is None or slot < stretch.stop:
                    return stretch
            if not self._extend():
                return None

    def _extend(self) -> bool:
        last = self._stretches[-1] if self._stretches else None
        start, given = 0, np.zeros(len(self.sources), dtype=np.int64)
        if last is not None:
            assert last.stop is not None
            start = last.stop
            given[last.active] = last.counts + last.given(last.stop - last.start)
        left = [
            None if source.remaining is None else source.remaining - int(given[i])
            for i, source in enumerate(self.sources)
        ]
        gone = {} if last is None else set(range(len(left))) - set(last.active.tolist())
        active = np.array([i for i, rest in enumerate(left) if rest != 0 and i not in gone])
        if not active.size:
            return False
        weights = integer_weights([self.sources[i].weight for i in active])
        turns, ranks = _turns(weights)
        ends = []
        for turn, index in enumerate(active.tolist()):
            rest = left[index]
            if rest is not None:
                periods, rank = divmod(rest - 1, int(weights[turn]))
                slot = int(np.flatnonzero(turns == turn)[rank])
                ends.append(start + periods * len(turns) + slot + 1)
        self._stretches.append(
            _Stretch(
                start=start,
                stop=min(ends) if ends else None,
                active=active,
                counts=given[active],
                weights=weights,
                turns=turns,
                ranks=ranks,
            )
        )
        return True


def integer_weights(weights: Sequence[Fraction]) -> NDArray[np.int64]:
    """int64 [k] in the ratio of `weights`, in lowest terms, of a sum of at most MAX_PERIOD.

    Where the exact sum is greater the shares are rounded (largest remainder, each at least 1).
    """
    total = sum(weights)
    denominator = np.lcm.reduce([(weight / total).denominator for weight in weights], dtype=object)
    if denominator <= MAX_PERIOD:
        return np.array([int(weight / total * denominator) for weight in weights])
    quotas = [weight / total * (MAX_PERIOD - len(weights)) for weight in weights]
    rounded = [int(quota) + 1 for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (int(quotas[i]) - quotas[i], i))
    for i in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[i] += 1
    return np.array(rounded)


def _turns(weights: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Whose turn each slot of a period is, and how many turns it has had in the period.

    The j-th turn (from 1) of source i may not come before slot floor((j - 1) W / w_i) nor after
    slot ceil(j W / w_i) - 1: outside, the source would be a whole sample before or behind its
    share. Each slot goes to the turn that is due first. Such a schedule exists (Tijdeman, The
    chairman assignment problem, 1980), and earliest deadline first finds it.
    """
    period, count = int(weights.sum()), len(weights)
    source = np.repeat(np.arange(count), weights)
    number = np.concatenate([np.arange(weight) for weight in weights])
    release = number * period // weights[source]
    due = -(-(number + 1) * period // weights[source])
    by_release = np.argsort(release, kind="stable")
    releases = release[by_release].tolist()
    jobs = (due * count + source)[by_release].tolist()  # one number that sorts by deadline
    ready: list[int] = []
    turns, ranks = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    had = [0] * count
    released = 0
    for slot in range(period):
        while released < period and releases[released] <= slot:
            heapq.heappush(ready, jobs[released])
            released += 1
        deadline, turn = divmod(heapq.heappop(ready), count)
        assert slot < deadline
        turns[slot], ranks[slot] = turn, had[turn]
        had[turn] += 1
    return turns, ranks
