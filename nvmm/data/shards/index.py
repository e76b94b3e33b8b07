"""The index of a set of shards: the place of every sample, and the facts that planning needs.

A folder of plain little-endian columns, which are memory-mapped: opening it costs the same for a
thousand samples and for ten million.

    index.json    version, shards with their sizes and times, numbers of samples and of members of
                  each kind, damage found
    shard start stop    of each sample: its shard, and its bytes in it
    key keys            end of its key in the blob of keys
    text                bytes of its text members
    image sizes         end of its images in the list of (width, height), in order of the tar
    lengths-<digest>    tokens and tiles of the sample that one builder makes (-1: it makes none)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvmm.data.samples.decode import IMAGES
from nvmm.data.shards import storage
from nvmm.data.shards.tar import list_members, split_name
from nvmm.io.files import lock, publish
from nvmm.io.progress import watch

log = logging.getLogger("nvmm")
_VERSION = 2
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
_MOST_KINDS = 200
"""The members of rarer kinds are counted together."""
_NUMBER = re.compile(r"^\d+(?=\.)")
_HEADER = 1 << 16
"""The first bytes of an image, which nearly always hold its size."""
_FEW_BYTES, _FEW_SAMPLES = 256 << 20, 4096
"""Below these, worker processes cost more time than they save."""


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
        """A message for each shard that could not be read whole."""
        return list(self.facts["damage"])

    @property
    def kinds(self) -> dict[str, int]:
        """The number of members of each kind: `json`, `jpg`, `0.jpg` for all numbered ones.

        Files of the shards that belong to no sample are kind `?`, and those of the rarest kinds
        `...`.
        """
        return dict(self.facts["kinds"])

    @property
    def num_with_images(self) -> int:
        """The number of samples that have a member of an image."""
        return int(np.count_nonzero(np.diff(self.columns["image"], prepend=0)))

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The memory-mapped columns by name."""
        return {name: _open(self.path / name, kind) for name, kind in _COLUMNS.items()}

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        ends = self.columns["key"]
        start = int(ends[number - 1]) if number else 0
        return self.columns["keys"][start : int(ends[number])].tobytes().decode()

    def image_sizes(self, number: int) -> list[tuple[int, int]]:
        """Return (width, height) of a sample's images in the tar's order; (0, 0) if unknown."""
        ends = self.columns["image"]
        start = int(ends[number - 1]) if number else 0
        sizes = self.columns["sizes"].reshape(-1, 2)[start : int(ends[number])]
        return [(int(width), int(height)) for width, height in sizes]

    def shard_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return first number and number of samples of each shard that has any, int64 [shards]."""
        counts = np.array(self.facts["samples_per_shard"], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        return starts[counts > 0], counts[counts > 0]

    def estimates(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64 [n], a rough number of tokens of samples, for balancing alone.

        A token for 4 bytes of text, and for 784 pixels (InternViT's patches, 2 x 2 as one).
        """
        ends, sizes = self.columns["image"], self.columns["sizes"].reshape(-1, 2)
        starts = np.where(numbers > 0, ends[np.maximum(numbers - 1, 0)], 0)
        counts = ends[numbers] - starts
        sample = np.repeat(np.arange(len(numbers)), counts)
        # Numbers of the samples' images in `sizes`: each sample has `counts` from `starts` on.
        image = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts - starts, counts)
        pixels = np.zeros(len(numbers), dtype=np.int64)
        np.add.at(pixels, sample, sizes[image].astype(np.int64).prod(axis=1))
        return self.columns["text"][numbers].astype(np.int64) // 4 + 1 + pixels // 784

    def lengths(self, digest: str) -> NDArray[np.int32] | None:
        """Return int32 [n, 2], tokens and tiles of every sample for one builder.

        Return None when they were never counted.
        """
        path = self.path / f"lengths-{digest}"
        return _open(path, "<i4").reshape(-1, 2) if path.exists() else None

    def count_lengths(
        self, digest: str, measure: Callable[[int], tuple[int, int]], workers: int = 0
    ) -> NDArray[np.int32]:
        """Return `lengths(digest)`, made with `measure` (number -> tokens, tiles) if missing.

        A sample for which `measure` raises ValueError gets -1, -1. Raises ValueError when the
        counts cannot be written, and when every sample is bad.
        """
        known = self.lengths(digest)
        if known is not None:
            return known
        if not os.access(self.path, os.W_OK):
            raise ValueError(
                f"{self.path} cannot be written, and the token counts are not in it; name a folder"
                " for the index with data.train.index_dir"
            )
        # Another process may have counted while this one waited. Without locks both count alike.
        with lock(self.path / "lock", required=False):
            if self.lengths(digest) is None:
                self._count(f"lengths-{digest}", measure, workers)
        return _open(self.path / f"lengths-{digest}", "<i4").reshape(-1, 2)

    def _count(self, name: str, measure: Callable[[int], tuple[int, int]], workers: int) -> None:
        """Write the column `name` of all samples, span by span; warn of those that are bad."""
        measured = partial(_measured, measure)
        step = max(1, min(1000, len(self) // max(1, 4 * workers)))
        spans = [(i, min(len(self), i + step)) for i in range(0, len(self), step)]
        results = _mapped(measured, spans, workers if len(self) > _FEW_SAMPLES else 0)
        num_bad, first = 0, 0
        with publish(self.path / name, shared=True) as temporary, open(temporary, "wb") as file:
            for (start, _), rows in zip(
                spans,
                watch(results, len(spans), f"counting tokens ({len(self)} samples)"),
                strict=True,
            ):
                bad = np.flatnonzero(rows[:, 0] < 0)
                if bad.size and not num_bad:
                    first = start + int(bad[0])
                num_bad += bad.size
                file.write(rows.tobytes())
            if num_bad:
                # The fault may lie in the builder: say the first. Counts of bad samples alone would
                # outlive its repair.
                try:
                    measure(first)
                    reason = "it can now"
                except ValueError as error:
                    reason = str(error)
                message = f"{num_bad} of {len(self)} samples cannot be built, the first: {reason}"
                if num_bad == len(self):
                    raise ValueError(message)
                log.warning(f"data: {message}")


def open_index(shards: Sequence[str], folder: str | None = None, workers: int = 0) -> Index:
    """Open the index of `shards`, in this order; build it where it is missing or shards changed.

    Args:
        folder: folder that keeps indices; None: beside the first shard. Where that is not possible
            (remote or read-only shards), the index is built in a temporary folder at every start.
        workers: processes that build it.

    A local shard changed when its size or modification time did. Remote shards are compared when
    they are read: a sample must have the key that its index says.
    """
    base, names = _place(shards, folder)
    stamps = _stamps(shards)
    # 1. Take the index that is there, or build it there while other processes wait.
    if base is not None:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        path = base / ".nvmm-index" / digest
        if _is_current(path, stamps):
            return Index(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(path.parent / "lock", required=False):
                if not _is_current(path, stamps):
                    _build(path, shards, names, stamps, workers)
            return Index(path)
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
            reason = str(error)
    else:
        reason = "the shards are remote"
    # 2. Where nothing can be written, build one that lasts as long as this process uses it.
    log.warning(
        f"the index of {shards[0]} ... is not kept ({reason}); name a folder with"
        " data.train.index_dir"
    )
    temporary = tempfile.TemporaryDirectory(prefix="nvmm-index-")
    path = Path(temporary.name) / "index"
    _build(path, shards, names, stamps, workers)
    return Index(path, temporary)


def _place(shards: Sequence[str], folder: str | None) -> tuple[Path | None, list[str]]:
    """Return the folder that keeps the index, and the names by which the index knows the shards.

    Beside the shards the names are relative, so that the folder can be moved with its index.
    """
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


def _stamps(shards: Sequence[str]) -> list[list[int] | None]:
    """Return [size, modification time in ns] of local shards, None for remote ones."""
    stamps: list[list[int] | None] = []
    for shard in shards:
        path = storage.local_path(shard)
        status = os.stat(path) if path else None
        stamps.append([status.st_size, status.st_mtime_ns] if status else None)
    return stamps


def _is_current(path: Path, stamps: list[list[int] | None]) -> bool:
    """Return whether there is an index of this version, and of the shards as they are now."""
    try:
        facts = json.loads((path / "index.json").read_text(encoding="utf-8"))
        return bool(facts["version"] == _VERSION and facts["stamps"] == stamps)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none there, or a damaged one
        return False


def _build(
    path: Path,
    shards: Sequence[str],
    names: Sequence[str],
    stamps: list[list[int] | None],
    workers: int,
) -> None:
    """Write the index of `shards` to `path`, complete or not at all."""
    counts: list[int] = []
    damage: list[str] = []
    kinds: Counter[str] = Counter()
    # 1. Shards are scanned apart, by processes where there is much to read.
    bytes_known = sum(stamp[0] for stamp in stamps if stamp)
    few = len(shards) == 1 or (None not in stamps and bytes_known < _FEW_BYTES)
    scans = _mapped(scan, list(shards), 0 if few else workers)
    # Without locks two processes may build at once; they write alike, each at its own name.
    with publish(path, shared=True) as folder:
        folder.mkdir()
        # 2. Their columns are written one after another, so that no index need fit in memory.
        ends = {"key": 0, "image": 0}
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / name, "wb")) for name in _COLUMNS}
            for number, (columns, shard_kinds, problem) in enumerate(
                watch(scans, len(shards), f"indexing {len(shards)} shards")
            ):
                counts.append(len(columns["start"]))
                columns["shard"] = np.full(counts[-1], number)
                # Ends count from a shard's start; in the index they count from the first shard's.
                for name in ends:
                    columns[name] = columns[name] + ends[name]
                    ends[name] = int(columns[name][-1]) if counts[-1] else ends[name]
                for name, dtype in _COLUMNS.items():
                    files[name].write(columns[name].astype(dtype).tobytes())
                damage += [problem] if problem else []
                kinds += shard_kinds
                rare = [kind for kind, _ in kinds.most_common()[_MOST_KINDS:]]
                kinds["..."] += sum(kinds.pop(kind) for kind in rare)
        # 3. The stamps say later whether the shards are still those that were scanned.
        facts = {
            "version": _VERSION,
            "shards": list(names),
            "stamps": stamps,
            "num_samples": sum(counts),
            "samples_per_shard": counts,
            "kinds": dict(sorted((+kinds).items())),
            "damage": damage,
        }
        (folder / "index.json").write_text(json.dumps(facts), encoding="utf-8")
        # 4. Token counts of an older version hold where its samples are these.
        old = path / "index.json"
        same = ("shards", "stamps", "samples_per_shard")
        before: Any = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            before = json.loads(old.read_text(encoding="utf-8"))
        is_same = isinstance(before, dict) and all(before.get(n) == facts[n] for n in same)
        if is_same and all(
            (path / name).read_bytes() == (folder / name).read_bytes() for name in ("start", "stop")
        ):
            for counted in path.glob("lengths-*"):
                shutil.copy(counted, folder / counted.name)


def scan(shard: str) -> tuple[dict[str, NDArray[Any]], Counter[str], str | None]:
    """Return the columns of one shard, where ends count from its start, the number of its members
    of each kind, and its damage or None.
    """
    starts: list[int] = []
    stops: list[int] = []
    texts: list[int] = []
    keys: list[bytes] = []
    images: list[int] = []
    sizes: list[tuple[int, int]] = []
    kinds: Counter[str] = Counter()
    with _bytes(shard) as data:
        members, problem = list_members(data, shard)
        # 1. Members that follow one another under one key are a sample, which reaches from the
        # first header to the end of the last member.
        named = [(*name, member) for member in members if (name := split_name(member.name))]
        kinds.update(_NUMBER.sub("0", extension) for _, extension, _ in named)
        if len(members) > len(named):
            kinds["?"] = len(members) - len(named)
        groups = [(key, list(group)) for key, group in itertools.groupby(named, itemgetter(0))]
        apart = _apart([(key, [extension for _, extension, _ in group]) for key, group in groups])
        for key, group in groups:
            if key in apart:
                continue
            starts.append(group[0][2].start)
            stops.append(group[-1][2].stop)
            keys.append(key.encode())
            # 2. Its text and image sizes are kept for estimates and for planning tiles.
            texts.append(0)
            for _, extension, member in group:
                kind = extension.rpartition(".")[2]
                if kind in _TEXT:
                    texts[-1] += member.size
                elif kind in IMAGES:
                    sizes.append(_image_size(data, member.offset, member.size))
            images.append(len(sizes))
    columns: dict[str, NDArray[Any]] = {
        "start": np.array(starts, dtype=np.int64),
        "stop": np.array(stops, dtype=np.int64),
        "key": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "text": np.array(texts, dtype=np.int64),
        "image": np.array(images, dtype=np.int64),
        "sizes": np.array(sizes, dtype=np.int64).ravel(),
    }
    columns["text"] = columns["text"].clip(max=np.iinfo(np.int32).max)
    problems = [str(problem)] if problem else []
    if apart:
        problems.append(
            f"{shard}:{min(apart)}: the members of {len(apart)} samples lie apart, and"
            " a sample is read in one piece; sort the shard by name"
        )
    return columns, kinds, "; ".join(problems) or None


def _apart(groups: Sequence[tuple[str, list[str]]]) -> set[str]:
    """Return the keys whose members lie in several places.

    groups: key and extensions of neighbours. A key that comes again with the same extensions is
    another sample of its name, as webdataset has it.
    """
    seen: dict[str, list[str]] = {}
    return {
        key
        for key, extensions in groups
        if seen.setdefault(key, sorted(extensions)) != sorted(extensions)
    }


@contextlib.contextmanager
def _bytes(shard: str) -> Iterator[bytes | mmap.mmap]:
    """Give all bytes of a shard: mapped where it is local, else read at once."""
    path = storage.local_path(shard)
    if path is None:
        yield storage.read(shard, 0, storage.size(shard))
    elif not os.path.getsize(path):
        yield b""
    else:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _image_size(data: bytes | mmap.mmap, start: int, size: int) -> tuple[int, int]:
    """Return (width, height) of an image; (0, 0) where its bytes do not say."""
    for length in (min(size, _HEADER), size):
        with contextlib.suppress(Exception):  # Decoding the image will say what is wrong.
            return Image.open(io.BytesIO(data[start : start + length])).size
    return 0, 0


def _measured(
    measure: Callable[[int], tuple[int, int]], span: tuple[int, int]
) -> NDArray[np.int32]:
    """Return int32 [n, 2], tokens and tiles of samples [start, stop); -1 for bad ones."""
    rows = np.full((span[1] - span[0], 2), -1, dtype=np.int32)
    for number in range(*span):
        with contextlib.suppress(ValueError):
            rows[number - span[0]] = measure(number)
    return rows


def _mapped(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Map in order, by `workers` processes (0: this one), which get the function once."""
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
    """Keep the function of this worker process for its calls, which would pickle it each time."""
    global _function
    _function = function


def _call(item: Any) -> Any:
    return _function(item)


def _open(path: Path, kind: str) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
