"""Datasets -> the micro-batches of one data-parallel rank, in a global order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from nvmm.batch import Batch, Sample
from nvmm.data.collate import collate
from nvmm.data.guards import check_sample
from nvmm.data.shards import Dataset, Order
from nvmm.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")


class Data:
    """Training and validation data of one run.

    sequence_length: longest sample in tokens.
    num_workers: processes that read, decode and tile; 0 does it in this one. The batches are the
        same for any number.
    train, validation: datasets whose builders still lack tokenizer and sequence_length.
    seed: of the training order.
    pack: one packed row a micro-batch instead of padded rows.
    """

    def __init__(
        self,
        sequence_length: int,
        num_workers: int,
        train: Dataset,
        validation: Dataset | None = None,
        *,
        tokenizer: Tokenizer,
        seed: int = 0,
        pack: bool = False,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"data.sequence_length={sequence_length} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} must be at least 0")
        options = {"tokenizer": tokenizer, "sequence_length": sequence_length}
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.tokenizer = tokenizer
        self.seed = seed
        self.pack = pack
        self.train = train.bind(**options)
        self.validation = None if validation is None else validation.bind(**options)

    def order(self, global_batch_size: int, position: Mapping[str, int] | None = None) -> Order:
        """The order of the training samples."""
        return Order(len(self.train), self.seed, global_batch_size, position)

    def num_batches(self, split: str, global_batch_size: int) -> int:
        """Global batches in one pass; the last may be incomplete."""
        return -(-len(self._dataset(split)) // global_batch_size)

    def position(
        self, step: int, global_batch_size: int, position: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """The data's place before `step`, for a run that started from `position`."""
        return self.order(global_batch_size, position).position(step)

    def _dataset(self, split: str) -> Dataset:
        if split not in SPLITS:
            raise ValueError(f"split={split} is unknown; use one of {', '.join(SPLITS)}")
        dataset = self.train if split == "train" else self.validation
        if dataset is None:
            raise ValueError("data.validation is null; there is nothing to validate on")
        return dataset

    def batches(
        self,
        *,
        split: str,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        size: int = 1,
        start: int = 0,
        position: Mapping[str, int] | None = None,
        pad_multiple: int = 1,
        segment_multiple: int = 1,
    ) -> Iterator[list[Batch]]:
        """Per step, from step `start`, the micro-batches of data-parallel rank `rank` of `size`.

        Micro-batch m of a rank holds samples (m * size + rank) * micro_batch_size and following
        of the global batch. Training never ends; validation is one pass in the dataset's order,
        whose last global batch is filled up with unsupervised samples of id -1.
        """
        dataset = self._dataset(split)
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} must be in [0, {size})")
        if micro_batch_size < 1 or global_batch_size % (micro_batch_size * size):
            raise ValueError(
                f"trainer.global_batch_size={global_batch_size} must be a multiple of "
                f"trainer.micro_batch_size={micro_batch_size} x data-parallel size {size}"
            )
        stop = None if split == "train" else self.num_batches(split, global_batch_size)
        order: Order | _OnePass = (
            self.order(global_batch_size, position)
            if split == "train"
            else _OnePass(len(dataset), global_batch_size)
        )
        steps = _Steps(
            dataset=dataset,
            order=order,
            micro_batch_size=micro_batch_size,
            rank=rank,
            size=size,
            pad_id=self.tokenizer.pad_id,
            pad_multiple=pad_multiple,
            segment_multiple=segment_multiple,
            packed=self.pack,
        )
        numbers = _Numbers(start, stop)
        return self._iterate(steps, numbers)

    def _iterate(self, steps: _Steps, numbers: _Numbers) -> Iterator[list[Batch]]:
        if self.num_workers == 0:
            yield from (steps[k] for k in numbers)
            return
        # forkserver: a fork of a process that has run threaded torch ops hangs in the child.
        # generator: without one DataLoader draws its seed from torch's global state.
        yield from DataLoader(
            steps,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=self.num_workers,
            multiprocessing_context="forkserver",
            generator=torch.Generator().manual_seed(0),
        )


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Step numbers from `start`; endless without `stop`."""

    start: int
    stop: int | None

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while self.stop is None or k < self.stop:
            yield k
            k += 1


@dataclasses.dataclass(frozen=True)
class _OnePass:
    """Each sample once, in order; None fills the last global batch."""

    num_samples: int
    global_batch_size: int

    def batch(self, k: int) -> list[int | None]:
        first = k * self.global_batch_size
        numbers = range(first, first + self.global_batch_size)
        return [number if number < self.num_samples else None for number in numbers]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Step number -> the micro-batches of one rank."""

    dataset: Dataset
    order: Any
    micro_batch_size: int
    rank: int
    size: int
    pad_id: int
    pad_multiple: int
    segment_multiple: int
    packed: bool

    def __getitem__(self, k: int) -> list[Batch]:
        ids = self.order.batch(k)
        batches = []
        for first in range(
            self.rank * self.micro_batch_size, len(ids), self.size * self.micro_batch_size
        ):
            samples = [self._sample(i) for i in ids[first : first + self.micro_batch_size]]
            batches.append(
                collate(
                    samples,
                    pad_id=self.pad_id,
                    pad_multiple=self.pad_multiple,
                    segment_multiple=self.segment_multiple,
                    packed=self.packed,
                )
            )
        return batches

    def _sample(self, number: int | None) -> Sample:
        if number is not None:
            sample = self.dataset[number]
            check_sample(sample)
            return sample
        sample = self.dataset[0]
        unsupervised = torch.zeros_like(sample.loss_mask)
        return dataclasses.replace(sample, loss_mask=unsupervised, sample_id=-1)
