"""The output of a job: a table in numbered part files, each whole or absent, and its manifest.

A folder holds `part-00000.arrow`, `part-00001.arrow`, ... in Arrow's IPC format, which is read
memory-mapped, and `manifest.json`, which says what the rows depend on and has every part's digest.
Until all parts are there, a part's digest lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from nvmm.config.nested import differences
from nvmm.io import files


@dataclass(frozen=True)
class Parts:
    """The parts of one folder: `part_size` rows each, fewer in the last."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path, size: int, part_size: int, identity: Mapping[str, Any]) -> Parts:
        """Open a folder for `size` rows, made where it is missing, or go on with it.

        identity: what the rows depend on, as JSON.

        Raises ValueError where the folder holds rows that depend on something else, naming it, and
        where it holds other files.
        """
        manifest = {"size": size, "part_size": part_size, "identity": dict(identity)}
        path = folder / "manifest.json"
        if path.exists():
            saved = cls(folder).manifest
            changed = [
                f"{key.removeprefix('identity.')} was {before!r}, is {now!r}"
                for key, before, now in differences(
                    {name: saved.get(name) for name in manifest}, json.loads(json.dumps(manifest))
                )
            ]
            if changed:
                raise ValueError(
                    f"{folder} holds the output of another job: {'; '.join(changed)}; give another"
                    " output=DIR, or delete it"
                )
            return cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise ValueError(f"{folder} holds other files ({others[0]}); give another output=DIR")
        files.write(path, _json({**manifest, "parts": None}))
        return cls(folder)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it was when it was first asked for; ValueError where it is damaged."""
        path = self.folder / "manifest.json"
        try:
            manifest: dict[str, Any] = json.loads(path.read_bytes())
            _ = manifest["size"], manifest["part_size"], manifest["identity"], manifest["parts"]
        except FileNotFoundError as error:
            raise ValueError(f"{self.folder} is no output of a job: no manifest.json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r})") from error
        return manifest

    @property
    def count(self) -> int:
        """The number of parts that the whole output has."""
        return -(-int(self.manifest["size"]) // int(self.manifest["part_size"]))

    def numbers(self, part: int) -> range:
        """Return the rows of a part."""
        size, part_size = self.manifest["size"], self.manifest["part_size"]
        return range(part * part_size, min(size, (part + 1) * part_size))

    def missing(self) -> list[int]:
        """Return the parts that are absent, or have other bytes than were written."""
        return [part for part in range(self.count) if self._digest_of(part) != self._saved(part)]

    def reopen(self, damaged: Sequence[int]) -> None:
        """Take back that the output is whole, and keep the digests of the parts not `damaged`.

        What is made again may have other bits than before: another layout adds up otherwise.
        """
        for part in set(range(self.count)) - set(damaged):
            files.write(self._digest_path(part), self._saved(part))
        files.write(self.folder / "manifest.json", _json({**self.manifest, "parts": None}))

    def write(self, part: int, rows: pa.Table) -> None:
        """Write a part whole, then its digest."""
        if len(rows) != len(self.numbers(part)):
            raise ValueError(f"part {part} has {len(rows)} rows, not {len(self.numbers(part))}")
        with (
            files.publish(self.path(part)) as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_file(file, rows.schema) as out,
        ):
            out.write_table(rows.combine_chunks())
        digest = self._digest_of(part)
        assert digest is not None
        files.write(self._digest_path(part), digest)

    def finish(self) -> None:
        """Write the manifest of a whole output; ValueError names a part that is missing."""
        digests = [self._saved(part) for part in range(self.count)]
        if "" in digests:
            raise ValueError(f"{self.path(digests.index(''))} is missing")
        files.write(self.folder / "manifest.json", _json({**self.manifest, "parts": digests}))
        for part in range(self.count):
            self._digest_path(part).unlink(missing_ok=True)

    def read(self, *, verify: bool = True) -> pa.Table:
        """Return all rows, memory-mapped, a chunk each part.

        verify: compare every part's digest; False where this process has just done so.

        Raises ValueError for an output that is not whole, and names a part with other bytes.
        """
        if self.manifest["parts"] is None:
            raise ValueError(f"{self.folder} is not whole: run its job again, which goes on")
        if verify and (damaged := self.missing()):
            raise ValueError(f"{self.path(damaged[0])} is missing or damaged")
        tables = [
            pa.ipc.open_file(pa.memory_map(str(self.path(part)))).read_all()
            for part in range(self.count)
        ]
        return pa.concat_tables(tables)

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{part:05d}.arrow"

    def _digest_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.digest"

    def _saved(self, part: int) -> str:
        """Return the digest that a part was written with, empty where there is none."""
        if self.manifest["parts"] is not None:
            return str(self.manifest["parts"][part])
        path = self._digest_path(part)
        return path.read_text() if path.exists() else ""

    def _digest_of(self, part: int) -> str | None:
        """Return the digest of a part's file, None where there is no file."""
        try:
            with open(self.path(part), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None


def recorded(identity: Mapping[str, Any], folder: str, *keys: str) -> str:
    """Return a value of an output's identity; ValueError where it has none, as one of an earlier
    version of nvmm."""
    value: Any = identity
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{folder} does not record {'.'.join(keys)}: make it anew")
        value = value[key]
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
