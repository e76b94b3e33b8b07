"""Vectors of the sounds in shards, and which of them are of one file and of one data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from nvmm.data.samples.bad_sample import blamed
from nvmm.data.samples.clip_shots import only_clip
from nvmm.data.samples.decode import Limits
from nvmm.data.samples.record import Fields, Record
from nvmm.data.samples.sounds import MARGIN, FrontEnd
from nvmm.data.shards.dataset import Dataset
from nvmm.inference.restore import Restored
from nvmm.inference.sound_encoder import SoundEncoder, restore_sound_encoder
from nvmm.jobs.job import Job, Work, digest
from nvmm.jobs.prompts import samples_digest

READ = ("within", "file", "fields", "unread")
"""Parameters that say how a sample is read."""


@dataclass(frozen=True)
class Sounds:
    """The samples of shards as sounds.

    shards: file patterns of tar shards, of samples with one clip each.
    within: keys of the record; sounds with the same values are of one group. A key that a record
        lacks has the value null; the job's metrics say how many lack each.
    file: key of the record that names the sound's file; a record without it is known by the digest
        of its sound's bytes.
    fields, unread: see `nvmm.data.samples.builder.Builder`.
    """

    shards: str | Sequence[str]
    within: Sequence[str]
    file: str
    fields: Fields
    unread: Sequence[str]

    @cached_property
    def dataset(self) -> Dataset:
        """The shards' samples; nothing builds them."""
        return Dataset(self.shards, build=None)  # type: ignore[arg-type]

    @cached_property
    def names(self) -> list[str]:
        """SHARD:KEY of every sample. Raises ValueError for two shards of one name."""
        shards = [Path(shard).name for shard in self.dataset.shards]
        if twice := [name for name, count in Counter(shards).items() if count > 1]:
            raise ValueError(
                f"{twice[0]} is the name of two shards, and samples are named by shard and key:"
                " rename one"
            )
        index = self.dataset.index
        of_samples = index.columns["shard"].tolist()
        return [f"{shards[shard]}:{index.key(n)}" for n, shard in enumerate(of_samples)]

    def read(self, number: int) -> Record:
        """Return the record of a sample. Raises BadSample where its bytes are damaged."""
        return self.record(self.dataset.members(number))

    def record(self, members: Any) -> Record:
        """Return a sample's record under our names of fields."""
        return Record(members, self.fields, Limits(), self.unread)

    def facts(self, record: Record, clip: dict[str, Any]) -> dict[str, str]:
        """Return what tells a sound's file and its group."""
        data = record.sound_bytes("sound", clip.get("sound"))
        name = record.values.get(self.file)
        known = hashlib.sha256(data).hexdigest() if name is None else f"{self.file}:{name}"
        values = [record.values.get(key) for key in self.within]
        return {"file": known, "group": json.dumps(values)}


@dataclass(frozen=True)
class EncodeSounds(Job):
    """Embed the sound of every sample of shards by the audio encoder of a checkpoint.

    A row has `key`, `file` and `group` (see `Sounds`), `vector`, the mean over the front end's
    windows, not normalised, and `error`: why it has no vector, else null. Audio Flamingo embeds the
    first 10 s by LAION-CLAP's encoder: configs/front_end/laion_clap.yaml.

    Args:
        shards, within, file, fields, unread: see `Sounds`.
        encoder: a checkpoint or run directory: an encoder that was imported alone (CLAP's), or a
            model with sounds.
        front_end: what an imported encoder hears; None: that of the checkpoint's training.
        batch_size: windows of a forward pass, but for a sound that has more.
        part_size: samples of a part file.
    """

    shards: str | Sequence[str]
    encoder: str
    front_end: FrontEnd | None = None
    within: Sequence[str] = ("dataset", "task")
    file: str = "file"
    fields: Fields = dataclasses.field(default_factory=dict)
    unread: Sequence[str] = ()
    batch_size: int = 32
    part_size: int = 1024
    name: str = "encode_sounds"

    def prepare(self, model: Restored | None) -> Work:
        """Open the shards and the encoder."""
        from megatron.core import parallel_state

        if model is not None:
            raise ValueError("job=encode_sounds reads job.encoder; leave checkpoint= out")
        sounds = Sounds(self.shards, self.within, self.file, self.fields, self.unread)
        dataset = sounds.dataset
        sizes = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        }
        encoder = restore_sound_encoder(self.encoder, self.front_end, sizes)

        def rows(numbers: range) -> pa.Table:
            found: list[dict[str, Any]] = []
            waiting: dict[int, Tensor] = {}
            for number in numbers:
                row: dict[str, Any] = {"key": dataset.index.key(number)}
                found.append(row)
                try:
                    members = dataset.members(number)
                    with blamed(f"{members['__url__']}:{members['__key__']}"):
                        row |= self._read(sounds, members, encoder.front_end, waiting, number)
                except ValueError as error:
                    row["error"] = str(error)
                newest = waiting.pop(number, None)
                if newest is None:
                    continue
                if sum(map(len, waiting.values())) + len(newest) > self.batch_size:
                    _embed(encoder, waiting, found, numbers.start)
                waiting[number] = newest
            _embed(encoder, waiting, found, numbers.start)
            return pa.Table.from_pylist(found, _schema(encoder.size))

        inputs = {
            "items": samples_digest(dataset),
            "weights": encoder.weights,
            "front_end": digest(dataclasses.asdict(encoder.front_end)),
            "read": {key: getattr(self, key) for key in READ},
        }
        return Work(len(dataset), inputs, rows)

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return the share of sounds whose record lacks a key of `within`: null is their value, and
        a key that none has keeps no data sets apart."""
        counts = rows["group"].drop_null().value_counts().to_pylist()
        values = [(json.loads(each["values"]), each["counts"]) for each in counts]
        total = sum(count for _, count in values)
        return {
            f"without_{key}": sum(n for group, n in values if group[place] is None) / max(1, total)
            for place, key in enumerate(self.within)
        }

    @staticmethod
    def _read(
        sounds: Sounds, members: Any, front_end: FrontEnd, waiting: dict[int, Tensor], number: int
    ) -> dict[str, str]:
        """Put a sound's windows to those that wait; return its facts."""
        record = sounds.record(members)
        clip = only_clip(record)
        facts = sounds.facts(record, clip)
        heard = record.sound(
            "sound",
            clip["sound"],
            clip.get("start") or 0,
            front_end.seconds + MARGIN,
            front_end.channel,
        )
        waiting[number] = front_end(heard, f"{record.source}: member {clip['sound']}")
        return facts


def _embed(
    encoder: SoundEncoder, waiting: dict[int, Tensor], rows: list[dict[str, Any]], first: int
) -> None:
    """Give the rows of the sounds that wait their vectors, or an error; nothing waits then."""
    if not waiting:
        return
    vectors = encoder(list(waiting.values()))
    for number, vector in zip(waiting, vectors, strict=True):
        row = rows[number - first]
        if bool(torch.isfinite(vector).all()):
            row["vector"] = vector.numpy()
        else:
            row["error"] = f"{row['key']}: its vector is not finite"
    waiting.clear()


def _schema(size: int) -> pa.Schema:
    return pa.schema(
        {
            "key": pa.string(),
            "file": pa.string(),
            "group": pa.string(),
            "vector": pa.list_(pa.float32(), size),
            "error": pa.string(),
        }
    )
