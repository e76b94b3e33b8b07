"""A blend says which dataset gives the n-th sample, by weights, at any n.

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
    """One dataset as a blend sees it.

    num_samples: samples of one epoch. weight: its weight relative to the other sources. epochs:
    passes after which it leaves the blend, the others going on at their weights (None: it never
    does; 0: it never has a turn; 3.5: half-way through its fourth). consumed: samples taken from it
    before the blend's first slot.
    """

    name: str
    num_samples: int
    weight: Fraction
    epochs: float | None = None
    consumed: int = 0

    @property
    def remaining(self) -> int | None:
        """The number of samples that it still gives; None without end."""
        if self.epochs is None:
            return None
        return max(0, samples_of(self.epochs, self.num_samples) - self.consumed)


def samples_of(passes: float, num_samples: int) -> int:
    """Return the samples that a number of passes takes, rounded to a whole one."""
    return round(Fraction(str(passes)) * num_samples)


@dataclass(frozen=True)
class _Stretch:
    """A range of slots over which the same sources take turns.

    start: its first slot. stop: one past its last slot; None when it never ends. active: int64 [k],
    indices of the sources. counts: int64 [k], samples that each has given before `start`.
    weights: int64 [k], turns of each in a period of W slots. turns: int32 [W], the source of each
    slot of a period, as an index into `active`. ranks: int32 [W], how many turns of the period
    that source has had before.
    """

    start: int
    stop: int | None
    active: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.int64]
    turns: NDArray[np.int32]
    ranks: NDArray[np.int32]

    def counts_after(self, slots: int) -> NDArray[np.int64]:
        """Return int64 [k]: samples that each source has given after `slots` slots of it."""
        periods, rest = divmod(slots, len(self.turns))
        in_last_period = np.bincount(self.turns[:rest], minlength=len(self.active))
        return self.counts + periods * self.weights + in_last_period


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
        """Return the sources of slots [first, first + count), and their places in these sources.

        A place counts a source's samples over all its epochs. Both are int64 [count]; they are
        shorter where the blend ends.
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
            in_stretch = slice(done, done + len(slots))
            sources[in_stretch] = stretch.active[turn]
            # A place counts the samples before the stretch, of its whole periods, and of this one.
            places[in_stretch] = stretch.counts[turn] + periods * stretch.weights[turn]
            places[in_stretch] += stretch.ranks[within]
            done += len(slots)
        consumed = np.array([source.consumed for source in self.sources])
        return sources[:done], places[:done] + consumed[sources[:done]]

    @property
    def size(self) -> int | None:
        """The slots of the whole blend; None where a source never ends."""
        remaining = [source.remaining for source in self.sources]
        return None if None in remaining else sum(rest or 0 for rest in remaining)

    def counts(self, slots: int) -> list[int]:
        """Return how many samples each source has given after `slots` slots, with `consumed`.

        Behind the blend's end each has given all.
        """
        slots = slots if self.size is None else min(slots, self.size)
        taken = np.array([source.consumed for source in self.sources])
        stretch = self._stretch(slots - 1) if slots else None
        if stretch is not None:
            taken[stretch.active] += stretch.counts_after(slots - stretch.start)
            # The others have come to their end before this stretch.
            for index in set(range(len(taken))) - set(stretch.active.tolist()):
                taken[index] += self.sources[index].remaining or 0
        return taken.tolist()

    def _stretch(self, slot: int) -> _Stretch | None:
        """Return the stretch of a slot, extending the blend up to it; None behind its end."""
        while True:
            for stretch in self._stretches:
                if stretch.stop is None or slot < stretch.stop:
                    return stretch
            if not self._extend():
                return None

    def _extend(self) -> bool:
        """Append the next stretch; return False when no source is left for one."""
        # 1. Count what each source has given up to the end of the last stretch.
        last = self._stretches[-1] if self._stretches else None
        start, counts = 0, np.zeros(len(self.sources), dtype=np.int64)
        if last is not None:
            assert last.stop is not None
            start = last.stop
            counts[last.active] = last.counts_after(last.stop - last.start)

        # 2. Find the sources that go on; one that left an earlier stretch never comes back.
        remaining = [
            None if source.remaining is None else source.remaining - int(counts[i])
            for i, source in enumerate(self.sources)
        ]
        ended = set() if last is None else set(range(len(remaining))) - set(last.active.tolist())
        active = np.array([i for i, rest in enumerate(remaining) if rest != 0 and i not in ended])
        if not active.size:
            return False
        weights = integer_weights([self.sources[i].weight for i in active])
        turns, ranks = _turns(weights)

        # 3. End the stretch with the slot at which the first of them has given its last sample.
        ends = []
        for turn, index in enumerate(active.tolist()):
            rest = remaining[index]
            if rest is not None:
                periods, rank = divmod(rest - 1, int(weights[turn]))
                slot = int(np.flatnonzero(turns == turn)[rank])
                ends.append(start + periods * len(turns) + slot + 1)
        self._stretches.append(
            _Stretch(
                start=start,
                stop=min(ends) if ends else None,
                active=active,
                counts=counts[active],
                weights=weights,
                turns=turns,
                ranks=ranks,
            )
        )
        return True


def integer_weights(weights: Sequence[Fraction]) -> NDArray[np.int64]:
    """Return int64 [k] in the ratio of `weights`, in lowest terms, with a sum up to MAX_PERIOD.

    Where the exact sum is greater, the shares are rounded (largest remainder, each at least 1).
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
    """Return the source of each slot of a period, and how many turns it has had before in it.

    Both are int32 [W], for integer weights int64 [k] of sum W. The j-th turn (from 1) of source i
    may not come before slot floor((j - 1) W / w_i) nor after slot ceil(j W / w_i) - 1: outside, the
    source would be a whole sample before or behind its share. Each slot goes to the turn that is
    due first. Such a schedule exists (Tijdeman, The chairman assignment problem, 1980), and taking
    the earliest deadline first finds it.
    """
    # 1. Each turn of each source is a job with a first slot (release) and a deadline (due).
    period, count = int(weights.sum()), len(weights)
    source = np.repeat(np.arange(count), weights)
    number = np.concatenate([np.arange(weight) for weight in weights])
    release = number * period // weights[source]
    due = -(-(number + 1) * period // weights[source])
    by_release = np.argsort(release, kind="stable")
    releases = release[by_release].tolist()
    # One number holds deadline and source, and sorts by the deadline.
    jobs = (due * count + source)[by_release].tolist()

    # 2. Every slot goes to the released job with the earliest deadline, kept in a heap.
    ready: list[int] = []
    turns, ranks = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    turns_had = [0] * count
    released = 0
    for slot in range(period):
        while released < period and releases[released] <= slot:
            heapq.heappush(ready, jobs[released])
            released += 1
        deadline, turn = divmod(heapq.heappop(ready), count)
        assert slot < deadline
        turns[slot], ranks[slot] = turn, turns_had[turn]
        turns_had[turn] += 1
    return turns, ranks
