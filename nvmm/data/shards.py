"""Local webdataset shards: plain tar files whose consecutive members share a key.

`Dataset` reads any sample by its number; `Order` says which samples make global batch k.
Nothing is extracted to disk and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvmm.batch import Sample

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_BLOCK = 512


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member as webdataset splits them: at the file name's first dot."""
    match = _NAME.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


@dataclasses.dataclass(frozen=True)
class Index:
    """Where each sample lies: its shard, and the bytes from its first header to its last block.

    shard: int32 [n]; start, stop: int64 [n].
    """

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def read_index(shards: Sequence[str]) -> Index:
    """Index of all shards, from their tar headers.

    Raises ValueError naming the shard, and the key near the damage, for a file that is no tar, is
    compressed, is truncated, or has damaged headers.
    """
    rows: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        rows.extend((number, start, stop) for start, stop in _scan(shard))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Index(table[:, 0].astype(np.int32), table[:, 1].copy(), table[:, 2].copy())


class _Member(NamedTuple):
    """A regular file of a tar: where its first header starts and its data lie, in bytes."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def stop(self) -> int:
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


def _scan(shard: str) -> list[tuple[int, int]]:
    with open(shard, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{shard}: empty file, no tar shard")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            members = _list_members(data, shard)
    spans: list[tuple[int, int]] = []
    last: str | None = None
    for member in members:
        name = split_name(member.name)
        if name is None:
            continue
        if name[0] != last:
            last = name[0]
            spans.append((member.start, member.stop))
        else:
            spans[-1] = (spans[-1][0], member.stop)
    return spans


def _list_members(data: bytes | mmap.mmap, shard: str) -> list[_Member]:
    members = _list_plain(data)
    if members is not None:
        return members
    members = []
    key = "?"
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[arg-type]
            for header in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
                key = (split_name(header.name) or (header.name,))[0]
                if header.isreg():
                    members.append(
                        _Member(header.name, header.offset, header.offset_data, header.size)
                    )
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{shard}:{key}: truncated or damaged here, or no uncompressed tar ({error})"
        ) from error
    # tarfile takes a damaged header for the end of the archive
    if data[end : end + _BLOCK].strip(b"\0"):
        raise ValueError(f"{shard}:{key}: damaged tar header after this sample, at byte {end}")
    return members


def _list_plain(data: bytes | mmap.mmap) -> list[_Member] | None:
    """What tarfile would list, six times faster; None wherever it sees more than plain files."""
    members: list[_Member] = []
    start = at = 0
    while at < len(data):
        header = data[at : at + _BLOCK]
        if not header.strip(b"\0"):
            break
        # no long names, links, sparse files, base-256 sizes: tarfile knows those
        if len(header) < _BLOCK or header[156] not in b"0\0x" or header[124] & 128:
            return None
        try:
            size = int(header[124:136].strip(b" \0"), 8)
            checksum = int(header[148:156].strip(b" \0"), 8)
            name = header[:100].rstrip(b"\0").decode("ascii")
            prefix = header[345:500].rstrip(b"\0").decode("ascii")
        except ValueError:
            return None
        body = at + _BLOCK
        if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or body + size > len(data):
            return None
        at = body + -(-size // _BLOCK) * _BLOCK
        if header[156] in b"x":
            # webdataset writes such a header before every member, for fractions of mtime
            if any(key in data[body : body + size] for key in (b"path=", b"size=", b"GNU.")):
                return None
            continue
        if prefix:
            if header[257:263] != b"ustar\0":
                return None
            name = f"{prefix}/{name}"
        members.append(_Member(name, start, body, size))
        start = at
    return members


class Dataset:
    """Samples of local tar shards, by number.

    shards: file patterns (globs); the files of each are taken in sorted order.
    build: members of a sample -> Sample. In a config it is a partial, which `Data` completes
        with `bind`.
    """

    def __init__(self, shards: str | Sequence[str], build: Callable[..., Any]) -> None:
        patterns = [shards] if isinstance(shards, str) else [str(pattern) for pattern in shards]
        if not patterns:
            raise ValueError("shards=[] names no file; give at least one pattern")
        self.patterns = patterns
        self.build = build

    def bind(self, **options: Any) -> Dataset:
        """The same samples with `build(**options)` as their builder."""
        return Dataset(self.patterns, self.build(**options))

    @cached_property
    def shards(self) -> list[str]:
        """Paths of the shards, in order."""
        paths: list[str] = []
        for pattern in self.patterns:
            found = sorted(glob.glob(str(Path(pattern).expanduser())))
            if not found:
                raise ValueError(f"shards: pattern {pattern} matches no file")
            paths += found
        return paths

    @cached_property
    def index(self) -> Index:
        """Where the samples lie; read from the shards on first use."""
        index = read_index(self.shards)
        if not len(index.shard):
            raise ValueError(f"shards: no sample in {', '.join(self.patterns)}")
        return index

    def __len__(self) -> int:
        return len(self.index.shard)

    def members(self, number: int) -> dict[str, Any]:
        """Members of one sample: extension -> bytes, and its `__url__` and `__key__`."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = self.shards[self.index.shard[number]]
        start, stop = int(self.index.start[number]), int(self.index.stop[number])
        with open(shard, "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(stop - start)
        return _parse(data, shard)

    def __getitem__(self, number: int) -> Sample:
        sample: Sample = self.build(self.members(number))
        return dataclasses.replace(sample, sample_id=number)


def _parse(data: bytes, shard: str) -> dict[str, Any]:
    members: dict[str, Any] = {"__url__": shard}
    for member in _list_members(data, shard):
        name = split_name(member.name)
        if name is None:
            continue
        key, extension = name
        if members.setdefault("__key__", key) != key:
            raise ValueError(f"{shard}:{key}: the file changed after it was indexed")
        if extension in members:
            raise ValueError(f"{shard}:{key}: two members {extension}")
        members[extension] = data[member.offset : member.offset + member.size]
    return members


class Order:
    """Which samples make global batch k: an endless, seeded, seekable shuffle.

    Epoch e is one permutation of all samples that depends on `seed` and e alone; batches run
    across epochs without dropping a sample. `position` (from another Order's `position(k)`)
    continues from there, also with another global batch size.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        global_batch_size: int,
        position: Mapping[str, int] | None = None,
    ) -> None:
        if num_samples < 1 or global_batch_size < 1:
            raise ValueError(
                f"num_samples={num_samples}, global_batch_size={global_batch_size}: "
                "both must be at least 1"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"data.seed={seed} must be in [0, 2**63)")
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch_size = global_batch_size
        self._step = self._samples = 0
        self._epoch: tuple[int, np.ndarray] | None = None
        if position is not None:
            for name, mine in (("seed", seed), ("num_samples", num_samples)):
                if position[name] != mine:
                    raise ValueError(
                        f"cannot continue the data order: {name} is {mine}, but the position was "
                        f"saved with {name}={position[name]}"
                    )
            self._step, self._samples = int(position["step"]), int(position["samples"])

    def position(self, k: int) -> dict[str, int]:
        """The place before batch k, independent of any layout."""
        return {
            "step": k,
            "samples": self._consumed(k),
            "seed": self.seed,
            "num_samples": self.num_samples,
        }

    def batch(self, k: int) -> list[int]:
        """Dataset numbers of the samples of global batch k."""
        place, ids = self._consumed(k), []
        missing = self.global_batch_size
        while missing:
            epoch, offset = divmod(place, self.num_samples)
            taken = self._permutation(epoch)[offset : offset + missing]
            ids += taken.tolist()
            place += len(taken)
            missing -= len(taken)
        return ids

    def _consumed(self, k: int) -> int:
        if k < self._step:
            raise ValueError(f"batch {k} lies before batch {self._step}, where this order starts")
        return self._samples + (k - self._step) * self.global_batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            # sorted raw words: unlike Generator.permutation, numpy keeps these across versions
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_samples)
            self._epoch = (epoch, np.argsort(words, kind="stable"))
        return self._epoch[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}


def write_shards(
    folder: str | Path,
    name: str,
    samples: Iterable[Mapping[str, bytes | str]],
    *,
    samples_per_shard: int = 1000,
    first_shard: int = 0,
) -> list[Path]:
    """Write samples (`__key__`, then extension -> bytes) to `folder/name-00000.tar`, ...

    The same samples give the same bytes: modification times are fixed. Existing files of these
    names are replaced, each only when it is complete.
    """
    from webdataset.writer import TarWriter

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    if Path(name).name != name:
        raise ValueError(f"name={name} must be a file name, without folders")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    stream = iter(samples)
    pending = next(stream, None)
    while pending is not None:
        path = folder / f"{name}-{first_shard + len(paths):05d}.tar"
        partial = path.with_suffix(".tar.partial")
        with open(partial, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for _ in range(samples_per_shard):
                tar.write(dict(pending))
                pending = next(stream, None)
                if pending is None:
                    break
        partial.replace(path)
        paths.append(path)
    return paths
