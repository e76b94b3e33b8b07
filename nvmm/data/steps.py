"""The global batches of a run by step number, as loader processes compute them for one rank."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nvmm.batch import Batch, Sample
from nvmm.data.collate import collate
from nvmm.data.order import sample_ids
from nvmm.data.order.packing import Pack, assign, multiples
from nvmm.data.samples.bad_sample import BadSample, blamed
from nvmm.data.samples.checks import check_sample
from nvmm.data.shards.dataset import Dataset


@dataclasses.dataclass(frozen=True)
class StepNumbers:
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
    """An order with each sample once; FILLING fills the last global batch."""

    num_samples: int
    global_batch_size: int

    def batch(self, k: int) -> list[Pack]:
        """Return the packs of global batch k, one sample each."""
        first = k * self.global_batch_size
        numbers = range(first, first + self.global_batch_size)
        return [Pack((n if n < self.num_samples else sample_ids.FILLING,), 0, 0) for n in numbers]

    def position(self, k: int) -> None:
        """Return None: a pass over held-out data is never resumed."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One rank's share of a step.

    problems: id and reason of each bad sample. position: of the order after the step, or None.
    dropped: number of a dataset -> media that its samples left out.
    """

    batches: list[Batch]
    problems: list[tuple[int, str]]
    position: dict[str, Any] | None
    dropped: dict[int, int]


@dataclasses.dataclass(frozen=True)
class GlobalBatches:
    """Global batches by step number; an item is one rank's share, a `Step`.

    datasets: number in sample ids -> dataset. order: an Order or OnePass. planned: the order's
    packs rely on token counts, which the samples must have. seed: of what builders draw in each
    pass anew; None: they draw the same in all.
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
    seed: int | None = None

    def __getitem__(self, k: int) -> Step:
        packs: list[Pack] = self.order.batch(k)
        costs = [pack.cost for pack in packs]
        assigned = assign(costs, self.micro_batch_size, self.size, padded=not self.packed)
        problems: list[tuple[int, str]] = []
        batches = []
        dropped: dict[int, int] = {}
        for micro_batch in assigned[self.rank]:
            # The samples of one micro-batch at a time are in memory beside the batches.
            samples = [
                self._sample(i, problems) for pack in micro_batch for i in packs[pack].samples
            ]
            for sample in samples:
                if sample.dropped:
                    ordinal = int(sample_ids.split(sample.sample_id)[0][()])
                    dropped[ordinal] = dropped.get(ordinal, 0) + sample.dropped
            batches.append(
                collate(
                    samples,
                    pad_id=self.pad_id,
                    pad_multiple=self.pad_multiple,
                    segment_multiple=self.segment_multiple,
                    packed=self.packed,
                )
            )
        return Step(batches, problems, self.order.position(k + 1), dropped)

    def _sample(self, sample_id: int, problems: list[tuple[int, str]]) -> Sample:
        """Return the sample, or the blank of its dataset's builder in the slot of a bad one.

        problems: gets the id and the reason of a bad sample.
        """
        if sample_id == sample_ids.FILLING:
            return next(iter(self.datasets.values())).build.blank(sample_id)
        try:
            return self._checked(sample_id)
        except ValueError as error:
            problems.append((sample_id, str(error)))
        ordinal = int(sample_ids.split(sample_id)[0][()])
        empty_slot = int(sample_ids.empty_slot(np.array(sample_id)))
        return self.datasets[ordinal].build.blank(empty_slot)

    def _checked(self, sample_id: int) -> Sample:
        """Return a sample; raise ValueError when it is bad or not as long as it was planned."""
        ordinal, epoch, number = (int(field[()]) for field in sample_ids.split(sample_id))
        dataset = self.datasets[ordinal]
        passing = "" if self.seed is None else passing_of(self.seed, epoch)
        sample = dataclasses.replace(dataset.sample(number, passing), sample_id=sample_id)
        with blamed(sample.source):
            check_sample(sample)
        if self.planned:
            expected, tokens = int(dataset.lengths[number, 0]), sample.num_tokens
            if expected < 0:
                raise BadSample(
                    sample.source,
                    "could not be built when tokens were counted; to count them anew, delete"
                    f" {dataset.index.path}",
                )
            capacity, multiple = self.order.settings.capacity, self.segment_multiple
            if len(sample.texts) > dataset.build.most_texts:
                raise BadSample(
                    sample.source,
                    f"has {len(sample.texts)} texts, and {type(dataset.build).__name__}.most_texts"
                    f" is {dataset.build.most_texts}: rows are planned for no more",
                )
            taken = multiples(np.array(tokens), multiple, dataset.build.most_texts)
            if tokens != expected or taken > capacity // multiple:
                padding = f" and may need {taken * multiple} with padding" if multiple > 1 else ""
                raise BadSample(
                    sample.source,
                    f"has {tokens} tokens{padding}; its index says {expected}, and a row takes"
                    f" {capacity // multiple * multiple}",
                )
        return sample


def passing_of(seed: int, epoch: int) -> str:
    """Return the name of a pass over a data set, for `Dataset.sample`."""
    return f"{seed}/{epoch}"


def end_with(pid: int, worker: int = 0) -> None:
    """Make this loader process end when process `pid`, its rank, does.

    A rank that is killed cannot end its loaders. Their parent is the fork server, which lives as
    long as they do. A Ctrl-C is the rank's to answer: it saves, and needs its loaders for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def follow() -> None:
        select.select([watched], [], [])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
