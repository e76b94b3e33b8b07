"""Step numbers -> the micro-batches of one data-parallel rank: what loader processes run."""

from __future__ import annotations

import dataclasses
import os
import select
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nvmm.batch import Batch, Sample
from nvmm.data.collate import collate
from nvmm.data.order import sample_ids
from nvmm.data.order.packing import Pack, deal
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.checks import check_sample
from nvmm.data.shards.dataset import Dataset


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Step numbers from `start`; endless without `stop`."""

    start: int
    stop: int | None

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while self.stop is None or k < self.stop:
            yield k
            k += 1


@dataclasses.dataclass(frozen=True)
class OnePass:
    """Each sample once, in order; FILLING fills the last global batch."""

    num_samples: int
    global_batch_size: int

    def batch(self, k: int) -> list[Pack]:
        """Global batch k."""
        first = k * self.global_batch_size
        numbers = range(first, first + self.global_batch_size)
        return [Pack((n if n < self.num_samples else sample_ids.FILLING,), 0, 0) for n in numbers]

    def position(self, k: int) -> None:
        """A pass over held-out data has no place to go on from."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One rank's part of a step; problems: id and reason of its bad samples; position: after it."""

    batches: list[Batch]
    problems: list[tuple[int, str]]
    position: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Steps:
    """Step number -> the micro-batches of one rank.

    datasets: by their number in sample ids. order: an Order or OnePass. planned: the order's packs
    rely on token counts, which the samples must have.
    """

    datasets: Mapping[int, Dataset]
    order: Any
    micro_batch_size: int
    rank: int
    size: int
    pad_id: int
    pad_multiple: int
    segment_multiple: int
    packed: bool
    planned: bool

    def __getitem__(self, k: int) -> Step:
        packs: list[Pack] = self.order.batch(k)
        costs = [pack.cost for pack in packs]
        dealt = deal(costs, self.micro_batch_size, self.size, padded=not self.packed)
        problems: list[tuple[int, str]] = []
        batches = [
            collate(
                [self._sample(i, problems) for pack in chosen for i in packs[pack].samples],
                pad_id=self.pad_id,
                pad_multiple=self.pad_multiple,
                segment_multiple=self.segment_multiple,
                packed=self.packed,
            )
            for chosen in dealt[self.rank]
        ]
        return Step(batches, problems, self.order.position(k + 1))

    def _sample(self, sample_id: int, problems: list[tuple[int, str]]) -> Sample:
        """Return the sample, or the blank of its dataset's builder in the place of a bad one."""
        if sample_id != sample_ids.FILLING:
            try:
                return self._built(sample_id)
            except ValueError as error:
                problems.append((sample_id, str(error)))
            ordinal = int(sample_ids.split(sample_id)[0][()])
            hole = int(sample_ids.hole(np.array(sample_id)))
            return self.datasets[ordinal].build.blank(hole)
        return next(iter(self.datasets.values())).build.blank(sample_id)

    def _built(self, sample_id: int) -> Sample:
        ordinal, _, number = (int(part[()]) for part in sample_ids.split(sample_id))
        dataset = self.datasets[ordinal]
        sample = dataclasses.replace(dataset[number], sample_id=sample_id)
        check_sample(sample)
        if self.planned:
            expected, tokens = int(dataset.lengths[number, 0]), sample.num_tokens
            if tokens != expected or tokens > self.order.settings.capacity:
                raise BadSample(
                    sample.source,
                    f"has {tokens} tokens; its index says {expected}, and a row takes"
                    f" {self.order.settings.capacity}",
                )
        return sample


def end_with(pid: int, worker: int = 0) -> None:
    """Make this loader process end when process `pid`, its rank, does.

    A rank that is killed cannot end its loaders, and theirs is the fork server for a parent, which
    lives as long as they do.
    """
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def follow() -> None:
        select.select([watched], [], [])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
