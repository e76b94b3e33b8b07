"""The index of a set of shards: where every sample lies, and what planning needs to know of it.

A folder of plain little-endian columns, which are memory-mapped: opening it costs the same for a
thousand samples and for ten million.

    index.json    version, shards with their sizes and times, number of samples, damage found
    shard start stop    of each sample: its shard, and its bytes in it
    key keys            end of its key in the blob of keys
    text                bytes of its text members
    image sizes         end of its images in the list of (width, height), in order of the tar
    lengths-<digest>    tokens and tiles that one builder makes of it (-1: it cannot be built)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvmm.data.shards import storage
from nvmm.data.shards.tar import list_members, split_name
from nvmm.io.progress import watch

log = logging.getLogger("nvmm")
_VERSION = 1
_COLUMNS = {
    "shard": "<i4",
    "start": "<i8",
    "stop": "<i8",
    "key": "<i8",
    "keys": "u1",
    "text": "<i4",
    "image": "<i8",
    "sizes": "<i4",
}
_TEXT = ("json", "txt")
_IMAGES = ("png", "jpg", "jpeg", "webp")
_HEADER = 1 << 16  # bytes of an image that nearly always hold its size
_FEW_BYTES, _FEW_SAMPLES = 256 << 20, 4096  # below, processes cost more than they save


class Index:
    """An index on disk. It is pickled as its path, so that workers map the same pages."""

    def __init__(self, path: Path, temporary: Any = None) -> None:
        self.path = path
        self.facts = json.loads((path / "index.json").read_text(encoding="utf-8"))
        self._temporary = temporary  # a TemporaryDirectory that lives as long as this object

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.path,)

    def __len__(self) -> int:
        return int(self.facts["num_samples"])

    @property
    def damage(self) -> list[str]:
        """What is wrong with shards of which not all could be read."""
        return list(self.facts["damage"])

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Memory-mapped columns by name."""
        return {name: _open(self.path / name, kind) for name, kind in _COLUMNS.items()}

    def key(self, number: int) -> str:
        """The key of a sample."""
        ends = self.columns["key"]
        start = int(ends[number - 1]) if number else 0
        return self.columns["keys"][start : int(ends[number])].tobytes().decode()

    def image_sizes(self, number: int) -> list[tuple[int, int]]:
        """(width, height) of a sample's images in the order of the tar; (0, 0) where unknown."""
        ends = self.columns["image"]
        start = int(ends[number - 1]) if number else 0
        sizes = self.columns["sizes"].reshape(-1, 2)[start : int(ends[number])]
        return [(int(width), int(height)) for width, height in sizes]

    def shard_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First number and number of samples of each shard that has any: two int64 [shards]."""
        counts = np.array(self.facts["samples_per_shard"], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        return starts[counts > 0], counts[counts > 0]

    def estimates(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n], roughly the tokens of samples, from text and pixels: for balance only.

        A token for 4 bytes of text, and for 784 pixels (InternViT's patches, 2 x 2 as one).
        """
        ends, sizes = self.columns["image"], self.columns["sizes"].reshape(-1, 2)
        starts = np.where(numbers > 0, ends[np.maximum(numbers - 1, 0)], 0)
        counts = ends[numbers] - starts
        sample = np.repeat(np.arange(len(numbers)), counts)
        image = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts - starts, counts)
        pixels = np.zeros(len(numbers), dtype=np.int64)
        np.add.at(pixels, sample, sizes[image].astype(np.int64).prod(axis=1))
        return self.columns["text"][numbers].astype(np.int64) // 4 + 1 + pixels // 784

    def lengths(self, digest: str) -> NDArray[np.int32] | None:
        """int32 [n, 2] tokens and tiles of every sample for one builder; None if never counted."""
        path = self.path / f"lengths-{digest}"
        return _open(path, "<i4").reshape(-1, 2) if path.exists() else None

    def count_lengths(
        self, digest: str, measure: Callable[[int], tuple[int, int]], workers: int = 0
    ) -> NDArray[np.int32]:
        """`lengths(digest)`, made with `measure` (number -> tokens, tiles) where it is missing.

        A sample for which `measure` raises ValueError gets -1, -1.
        """
        found = self.lengths(digest)
        if found is not None:
            return found
        if not os.access(self.path, os.W_OK):
            raise ValueError(
                f"{self.path} cannot be written, and the token counts are not in it; name a folder"
                " for the index with data.train.index_dir"
            )
        with _locked(self.path / "lock"):
            if self.lengths(digest) is None:
                self._count(f"lengths-{digest}", partial(_measured, measure), workers)
        return _open(self.path / f"lengths-{digest}", "<i4").reshape(-1, 2)

    def _count(
        self, name: str, measured: Callable[[tuple[int, int]], NDArray[np.int32]], workers: int
    ) -> None:
        step = max(1, min(1000, len(self) // max(1, 4 * workers)))
        spans = [(i, min(len(self), i + step)) for i in range(0, len(self), step)]
        found = _mapped(measured, spans, workers if len(self) > _FEW_SAMPLES else 0)
        with open(self.path / f"{name}.partial", "wb") as file:
            for rows in watch(found, len(spans), f"counting tokens ({len(self)} samples)"):
                file.write(rows.tobytes())
        os.replace(self.path / f"{name}.partial", self.path / name)


def open_index(shards: Sequence[str], folder: str | None = None, workers: int = 0) -> Index:
    """The index of `shards`, in this order; built where it is missing or the shards changed.

    Args:
        folder: where indices are kept; None: beside the first shard. Where that is not possible
            (remote or read-only shards) the index is built in a temporary folder at every start.
        workers: processes that build it.

    A local shard changed when its size or modification time did. Remote shards are compared when
    they are read: a sample must have the key that its index says.
    """
    base, names = _place(shards, folder)
    stamps = _stamps(shards)
    if base is not None:
        path = base / ".nvmm-index" / _digest(names)
        if _is_current(path, stamps):
            return Index(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent / "lock"):
                if not _is_current(path, stamps):
                    _build(path, shards, names, stamps, workers)
            return Index(path)
        except PermissionError as error:
            reason = str(error)
        except OSError as error:
            if error.errno != 30:  # a read-only file system
                raise
            reason = str(error)
    else:
        reason = "the shards are remote"
    log.warning(
        f"the index of {shards[0]} ... is not kept ({reason}); name a folder with"
        " data.train.index_dir"
    )
    temporary = tempfile.TemporaryDirectory(prefix="nvmm-index-")
    path = Path(temporary.name) / "index"
    _build(path, shards, names, stamps, workers)
    return Index(path, temporary)


def _place(shards: Sequence[str], folder: str | None) -> tuple[Path | None, list[str]]:
    """The folder that holds the index, and the names by which it knows the shards."""
    if folder is not None:
        return Path(folder).expanduser(), [
            os.path.abspath(shard) if storage.local_path(shard) else shard for shard in shards
        ]
    first = storage.local_path(shards[0])
    if first is None:
        return None, list(shards)
    parent = Path(first).absolute().parent
    return parent, [
        os.path.relpath(path, parent) if (path := storage.local_path(shard)) else shard
        for shard in shards
    ]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _stamps(shards: Sequence[str]) -> list[list[int] | None]:
    """[size, modification time in ns] of local shards."""
    stamps: list[list[int] | None] = []
    for shard in shards:
        path = storage.local_path(shard)
        status = os.stat(path) if path else None
        stamps.append([status.st_size, status.st_mtime_ns] if status else None)
    return stamps


def _is_current(path: Path, stamps: list[list[int] | None]) -> bool:
    try:
        facts = json.loads((path / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(facts["version"] == _VERSION and facts["stamps"] == stamps)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among this machine's (and, where the file system can, the cluster's) processes."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: two may build, alike
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    path: Path,
    shards: Sequence[str],
    names: Sequence[str],
    stamps: list[list[int] | None],
    workers: int,
) -> None:
    """Write the index of `shards` to `path`: whole, or not at all."""
    partial_path = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir()
    ends = {"key": 0, "image": 0}
    counts: list[int] = []
    damage: list[str] = []
    bytes_known = sum(stamp[0] for stamp in stamps if stamp)
    few = len(shards) == 1 or (None not in stamps and bytes_known < _FEW_BYTES)
    found = _mapped(scan, list(shards), 0 if few else workers)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(partial_path / name, "wb")) for name in _COLUMNS}
        for number, (columns, problem) in enumerate(
            watch(found, len(shards), f"indexing {len(shards)} shards")
        ):
            counts.append(len(columns["start"]))
            columns["shard"] = np.full(counts[-1], number)
            for name in ends:
                columns[name] = columns[name] + ends[name]
                ends[name] = int(columns[name][-1]) if counts[-1] else ends[name]
            for name, kind in _COLUMNS.items():
                files[name].write(columns[name].astype(kind).tobytes())
            damage += [problem] if problem else []
    facts = {
        "version": _VERSION,
        "shards": list(names),
        "stamps": stamps,
        "num_samples": sum(counts),
        "samples_per_shard": counts,
        "damage": damage,
    }
    (partial_path / "index.json").write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    partial_path.rename(path)


def scan(shard: str) -> tuple[dict[str, NDArray[Any]], str | None]:
    """Columns of one shard (ends count from its start), and what is wrong with it, if anything."""
    starts: list[int] = []
    stops: list[int] = []
    texts: list[int] = []
    keys: list[bytes] = []
    images: list[int] = []
    sizes: list[tuple[int, int]] = []
    with _bytes(shard) as data:
        members, problem = list_members(data, shard)
        last = None
        for member in members:
            name = split_name(member.name)
            if name is None:
                continue
            if name[0] != last:
                last = name[0]
                starts.append(member.start)
                stops.append(member.stop)
                keys.append(last.encode())
                texts.append(0)
                images.append(len(sizes))
            stops[-1] = member.stop
            kind = name[1].rpartition(".")[2]
            if kind in _TEXT:
                texts[-1] += member.size
            elif kind in _IMAGES:
                sizes.append(_image_size(data, member.offset, member.size))
                images[-1] = len(sizes)
    columns: dict[str, NDArray[Any]] = {
        "start": np.array(starts, dtype=np.int64),
        "stop": np.array(stops, dtype=np.int64),
        "key": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "text": np.array(texts, dtype=np.int64),
        "image": np.array(images, dtype=np.int64),
        "sizes": np.array(sizes, dtype=np.int64).ravel(),
    }
    return columns, str(problem) if problem else None


@contextlib.contextmanager
def _bytes(shard: str) -> Iterator[bytes | mmap.mmap]:
    """The whole shard: mapped where it is local, else read at once."""
    path = storage.local_path(shard)
    if path is None:
        yield storage.read(shard, 0, storage.size(shard))
    elif not os.path.getsize(path):
        yield b""
    else:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _image_size(data: bytes | mmap.mmap, start: int, size: int) -> tuple[int, int]:
    for length in (min(size, _HEADER), size):
        with contextlib.suppress(Exception):  # whatever is wrong shows when it is decoded
            return Image.open(io.BytesIO(data[start : start + length])).size
    return 0, 0


def _measured(
    measure: Callable[[int], tuple[int, int]], span: tuple[int, int]
) -> NDArray[np.int32]:
    rows = np.full((span[1] - span[0], 2), -1, dtype=np.int32)
    for number in range(*span):
        with contextlib.suppress(ValueError):
            rows[number - span[0]] = measure(number)
    return rows


def _mapped(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """`map` in order, by `workers` processes (0: this one), which get the function once."""
    if workers < 1:
        yield from map(function, items)
        return
    context = get_context("forkserver")
    with ProcessPoolExecutor(
        min(workers, len(items)), context, initializer=_remember, initargs=(function,)
    ) as pool:
        yield from pool.map(_call, items)


_function: Callable[[Any], Any]


def _remember(function: Callable[[Any], Any]) -> None:
    global _function  # of this worker process
    _function = function


def _call(item: Any) -> Any:
    return _function(item)


def _open(path: Path, kind: str) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
