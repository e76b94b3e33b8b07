"""Webdataset shards: plain tar files whose consecutive members share a key.

`Dataset` reads any sample by its number. Nothing is extracted to disk and nothing is unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
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
from nvmm.data.shards.index import Index, open_index
from nvmm.data.shards.storage import Storage, expand, read
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
        for pattern in self.patterns:
            matches = expand(pattern, self.storage)
            if not matches:
                raise ValueError(f"shards: pattern {pattern} matches no file")
            urls += matches
        if not urls:
            raise ValueError("shards=null names no file; give at least one pattern")
        return urls

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
        members = self.members(number)
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
    first_shard: int = 0,
) -> list[Path]:
    """Write samples (`__key__`, then extension -> bytes) to `folder/name-00000.tar`, ...

    Return the paths. The same samples give the same bytes: modification times are fixed. Existing
    files of these names are replaced, each only when it is complete.

    Raises ValueError for a name with folders, and for samples_per_shard below 1.
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
        with (
            publish(path) as temporary,
            open(temporary, "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for _ in range(samples_per_shard):
                tar.write(dict(pending))
                pending = next(stream, None)
                if pending is None:
                    break
        paths.append(path)
    return paths
