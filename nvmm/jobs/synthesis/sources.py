"""Steps that begin a pipeline: texts of the config, and records of files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import read_lines
from nvmm.data.shards.dataset import Dataset
from nvmm.jobs.parts import Parts
from nvmm.jobs.synthesis.records import OWN, Made, Record, child
from nvmm.jobs.synthesis.step import Desk, Local


@dataclass(frozen=True, kw_only=True)
class Seeds(Local):
    """Records of one field each, from a list in the config: topics, keywords.

    values: their texts. into: the field.
    """

    values: Sequence[str]
    into: str

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return the texts; ValueError where there are records before it."""
        _require_none(records, desk)
        return list(self.values)

    def change(self, item: Any, desk: Desk) -> Made:
        """Return a record of a text."""
        return Made([child(desk.step, [], {self.into: str(item)}, source="config")])


@dataclass(frozen=True, kw_only=True)
class Read(Local):
    """Records of files: documents, prompts, problems with their solutions.

    files: patterns of .jsonl files, or of tar shards, whose `json` and `txt` (as `text`) are read.
    fields: our name -> theirs, of those that are taken; the first is required, and a record without
        it is left out. longest: characters after which its text is cut; null: none is.
    """

    files: str | Sequence[str]
    fields: Mapping[str, str]
    longest: int | None = None

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("fields={} takes nothing; give {our name: theirs, ...}")

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return (where it stands, the record) of all files."""
        _require_none(records, desk)
        patterns = [self.files] if isinstance(self.files, str) else list(self.files)
        return [list(item) for pattern in patterns for item in _records(pattern)]

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the fields that are taken."""
        place, record = item
        first, *others = self.fields
        value = record.get(self.fields[first])
        if value is None or value == "":
            return Made([], [f"{place}: no {self.fields[first]}"])
        if self.longest is not None and isinstance(value, str):
            value = value[: self.longest]
        taken = {first: value} | {name: record.get(self.fields[name]) for name in others}
        return Made([child(desk.step, [], taken, source=place)])


@dataclass(frozen=True, kw_only=True)
class Records(Local):
    """The records that a step of another pipeline has made, as they are, with their lineage.

    folder: OUTPUT/steps/NAME of that pipeline.
    """

    folder: str

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return the records; ValueError for a folder that is no whole step."""
        _require_none(records, desk)
        table = Parts(Path(self.folder).expanduser()).read()
        if "records" not in table.column_names:
            raise ValueError(f"folder={self.folder} is no step of a pipeline: it has no records")
        return [json.loads(text) for texts in table["records"].to_pylist() for text in texts]

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the record."""
        return Made([item])


def _require_none(records: list[Record], desk: Desk) -> None:
    if records:
        raise ValueError(
            f"job.steps.{desk.step} begins a pipeline, and takes no records: add after=[]"
        )


def _records(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each record stands and the record; ValueError for what cannot be read."""
    if pattern.endswith(".tar"):
        dataset = Dataset(pattern, dict)
        for number in range(len(dataset)):
            members = dataset.members(number)
            place = f"{Path(str(members['__url__'])).name}:{members['__key__']}"
            try:
                record = json.loads(members["json"]) if "json" in members else {}
                if "txt" in members:
                    record = {"text": members["txt"].decode(), **record}
            except (ValueError, TypeError) as error:
                raise ValueError(f"{members['__url__']}: {place} is damaged ({error})") from error
            yield place, record
        return
    paths = sorted(glob(str(Path(pattern).expanduser())))
    if not paths:
        raise ValueError(f"files: pattern {pattern} matches no file")
    for path in paths:
        for number, record in enumerate(read_lines(path), 1):
            name = f"{Path(path).name}:{number}"
            yield name, {key: value for key, value in record.items() if key not in OWN}
