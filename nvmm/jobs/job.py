"""A job makes rows of items, part by part, with or without a checkpoint, and can be stopped.

The ranks of one model-parallel group make a part together; the groups share the parts. Which rows
a part has, and which items a forward pass sees, follow from the items alone. So a job that was
killed goes on at another number of ranks, and its files are those of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch.distributed as dist

from nvmm.data.shards.dataset import builder_digest
from nvmm.io import files
from nvmm.io.progress import progress
from nvmm.jobs.parts import Parts

if TYPE_CHECKING:
    from nvmm.data.prepare.mbeir import Item
    from nvmm.inference.restore import Restored

_READERS = 8
"""Threads that read pictures: a file system on a network has its answers by then."""


@dataclass(frozen=True)
class Work:
    """A job that is ready to make its rows.

    size: its items, which are numbered from 0. inputs: digests of them, as JSON. rows: makes the
        rows of these items, one each, in order; the ranks of a model-parallel group call it
        together.
    together: all ranks call `rows` for every part and get the same; else groups share the parts.
    """

    size: int
    inputs: Any
    rows: Callable[[range], pa.Table]
    together: bool = False


class Job(ABC):
    """A choice of `job=`. Its constructor's parameters are all that its rows depend on, besides
    the checkpoint and the items.

    name: the folder of the output. part_size: items of a part.
    """

    name: str
    part_size: int

    @property
    def build(self) -> dict[str, Any]:
        """The parameters of the checkpoint's sample builder, `_target_` too, that are others."""
        return {}

    @abstractmethod
    def prepare(self, model: Restored | None) -> Work:
        """Open the items. Raises ValueError where they, or a checkpoint, cannot be used."""

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return scores of the whole output for metrics.json; by default there are none."""
        return {}

    def run(
        self, settings: Mapping[str, Any], model: Restored | None, output: str | Path
    ) -> dict[str, Any]:
        """Make the rows that are missing; see the function `run`."""
        return run(self, settings, model, output)

    def require(self, model: Restored | None) -> Restored:
        """Return the model; ValueError where no checkpoint was given."""
        if model is None:
            raise ValueError(f"job={self.name} needs checkpoint=DIR")
        return model


def run(
    job: Job, settings: Mapping[str, Any], model: Restored | None, output: str | Path
) -> dict[str, Any]:
    """Make the rows that are missing; collective.

    Returns the summary: folder, rows, written, bad (rows with an `error`), first_error, metrics.

    settings: the job's parameters and what else of the command its rows depend on, as JSON.

    Raises ValueError when the folder belongs to another job, or another process works in it.
    """
    from megatron.core import parallel_state

    for name in ("part_size", "batch_size"):
        if (value := getattr(job, name, 1)) < 1:
            raise ValueError(f"job.{name}={value} must be at least 1")
    work = job.prepare(model)
    if not work.size:
        raise ValueError(f"job={job.name} has no items")
    facts = {**settings, "inputs": work.inputs, "checkpoint": identity(model)}
    folder = Path(output).expanduser()
    first = dist.get_rank() == 0
    group, groups = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    writes = dist.get_rank(parallel_state.get_model_parallel_group()) == 0
    with contextlib.ExitStack() as stack:
        # 1. Rank 0 looks at the folder and keeps others out; a refusal reaches every rank.
        missing: list[int] = []
        refusal = None
        if first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(folder))
                parts = Parts.begin(folder, work.size, job.part_size, facts)
                missing = parts.missing()
                if missing and parts.manifest["parts"] is not None:
                    parts.reopen(missing)
            except ValueError as error:
                refusal = str(error)
        shared: list[Any] = [missing, refusal]
        dist.broadcast_object_list(shared, src=0)
        missing, refusal = shared
        if refusal is not None:
            raise ValueError(refusal)
        # 2. Each group makes its share of the missing parts, or all make each of them.
        if work.together:
            writes, group, groups = writes and group == 0, 0, 1
        parts = Parts(folder)
        total = sum(len(parts.numbers(part)) for part in missing)
        quiet = not first or not total
        with progress(total, job.name, "item", rate=True, disable=quiet) as bar:
            for part in missing[group::groups]:
                numbers = parts.numbers(part)
                rows = work.rows(numbers)
                if writes:
                    parts.write(part, rows)
                # The other groups are about as far.
                bar.update(min(len(numbers) * groups, total - bar.n))
        # 3. All are there: the manifest says so.
        dist.barrier()
        if first and parts.manifest["parts"] is None:
            parts.finish()
        dist.barrier()
    rows = Parts(folder).read(verify=False)  # Every part was compared or written above.
    metrics = job.metrics(rows)
    if first and metrics:
        files.write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    bad = [] if "error" not in rows.column_names else rows["error"].drop_null().to_pylist()
    return {
        "folder": str(folder),
        "rows": len(rows),
        "written": total,
        "bad": len(bad),
        "first_error": bad[0] if bad else None,
        "metrics": metrics,
    }


def digest(*values: Any) -> str:
    """Return a digest of values that JSON can write."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def items_digest(items: Mapping[str, Item]) -> str:
    """Return a digest of ids and texts of items, and of which have a picture."""
    return digest([(name, item.text, item.image is not None) for name, item in items.items()])


def pictures_digest(paths: Sequence[str | None]) -> str:
    """Return a digest of the content of pictures; collective, the data-parallel ranks share them.

    paths: of the items, None for one without a picture. One that cannot be read counts as such, so
    that it is noticed when it is there later.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    numbers = [number for number, path in enumerate(paths) if path is not None]
    own = numbers[dist.get_rank(group) :: dist.get_world_size(group)]

    def value(number: int) -> int:
        try:
            content = file_digest(str(paths[number]))
        except ValueError:
            content = "unreadable"
        return int(digest(number, content), 16)

    # A sum does not depend on who adds what.
    quiet = dist.get_rank() != 0
    with (
        ThreadPoolExecutor(_READERS) as pool,
        progress(len(own), "pictures", "picture", delay=5, disable=quiet) as bar,
    ):
        total = 0
        for one in pool.map(value, own):
            total += one
            bar.update()
    totals: list[Any] = [0] * dist.get_world_size(group)
    dist.all_gather_object(totals, total, group=group)
    return digest(len(numbers), hex(sum(totals)))


def file_digest(path: str | Path) -> str:
    """Return a digest of a file's content; ValueError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def identity(model: Restored | None) -> dict[str, Any] | None:
    """Return what rows depend on in a checkpoint: weights, graph, tokenizer, sample builder."""
    if model is None:
        return None
    from nvmm.checkpoint.base import BaseCheckpoint
    from nvmm.checkpoint.files import read_state

    config = read_state(model.path)["config"]
    return {
        "weights": BaseCheckpoint.of(model.path).digest,
        "model": digest(config["model"], config.get("lora")),
        "tokenizer": model.tokenizer.digest,
        "builder": builder_digest(model.builder),
    }


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; ValueError where one works in it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(folder / ".lock", wait=False, required=False))
        except BlockingIOError as error:
            raise ValueError(f"another job works in {folder}; give another output=DIR") from error
        yield
