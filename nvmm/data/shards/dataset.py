"""Webdataset shards: plain tar files whose consecutive members share a key.

`Dataset` reads any sample by its number. Nothing is extracted to disk and nothing is unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvmm.batch import Sample
from nvmm.data.order.permutation import LocalPermutation, Permutation
from nvmm.data.samples.bad_sample import BadSample, blamed
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.decode import IMAGES
from nvmm.data.samples.record import PASS, is_listed
from nvmm.data.shards.index import Index, open_index
from nvmm.data.shards.storage import Storage, expand, local_path, read
from nvmm.data.shards.tar import parse
from nvmm.io.files import publish


class Dataset:
    """Samples of tar shards, by number.

    shards: file patterns; the files of each are taken in sorted order. None where a blend names
        the shards.
    build: builder, members of a sample -> Sample. In a config it is a partial, which `Data`
        completes with `bind`.
    local_window: None: an epoch is a shuffle of all samples. A number: shards are shuffled, then
        samples within as many places, which keeps successive reads in a few shards.
    index_dir: folder for the index of shards that are remote or read-only; None: beside them.
    storage: how remote shards are read; None: its defaults, without a cache.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | None,
        build: Callable[..., Any],
        local_window: int | None = None,
        index_dir: str | None = None,
        storage: Storage | None = None,
    ) -> None:
        patterns = [shards] if isinstance(shards, str) else [str(p) for p in shards or ()]
        if shards is not None and not patterns:
            raise ValueError("shards=[] names no file; give at least one pattern")
        if local_window is not None and local_window < 1:
            raise ValueError(f"local_window={local_window} must be at least 1, or null")
        self.patterns = patterns
        self.build: Any = build
        self.local_window = local_window
        self.index_dir = index_dir
        self.storage = storage or Storage()
        self.skip_damage = False

    def bind(self, *, skip_damage: bool = False, **options: Any) -> Dataset:
        """Return the same samples with `build(**options)` as their builder.

        skip_damage: go on without the samples behind a shard's damage, instead of refusing it.

        Raises ValueError when the builder is no `Builder`.
        """
        bound = copy.copy(self)
        bound.build = self.build(**options)
        if not isinstance(bound.build, Builder):
            raise ValueError(
                f"build={type(bound.build).__name__} must be a subclass of"
                " nvmm.data.samples.builder.Builder"
            )
        bound.skip_damage = skip_damage
        return bound

    @cached_property
    def shards(self) -> list[str]:
        """The shards, in order."""
        urls: list[str] = []
        seen: dict[Any, tuple[str, str]] = {}
        for pattern in self.patterns:
            matches = expand(pattern, self.storage)
            if not matches:
                raise ValueError(f"shards: pattern {pattern} matches no file")
            for url in matches:
                path = local_path(url)
                status = os.stat(path) if path else None
                file = (status.st_dev, status.st_ino) if status else url
                if file in seen:
                    first, other = seen[file]
                    raise ValueError(
                        f"shards: {url} of {pattern} is {first} of {other}: its samples would"
                        " count twice (data.blend has weights and repeat)"
                    )
                seen[file] = url, pattern
            urls += matches
        if not urls:
            raise ValueError("shards=null names no file; give at least one pattern")
        return urls

    def contents(self) -> tuple[str, bool]:
        """Return a line on the samples' pictures and unread members, from the index alone, and
        whether any picture is read.
        """
        kinds, build = self.index.kinds, self.build
        images = {kind: n for kind, n in kinds.items() if kind.rpartition(".")[2] in IMAGES}
        read = {kind: n for kind, n in images.items() if build.reads(kind)}
        # A sample has each kind once, but for numbered ones. Where only some of the images are
        # read, the most frequent of these kinds is in all samples that have any.
        num_with = self.index.num_with_images if read == images else max(read.values(), default=0)
        line = f"{len(self)} samples, {num_with} with pictures ({sum(read.values())} pictures)"
        unread = {kind: n for kind, n in kinds.items() if not build.reads(kind)}
        for title, listed in (("not read by build.unread", True), ("NOT READ", False)):
            chosen = [
                f".{kind} {n}"
                for kind, n in unread.items()
                if is_listed(kind, build.unread) == listed
            ]
            if chosen:
                bad = "" if listed else ": samples that have one are bad"
                line += f"; {title}: {', '.join(chosen)}{bad}"
        return line, bool(read)

    @cached_property
    def index(self) -> Index:
        """The index of the samples; opened, or built, on first use.

        Raises ValueError for shards without a sample, and for a damaged one (see `bind`).
        """
        index = open_index(self.shards, self.index_dir, workers=os.cpu_count() or 1)
        if index.damage and (not self.skip_damage or not len(index)):
            raise ValueError("\n".join(index.damage))
        if not len(index):
            raise ValueError(f"shards: no sample in {', '.join(self.patterns)}")
        return index

    @property
    def fingerprint(self) -> list[Any]:
        """What tells these samples from others, as JSON: shards and their number of samples.

        A shard is its name, and for a local one size and time.
        """
        facts: list[Any] = []
        for url in self.shards:
            path = local_path(url)
            status = os.stat(path) if path else None
            size = [status.st_size, status.st_mtime_ns] if status else []
            facts.append([url.rpartition("/")[2], *size])
        return [*facts, len(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lengths"}

    def __len__(self) -> int:
        return len(self.index)

    def members(self, number: int) -> dict[str, Any]:
        """Return the members of one sample: extension -> bytes, and its `__url__` and `__key__`.

        Raises IndexError for a number outside [0, len), BadSample where the bytes are damaged or
        not those that were indexed.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        columns = self.index.columns
        shard = self.shards[columns["shard"][number]]
        start, stop = int(columns["start"][number]), int(columns["stop"][number])
        data = read(shard, start, stop, self.storage)
        members = parse(data, shard)
        key = self.index.key(number)
        if members.get("__key__") != key:
            raise BadSample(f"{shard}:{key}", "the file changed after it was indexed")
        return members

    def __getitem__(self, number: int) -> Sample:
        return self.sample(number)

    def sample(self, number: int, passing: str = "") -> Sample:
        """Return one sample, as it is in the pass that `passing` names (see `Builder.draws`)."""
        members = self.members(number)
        if passing and self.build.draws:
            members[PASS] = passing
        with blamed(f"{members['__url__']}:{members['__key__']}"):
            sample: Sample = dataclasses.replace(self.build(members), sample_id=number)
        return sample

    def measure(self, number: int) -> tuple[int, int]:
        """Return tokens and tiles of a sample, from headers alone where its builder can."""
        members = self.members(number)
        with blamed(f"{members['__url__']}:{members['__key__']}"):
            tokens, tiles = self.build.measure(members)
        return tokens, tiles

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [n, 2]: tokens and tiles of every sample, -1 where it cannot be built.

        Kept in the index under the builder's digest; counted on first use.
        """
        return self.index.count_lengths(
            builder_digest(self.build), self.measure, workers=os.cpu_count() or 1
        )

    def chosen(self, count: int, seed: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """Return a function from places in [0, count) to numbers of as many different samples.

        They are the same samples in every epoch.
        """
        key = (seed, "subset")
        if self.local_window is not None:
            return LocalPermutation(*self.index.shard_sizes(), self.local_window, *key)
        return Permutation(len(self), *key)

    def epoch(
        self, epoch: int, seed: int, count: int | None = None
    ) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """Return a function from places of an epoch to sample numbers.

        An epoch has all samples once, or `count` chosen ones.
        """
        if count is None or count == len(self):
            if self.local_window is not None:
                return LocalPermutation(*self.index.shard_sizes(), self.local_window, seed, epoch)
            return Permutation(len(self), seed, epoch)
        # The chosen samples are shuffled anew in each epoch, within windows where there are any.
        chosen = self.chosen(count, seed)
        if self.local_window is None:
            within: Permutation | LocalPermutation = Permutation(count, seed, epoch)
        else:
            starts = np.arange(0, count, self.local_window)
            sizes = np.minimum(self.local_window, count - starts)
            within = LocalPermutation(starts, sizes, self.local_window, seed, epoch)
        return lambda places: chosen(within(places))


def builder_digest(build: Any) -> str:
    """Return a digest of a builder's class, its settings and its tokenizer.

    Builders with the same digest make the same sample of the same members.

    Raises ValueError for a setting without a stable text form.
    """
    settings = {name: _described(value) for name, value in sorted(vars(build).items())}
    for name, text in settings.items():
        if " at 0x" in text:
            raise ValueError(
                f"{type(build).__name__}.{name}={text} has no stable text form, which the index"
                " of token counts needs; make it a dataclass, or give it a `digest`"
            )
    content = json.dumps([f"{type(build).__module__}.{type(build).__qualname__}", settings])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _described(value: Any) -> str:
    """Return a setting as text: its own digest and settings where it has one, else its repr."""
    if not hasattr(value, "digest"):
        return repr(value)
    names = {k: v for k, v in vars(value).items() if isinstance(v, str | int) and k != "path"}
    return f"{value.digest} {sorted(names.items())}"


def write_shards(
    folder: str | Path,
    name: str,
    samples: Iterable[Mapping[str, bytes | str]],
    *,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Write samples (`__key__`, then extension -> bytes) to `folder/name-00000.tar`, ...

    Return the paths. The same samples give the same bytes: modification times are fixed. All shards
    of this name that are there already are replaced, when all new ones are complete; a call that
    fails changes nothing.

    Raises ValueError for a name with folders, and for samples_per_shard below 1.
    """
    from webdataset.writer import TarWriter

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    if not name or Path(name).name != name:
        raise ValueError(f"name={name} must be a file name, without folders")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    pending = next(stream, None)
    count = 0
    # 1. Write all of them apart; only whole sets come under their names.
    with publish(folder / f".{name}.new") as new:
        new.mkdir()
        while pending is not None:
            with (
                open(new / f"{name}-{count:05d}.tar", "wb") as file,
                TarWriter(file, encoder=False, mtime=0) as tar,
            ):
                for _ in range(samples_per_shard):
                    tar.write(dict(pending))
                    pending = next(stream, None)
                    if pending is None:
                        break
            count += 1
    # 2. Replace the old set.
    for path in existing_shards(folder, name):
        path.unlink()
    complete = folder / f".{name}.new"
    paths = [path.replace(folder / path.name) for path in sorted(complete.iterdir())]
    complete.rmdir()
    return sorted(paths)


def existing_shards(folder: str | Path, name: str) -> list[Path]:
    """Return the shards in `folder` that `write_shards` has written under `name`."""
    pattern = re.compile(rf"{re.escape(name)}-\d{{5,}}\.tar")
    folder = Path(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if pattern.fullmatch(path.name))
