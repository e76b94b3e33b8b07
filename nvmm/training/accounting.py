"""Count tokens, samples, images and FLOPs of a run's steps, and of each dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from nvmm.batch import Batch
from nvmm.config.batch_sizes import BatchSizes
from nvmm.modules.flops import segment_lengths
from nvmm.parallel.broadcast import is_reader
from nvmm.training.metrics import memory_peak_bytes


class Digested(Protocol):
    """A tokenizer, as far as a checkpoint knows it."""

    @property
    def digest(self) -> str: ...

    def is_of(self, digest: str) -> bool: ...


class TrainingData(Protocol):
    """The interface of a run's data: `nvmm.data.loader.Data`, or synthetic batches."""

    @property
    def tokenizer(self) -> Digested:
        """The tokenizer, whose digest a resume compares."""
        ...

    @property
    def template_digests(self) -> Mapping[str, str]:
        """Digests of the chat templates whose text stands in files, which a resume compares."""
        ...

    @property
    def sequence_length(self) -> int:
        """Tokens of a full row."""
        ...

    @property
    def log_samples(self) -> bool:
        """True when the log lists the sample ids of every step."""
        ...

    def counter_names(self, modalities: Collection[str]) -> Collection[str]:
        """Return the keys of `count`: "<dataset>/<counter>"."""
        ...

    def batches(
        self,
        *,
        split: str,
        global_batch_size: int | BatchSizes,
        micro_batch_size: int,
        rank: int,
        size: int,
        start: int,
        position: Mapping[str, Any] | None,
        pad_multiple: int,
        segment_multiple: int,
        images: bool,
    ) -> Iterator[list[Batch]]:
        """Yield, from step `start` on, the micro-batches of data-parallel rank `rank` of `size`.

        global_batch_size: one, or that of each step. images: the model reads images, so that data
        without any are worth a warning.
        """
        ...

    def num_batches(self, split: str, global_batch_size: int) -> int:
        """Return the global batches of one pass over a split."""
        ...

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the place before `step`, from which `batches` goes on after a resume."""
        ...

    def count(self, batches: list[Batch], modalities: Collection[str]) -> dict[str, float]:
        """Count each dataset's share of micro-batches; modalities: of the media counted."""
        ...

    def check_bad(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """Raise ValueError when too many samples of the run were bad; dataset -> counters."""
        ...


@dataclass(frozen=True)
class StepResult:
    """The results of a step: the objective's reduced means, summed counters, norm and rate.

    sample_ids: of all ranks, sorted, where the data ask for them to be logged.
    """

    metrics: dict[str, float]
    counters: dict[str, float]
    grad_norm: float
    learning_rate: float
    sample_ids: list[int] | None = None


class Accounting:
    """The counts of one run.

    Args:
        data: counts its datasets and stops a run with too many bad samples.
        model: this rank's first chunk, which knows what it reads and its FLOPs.
        peak_flops: of one device, for the utilisation; None where it is not known.
    """

    def __init__(self, data: TrainingData, model: Any, peak_flops: float | None) -> None:
        self.data = data
        self.model = model
        self.modalities = sorted({kind.modality for kind in self.model.reads})
        self.peak_flops = peak_flops
        names = ("samples", "tokens", "skipped_steps", "consecutive_skips")
        self.totals: dict[str, Any] = dict.fromkeys(names, 0) | {"datasets": {}}

    def restore(self, totals: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        for counts in totals.get("datasets", {}).values():
            for old, new in _OLD_COUNTERS.items():
                if old in counts:
                    counts[new] = counts.pop(old)
        self.totals |= totals

    def count(self, batches: list[Batch]) -> dict[str, float]:
        """Return what this rank adds to the step's counters: its replica's batches, or zeros.

        Every context-parallel rank's group reads the same batches: the first one counts.
        """
        names = ["tokens", "padded_tokens", "samples"]
        for modality in self.modalities:
            names += [f"{modality}.items", f"{modality}.tiles", f"flops/{modality}"]
        counts = dict.fromkeys([*names, "flops/language"], 0.0)
        if not _speaks_for_replica():
            return counts | dict.fromkeys(self.data.counter_names(self.modalities), 0.0)
        for batch in batches:
            counts["tokens"] += sum(segment_lengths(batch))
            counts["padded_tokens"] += batch.tokens.numel()
            counts["samples"] += int((batch.sample_ids >= 0).sum())
            for modality in self.modalities:
                items, tiles = batch.count_media(modality).sum(1).tolist()
                counts[f"{modality}.items"] += items
                counts[f"{modality}.tiles"] += tiles
            for part, flops in self.model.flops(batch).items():
                counts[f"flops/{part}"] += flops
        return counts | self.data.count(batches, self.modalities)

    def add(self, counters: dict[str, float]) -> None:
        """Add a step's counters, summed over all ranks; too many bad samples stop the run."""
        self.totals["samples"] += int(counters["samples"])
        self.totals["tokens"] += int(counters["tokens"])
        datasets = self.totals["datasets"]
        for name in self.data.counter_names(self.modalities):
            dataset, _, counter = name.rpartition("/")
            of_dataset = datasets.setdefault(dataset, {})
            of_dataset[counter] = of_dataset.get(counter, 0) + int(counters[name])
        self.data.check_bad(datasets)

    def sample_ids(self, batches: list[Batch]) -> list[int]:
        """Return the step's sample ids on all ranks, negative for empty slots; collective."""
        local: list[int] = []
        if _speaks_for_replica():
            local = [i for batch in batches for i in batch.sample_ids.tolist()]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, local)
        return sorted(i for ids in gathered for i in ids)

    def record(self, step: int, seconds: dict[str, float], result: StepResult) -> dict[str, Any]:
        """Return a step as one object of metrics.jsonl."""
        counters = result.counters
        tokens, samples = int(counters["tokens"]), int(counters["samples"])
        flops = {part: counters[f"flops/{part}"] for part in ("language", *self.modalities)}
        peak = self.peak_flops
        elapsed = seconds["step_seconds"]
        record = {
            "step": step,
            "loss": result.metrics["loss"],
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "num_tokens": tokens,
            "num_samples": samples,
            "media": {
                modality: {
                    "items": int(counters[f"{modality}.items"]),
                    "tiles": int(counters[f"{modality}.tiles"]),
                }
                for modality in self.modalities
            },
            "packing_efficiency": tokens / counters["padded_tokens"],
            "tokens_per_second": tokens / elapsed,
            "samples_per_second": samples / elapsed,
            **seconds,
            "memory_peak_bytes": memory_peak_bytes(),
            "skipped_steps": self.totals["skipped_steps"],
            "model_flops": flops,
            "mfu": sum(flops.values()) / (elapsed * peak * dist.get_world_size()) if peak else None,
            "datasets": self.totals["datasets"],
        }
        if result.sample_ids is not None:
            record["sample_ids"] = result.sample_ids
        return record | result.metrics


_OLD_COUNTERS = {"images": "image.items", "tiles": "image.tiles"}
"""Names in checkpoints that were written before counters had a modality."""


def _speaks_for_replica() -> bool:
    return is_reader() and parallel_state.get_context_parallel_rank() == 0
