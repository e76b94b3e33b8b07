"""Few-shot samples: each sound behind solved ones of the training split that sound like it.

Audio Flamingo (arXiv:2402.01831) searches by exact L2 distance within one data set and task, drops
the query's own file, keeps one row a file, shuffles the nearest ones and puts the query last.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from nvmm.config.choices import require
from nvmm.data.samples.clip_shots import joined
from nvmm.data.samples.clip_words import Interleaved
from nvmm.inference.restore import Restored
from nvmm.io import files
from nvmm.jobs import job as jobs
from nvmm.jobs.encode_sounds import READ, Sounds
from nvmm.jobs.job import Job, Work, alone, digest, file_digest
from nvmm.jobs.neighbours import Pool, Query, check_columns, neighbours, queries_of
from nvmm.jobs.parts import Parts, recorded
from nvmm.jobs.prompts import samples_digest
from nvmm.jobs.synthesis.asking import on_first_rank

NEIGHBOURS = "neighbours.jsonl"
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "neighbours": pa.list_(pa.string()),
        "distances": pa.list_(pa.float32()),
        "shard": pa.string(),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class FewShot:
    """Make few-shot samples of sounds, with the vectors that `encode_sounds` wrote.

    A row has `id` (SHARD:KEY of the asked sample), `neighbours` (those of the solved ones, the
    nearest first), their `distances` (squared L2; NaN where they are drawn), `shard` (digest of the
    part's shard), and `error`: why there is no sample, else null. The folder `shards` has the
    samples, a shard a part, with the solved ones shuffled. neighbours.jsonl has the rows without
    error, for benchmark=sounds_few_shot.

    Args:
        shards: the samples that are asked about, of any split.
        vectors: output of `encode_sounds` for them.
        train: the samples that are solved before them. train_vectors: the same for these.
        num_samples: sounds of a sample, the asked one too; fewer where its group has not as many.
        mode: similar: the nearest; random: a draw.
        normalize: bring vectors to length 1 first; Audio Flamingo does not.
        seed: the draws of a sample depend on it and the sample's key alone.
        part_size: samples of a part, and of a shard.
    """

    shards: str | Sequence[str]
    vectors: str
    train: str | Sequence[str]
    train_vectors: str
    num_samples: int = 8
    mode: Interleaved = "similar"
    normalize: bool = False
    seed: int = 1234
    part_size: int = 256
    name: str = "few_shot"
    build: Mapping[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        require("job.mode", self.mode, Interleaved)
        if self.num_samples < 2:
            raise ValueError(
                f"job.num_samples={self.num_samples} must be at least 2: a solved sound and the one"
                " that is asked about"
            )
        if self.normalize and self.mode == "random":
            raise ValueError("job.normalize=true does nothing with job.mode=random, which draws")

    def run(
        self, settings: Mapping[str, Any], model: Restored | None, output: str | Path
    ) -> dict[str, Any]:
        """Make the rows and shards that are missing; see `nvmm.jobs.job.run`."""
        if model is not None:
            raise ValueError("job=few_shot reads vectors; leave checkpoint= out")
        folder = Path(output).expanduser()
        on_first_rank(partial(_forget_damaged, folder))
        summary = jobs.run(_Samples(self, folder), settings, None, folder)
        on_first_rank(partial(self._write_neighbours, folder))
        return summary

    def _write_neighbours(self, folder: Path) -> None:
        rows = Parts(folder).read(verify=False).select(["id", "neighbours", "error"])
        lines = [
            {"id": row["id"], "interleaved": self.mode, "neighbours": row["neighbours"]}
            for row in rows.to_pylist()
            if row["error"] is None
        ]
        files.write(folder / NEIGHBOURS, "".join(f"{json.dumps(line)}\n" for line in lines))


class _Samples(Job):
    """The rows of a `FewShot`; the shards go to the same folder."""

    def __init__(self, options: FewShot, folder: Path) -> None:
        self.name, self.part_size = options.name, options.part_size
        self.options, self.folder = options, folder

    def prepare(self, model: Restored | None) -> Work:
        """Open shards and vectors. Raises ValueError where they do not fit each other."""
        from megatron.core import parallel_state

        options = self.options
        asked = _Encoded.open(options.shards, options.vectors, "vectors")
        train = _Encoded.open(options.train, options.train_vectors, "train_vectors")
        asked.require_alike(train)
        pool = Pool(train.table, options.normalize)
        writes = dist.get_rank(parallel_state.get_model_parallel_group()) == 0

        def rows(numbers: range) -> pa.Table:
            made: list[dict[str, Any]] = []
            samples = self._samples(asked, train, pool, numbers, made)
            shard = _write(self._shard(numbers), samples) if writes else None
            for _ in samples:  # A rank that does not write has the rows alone.
                pass
            return pa.Table.from_pylist([row | {"shard": shard} for row in made], _SCHEMA)

        inputs = {
            "samples": digest(asked.sounds.names, train.sounds.names),
            "vectors": [asked.digest, train.digest],
        }
        return Work(len(asked.sounds.dataset), inputs, rows)

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return solved sounds a sample, and the share of samples with fewer than wanted."""
        counts = [len(some) for some in rows["neighbours"].drop_null().to_pylist()]
        wanted = self.options.num_samples - 1
        few = sum(count < wanted for count in counts)
        return {
            "shots_per_sample": sum(counts) / max(1, len(counts)),
            "samples_with_fewer": few / max(1, len(counts)),
        }

    def _shard(self, numbers: range) -> Path:
        """Return the file of the samples of a part."""
        return shard_of(self.folder, numbers.start // self.part_size)

    def _samples(
        self,
        asked: _Encoded,
        train: _Encoded,
        pool: Pool,
        numbers: range,
        rows: list[dict[str, Any]],
    ) -> Iterator[dict[str, bytes | str]]:
        """Yield the samples of a part, and put a row for each of its numbers to `rows`."""
        queries = queries_of(asked.table.slice(numbers.start, len(numbers)), self.options.seed)
        found = self._neighbours(queries, pool)
        for number, query, near in zip(numbers, queries, found, strict=True):
            row: dict[str, Any] = {"id": asked.sounds.names[number]}
            rows.append(row)
            try:
                if isinstance(query, str):
                    raise ValueError(query)
                if not near:
                    raise ValueError(
                        f"{row['id']}: job.train has no sound of another file in its group"
                        f" {query.group}"
                    )
                shots = [shot for shot, _ in near]
                random.Random(f"{query.draw}/order").shuffle(shots)
                solved = [train.sounds.read(shot) for shot in shots]
                members = joined(asked.sounds.read(number), solved, self.options.mode)
            except ValueError as error:
                row["error"] = str(error)
                continue
            row["neighbours"] = [train.sounds.names[shot] for shot, _ in near]
            row["distances"] = [distance for _, distance in near]
            yield {"__key__": f"{number:08d}", **members}

    def _neighbours(
        self, queries: Sequence[Query | str], pool: Pool
    ) -> list[list[tuple[int, float]]]:
        """Return the solved sounds of each query; none where it is an error."""
        ranked = pool.nearest if self.options.mode == "similar" else pool.drawn
        found: list[list[tuple[int, float]]] = [[] for _ in queries]
        groups: dict[str, list[int]] = {}
        for place, query in enumerate(queries):
            if isinstance(query, Query) and query.group in pool.groups:
                groups.setdefault(query.group, []).append(place)
        for group, places in groups.items():
            some = [query for place in places if isinstance(query := queries[place], Query)]
            count, most = self.options.num_samples - 1, len(pool.groups[group])
            near = neighbours(some, ranked, pool.files, most, count)
            for place, one in zip(places, near, strict=True):
                found[place] = one
        return found


@dataclass(frozen=True)
class _Encoded:
    """The samples of shards with their rows of `encode_sounds`.

    folder: the output. identity: of the job that wrote it. digest: of its manifest.
    """

    sounds: Sounds
    table: pa.Table
    folder: str
    identity: dict[str, Any]
    digest: str

    @staticmethod
    def open(shards: str | Sequence[str], folder: str, key: str) -> _Encoded:
        """Open both. Raises ValueError where they are not of each other."""
        path = Path(folder).expanduser()
        parts = Parts(path)
        table = parts.read()
        check_columns(table, folder)
        identity = parts.manifest["identity"]
        sounds = Sounds(shards, **{name: identity["inputs"]["read"][name] for name in READ})
        if recorded(identity, folder, "inputs", "items") != samples_digest(sounds.dataset):
            raise ValueError(f"job.{key}={folder} has vectors of other samples than {shards}")
        return _Encoded(sounds, table, folder, identity, file_digest(path / "manifest.json"))

    def require_alike(self, other: _Encoded) -> None:
        """Raise ValueError for vectors of two encoders or front ends, and for two ways to read."""
        for fact in ("weights", "front_end", "read"):
            first = recorded(self.identity, self.folder, "inputs", fact)
            second = recorded(other.identity, other.folder, "inputs", fact)
            if first != second:
                raise ValueError(
                    f"{self.folder} and {other.folder} differ in {fact} of job=encode_sounds:"
                    f" {first[:60]} and {second[:60]}"
                )


def shard_of(folder: Path, part: int) -> Path:
    """Return the shard of a part of an output."""
    return folder / "shards" / f"few_shot-{part:05d}.tar"


def _write(path: Path, samples: Iterator[dict[str, bytes | str]]) -> str | None:
    """Write samples to a shard, whole or not at all; return its digest, None without samples."""
    from webdataset.writer import TarWriter

    first = next(samples, None)
    path.unlink(missing_ok=True)
    if first is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        files.publish(path, shared=True) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for sample in itertools.chain([first], samples):
            tar.write(sample)
    return file_digest(path)


def _forget_damaged(folder: Path) -> None:
    """Remove the parts whose shard is gone or has other bytes, so that both are made again."""
    if not (folder / "manifest.json").exists():
        return
    # Whatever keeps the folder from being read is told by the job itself.
    with suppress(ValueError), alone(folder):
        parts = Parts(folder)
        for part in range(parts.count):
            try:
                with pa.memory_map(str(parts.path(part))) as file:
                    saved = pa.ipc.open_file(file).read_all()["shard"][0].as_py()
                if saved is not None and file_digest(shard_of(folder, part)) != saved:
                    raise ValueError
            except (ValueError, OSError, pa.ArrowException):
                parts.path(part).unlink(missing_ok=True)
