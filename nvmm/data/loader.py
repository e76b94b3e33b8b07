"""Datasets become the micro-batches of one data-parallel rank, in a global order."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from nvmm.batch import Batch, Sample
from nvmm.config.batch_sizes import BatchSizes
from nvmm.config.choices import require
from nvmm.data.order import mixture, sample_ids
from nvmm.data.order.mixture import Component
from nvmm.data.order.order import Order, Settings
from nvmm.data.samples.jinja_template import JinjaTemplate
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, builder_digest
from nvmm.data.steps import GlobalBatches, OnePass, Step, StepNumbers, end_with, passing_of

log = logging.getLogger("nvmm")
OnError = Literal["skip", "stop"]
SPLITS = ("train", "validation")
COUNTERS = ("samples", "tokens", "bad", "dropped")
_FEW = 1000
"""A rate of bad samples is taken over this many at least; of fewer it would say little."""
_ALL_BAD = 10
"""More samples than these are no accident where not one of them was good."""


class Data:
    """Training and validation data of one run.

    sequence_length: longest sample, and longest packed row, in tokens.
    num_workers: processes that read, decode and tile; 0 does it in this one. The batches are the
        same for any number.
    train, validation: datasets whose builders still lack tokenizer and sequence_length.
    blend: several training datasets with weights (nvmm.data.order.mixture); `train` then names no
        shards, and an entry inherits from `train` the keys that it leaves out.
    window: samples of the order that are planned together.
    on_error: "skip" samples that cannot be used, leaving an empty slot, or "stop" at the first.
    max_bad_fraction: the run stops when more of its samples are bad (of 1,000 at least).
    log_samples: list the sample ids of every step in metrics.jsonl.
    pack: plan rows of up to sequence_length tokens; a micro-batch is one packed row. All batch
        sizes then count packs, not samples.
    seed: seed of the training order.
    """

    def __init__(
        self,
        sequence_length: int,
        num_workers: int,
        train: Dataset,
        validation: Dataset | None = None,
        blend: Sequence[Mapping[str, Any]] | None = None,
        window: int = 4096,
        on_error: OnError = "skip",
        max_bad_fraction: float = 0.01,
        log_samples: bool = False,
        pack: bool = False,
        *,
        tokenizer: Tokenizer,
        seed: int = 0,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"data.sequence_length={sequence_length} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} must be at least 0")
        require("data.on_error", on_error, OnError)
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "sequence_length": sequence_length,
            "skip_damage": on_error == "skip",
        }
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.tokenizer = tokenizer
        self.seed = seed
        self.pack = pack
        self.blend = blend
        self.window = window
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        self.log_samples = log_samples
        self._template = train
        self.train = train.bind(**self._options)
        self.validation = None if validation is None else validation.bind(**self._options)
        self.datasets = ["train"] if blend is None else mixture.names(blend)
        self._numbered = dict(enumerate(self.datasets))
        self._position: dict[str, Any] | None = None
        self._dropped: dict[int, int] = {}
        self._described: set[str] = set()
        self._reported: dict[tuple[int, int], str] = {}

    @cached_property
    def components(self) -> list[Component]:
        """The training datasets; opens their indices."""
        if self.blend is not None:
            return mixture.read(self.blend, self._template, self._options)
        return [Component("train", self.train, Fraction(1), None, len(self.train))]

    def sample(self, sample_id: int) -> Sample:
        """Return one training sample by its id."""
        ordinal, epoch, number = (int(field[()]) for field in sample_ids.split(sample_id))
        passing = "" if self.pack else passing_of(self.seed, epoch)
        sample = self._of(sample_id, ordinal).sample(number, passing)
        return dataclasses.replace(sample, sample_id=sample_id)

    def located(self, sample_id: int) -> tuple[Dataset, int]:
        """Return the data set of a training sample, and its number there."""
        ordinal, _, number = (int(field[()]) for field in sample_ids.split(sample_id))
        return self._of(sample_id, ordinal), number

    def _of(self, sample_id: int, ordinal: int) -> Dataset:
        if ordinal >= len(self.components):
            raise IndexError(
                f"sample {sample_id} is of dataset {ordinal} of {len(self.components)}"
            )
        return self.components[ordinal].dataset

    def count_lengths(self) -> dict[str, str]:
        """Count the tokens of all training samples, where that was not done yet.

        Return name of each dataset -> digest of the builder that its counts are of.
        """
        for component in self.components:
            _ = component.dataset.lengths
        return {
            component.name: builder_digest(component.dataset.build) for component in self.components
        }

    @cached_property
    def template_digests(self) -> dict[str, str]:
        """Data set -> digest of its template's text, where that stands in a file.

        The file is no part of the config, so that a resume compares it by this. No index is opened.
        """
        parts = mixture.builders(self.blend or [], self._template, self._options)
        builders = {**parts, "train": self.train.build}
        templates = {name: getattr(build, "template", None) for name, build in builders.items()}
        return {name: t.digest for name, t in templates.items() if isinstance(t, JinjaTemplate)}

    def order(
        self,
        global_batch_size: int | BatchSizes,
        position: Mapping[str, Any] | None = None,
        segment_multiple: int = 1,
    ) -> Order:
        """Return the order of the training samples, from `position` where there is one."""
        settings = Settings(self.window)
        if self.pack:
            digests = self.count_lengths()
            # Where segments are not padded, a sample takes its tokens, however many texts it has.
            most = {c.name: c.dataset.build.most_texts for c in self.components}
            texts = {name: n for name, n in most.items() if n > 1 and segment_multiple > 1}
            settings = Settings(self.window, self.sequence_length, segment_multiple, digests, texts)
        return Order(self.components, self.seed, settings, global_batch_size, position)

    def end_of(self, samples: int, sizes: BatchSizes) -> str:
        """Return in words where a blend of so many samples ends."""
        steps = "" if self.pack else f", which are {sizes.steps_of(samples)} whole steps"
        return f"the blend ends after {samples} samples{steps}"

    def num_batches(self, split: str, global_batch_size: int) -> int:
        """Return the number of global batches in one pass; the last may be incomplete."""
        return -(-len(self._dataset(split)) // global_batch_size)

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the position of the training data before `step`; None on ranks that read nothing.

        Raises ValueError unless `step` is the one after the last that was read.
        """
        if self._position is not None and self._position["step"] != step:
            raise ValueError(f"the data is at step {self._position['step']}, not at {step}")
        return self._position

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
        global_batch_size: int | BatchSizes,
        micro_batch_size: int,
        rank: int = 0,
        size: int = 1,
        start: int = 0,
        position: Mapping[str, Any] | None = None,
        pad_multiple: int = 1,
        segment_multiple: int = 1,
        images: bool = False,
    ) -> Iterator[list[Batch]]:
        """Yield for each step, from `start`, the micro-batches of data-parallel rank `rank` of
        `size`.

        A global batch is assigned to ranks by cost, the same number of micro-batches to every rank,
        at every step. Training never ends; validation is one pass in the dataset's order, whose
        last global batch is filled up with blank samples of id -1.

        global_batch_size: one, or that of each step; validation takes the last of them.

        The log says what each data set has, and warns of one without images where `images`, as
        the model reads them.

        Raises ValueError for a batch size that does not divide.
        """
        dataset = self._dataset(split)
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} must be in [0, {size})")
        sizes = BatchSizes.of(global_batch_size)
        for key, samples in sizes.all:
            if micro_batch_size < 1 or samples % (micro_batch_size * size):
                raise ValueError(
                    f"{key}={samples} must be a multiple of "
                    f"trainer.micro_batch_size={micro_batch_size} x data-parallel size {size}"
                )
        order: Order | OnePass
        if split == "train":
            order = self.order(sizes, position, segment_multiple)
            if rank == 0 and order.size is not None:
                log.info(f"data: {self.end_of(order.size, sizes)}")
            numbered = {order.ordinals[c.name]: c.dataset for c in self.components}
            self._numbered = {number: name for name, number in order.ordinals.items()}
            stop = None
        else:
            order, numbered = OnePass(len(dataset), sizes.last), {0: dataset}
            stop = self.num_batches(split, sizes.last)
        damage = [line for item in numbered.values() for line in item.index.damage]
        for line in [*getattr(order, "changes", ()), *damage] if rank == 0 else ():
            log.info(f"data: {line}")
        if rank == 0 and split not in self._described:
            self._described.add(split)
            named = {self._numbered[number]: item for number, item in numbered.items()}
            self._describe(named if split == "train" else {split: dataset}, images)
        global_batches = GlobalBatches(
            datasets=numbered,
            order=order,
            micro_batch_size=micro_batch_size,
            rank=rank,
            size=size,
            pad_id=self.tokenizer.pad_id,
            pad_multiple=pad_multiple,
            segment_multiple=segment_multiple,
            packed=self.pack,
            planned=self.pack and split == "train",
            seed=self.seed if split == "train" and not self.pack else None,
        )
        return self._iterate(global_batches, StepNumbers(start, stop))

    def _describe(self, datasets: Mapping[str, Dataset], images: bool) -> None:
        """Log what the data sets have, from their indices."""
        seen: dict[str, str] = {}
        for name, dataset in datasets.items():
            both = [shard for shard in dataset.shards if shard in seen]
            seen |= dict.fromkeys(dataset.shards, name)
            if both:
                log.warning(f"data: {name} has {len(both)} shards that others have too: {both[0]}")
            line, has_pictures = dataset.contents()
            log.info(f"data: {name}: {line}")
            if images and not has_pictures:
                log.warning(f"data: {name} has no picture, and the model reads pictures")
        if not {"train", "validation"} <= self._described or "validation" not in datasets:
            return
        trained = {shard for component in self.components for shard in component.dataset.shards}
        if known := trained & {*datasets["validation"].shards}:
            log.warning(
                f"data: validation reads {len(known)} shards that are trained on: {min(known)}"
            )

    def _iterate(
        self, global_batches: GlobalBatches, numbers: StepNumbers
    ) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step; report its bad samples, remember its position."""
        for step in self._steps(global_batches, numbers):
            for sample_id, problem in step.problems:
                self._report(sample_id, problem)
            if step.position is not None:
                self._position, self._dropped = step.position, step.dropped
            yield step.batches

    def _steps(self, global_batches: GlobalBatches, numbers: StepNumbers) -> Iterator[Step]:
        """Yield the steps in order, computed in this process or by the workers."""
        if self.num_workers == 0:
            yield from (global_batches[k] for k in numbers)
            return
        # A fork of a process that has run threaded torch ops hangs in the child, so the workers
        # come from a fork server. It imports torch and the builders once, for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nvmm.data.loader", "nvmm.data.samples.instruct"])
        # Without a generator DataLoader draws its seed from torch's global state.
        yield from DataLoader(
            global_batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=self.num_workers,
            multiprocessing_context=context,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=partial(end_with, os.getpid()),
        )

    # -- bad samples, counters --------------------------------------------------------------

    def _report(self, sample_id: int, problem: str) -> None:
        """Log a bad sample once, or stop at it."""
        if self.on_error == "stop":
            raise ValueError(f"{problem} (data.on_error=stop)")
        ordinal, _, number = (int(field[()]) for field in sample_ids.split(sample_id))
        if (ordinal, number) not in self._reported:
            self._reported[ordinal, number] = problem
            log.warning(f"bad sample, left out: {problem}")

    def counter_names(self, modalities: Collection[str]) -> list[str]:
        """Return the keys of `count`, the same on every rank."""
        media = [f"{modality}.{unit}" for modality in modalities for unit in ("items", "tiles")]
        return [f"{name}/{counter}" for name in self.datasets for counter in (*COUNTERS, *media)]

    def count(self, batches: Sequence[Batch], modalities: Collection[str]) -> dict[str, float]:
        """Count what micro-batches hold of each dataset: "<dataset>/<counter>", for all datasets.

        The batches are those of the training step that was read last, whose samples left out
        "dropped" media.

        modalities: the media to count, in items ("image.items") and tiles ("image.tiles").
        """
        counts = dict.fromkeys(self.counter_names(modalities), 0.0)
        for batch in batches:
            samples = batch.sample_ids.cpu().numpy()
            values = {
                "samples": samples >= 0,
                "tokens": np.where(samples >= 0, batch.sample_lengths.cpu().numpy(), 0),
                "bad": samples < sample_ids.FILLING,
            }
            for modality in modalities:
                items, tiles = batch.count_media(modality).cpu().numpy()
                values |= {f"{modality}.items": items, f"{modality}.tiles": tiles}
            ordinals = sample_ids.split(samples)[0]
            for ordinal in np.unique(ordinals[samples != sample_ids.FILLING]).tolist():
                for counter, value in values.items():
                    total = float(value[ordinals == ordinal].sum())
                    counts[f"{self._numbered[ordinal]}/{counter}"] += total
        for ordinal, number in self._dropped.items():
            counts[f"{self._numbered[ordinal]}/dropped"] += number
        return counts

    def check_bad(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """Raise ValueError when too many of the samples of a run were bad.

        totals: dataset -> its counters (COUNTERS) since the run's first step, over all ranks.
        """
        bad = sum(counts["bad"] for counts in totals.values())
        seen = bad + sum(counts["samples"] for counts in totals.values())
        all_bad = bad == seen > _ALL_BAD and self.max_bad_fraction < 1
        if all_bad or bad > self.max_bad_fraction * max(seen, _FEW):
            listed = ", ".join(
                f"{name}: {counts['bad']:.0f} of {counts['bad'] + counts['samples']:.0f}"
                for name, counts in totals.items()
            )
            last = "".join(
                f"; the last is {problem}" for problem in [*self._reported.values()][-1:]
            )
            raise ValueError(
                f"{bad:.0f} of {seen:.0f} samples are bad, more than"
                f" data.max_bad_fraction={self.max_bad_fraction} ({listed}); the log has each"
                f" one's shard, key and reason{last}"
            )
