"""The list `data.blend` of a config -> datasets with their weights.

data:
  blend:
    - {name: captions, weight: 3, shards: captions/*.tar}
    - {name: charts, weight: 1, epochs: 2, shards: charts/*.tar, build: ${...}}
    - weight: 2
      temperature: 2
      blend: # nested: these share the weight 2
        - {name: wiki, shards: wiki/*.tar}
        - {name: books, shards: books/*.tar, samples: 100000}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvmm.data.order.blend import Source
from nvmm.data.shards.dataset import Dataset

DATASET_KEYS = ("shards", "build", "local_window", "index_dir", "storage")


@dataclass(frozen=True)
class Part:
    """One dataset of a blend.

    weight: its share of the whole blend. epochs: passes after which it leaves (None: never).
    count: samples of a pass, all or as many chosen ones.
    """

    name: str
    dataset: Dataset
    weight: Fraction
    epochs: int | None
    count: int

    def source(self, consumed: int = 0) -> Source:
        """The blend's view of it."""
        return Source(self.name, self.count, self.weight, self.epochs, consumed)

    def identity(self) -> dict[str, Any]:
        """What decides its order: with another one, its consumed samples mean other samples."""
        return {
            "samples": self.count,
            "of": len(self.dataset),
            "local_window": self.dataset.local_window,
        }

    def numbers(self, epoch: int, places: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Numbers in the dataset of places [0, count) of an epoch."""
        return self.dataset.epoch(epoch, seed, self.count)(places)


def names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all datasets of a blend, in order; `name`, else the shards' patterns."""
    found = [_name(entry) for entry in _leaves(entries)]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ValueError(f"data.blend has several datasets named {', '.join(twice)}; give names")
    return found


def read(
    entries: Sequence[Mapping[str, Any]], train: Dataset, options: Mapping[str, Any]
) -> list[Part]:
    """The datasets of a blend, their builders bound with `options`.

    What an entry does not name (DATASET_KEYS) it has from `train`. Without weights, datasets count
    by their samples (times `repeat`), so that all come to an end together.
    """
    names(entries)
    parts = _read(entries, train, options)
    total = sum(part.weight for part in parts)
    return [replace(part, weight=part.weight / total) for part in parts]


def _leaves(entries: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for entry in entries:
        if entry.get("blend") is None:
            yield entry
        else:
            yield from _leaves(entry["blend"])


def _name(entry: Mapping[str, Any]) -> str:
    shards = entry.get("shards") or ""
    return str(entry.get("name") or (shards if isinstance(shards, str) else ",".join(shards)))


def _read(
    entries: Sequence[Mapping[str, Any]],
    train: Dataset,
    options: Mapping[str, Any],
    temperature: float = 1.0,
) -> list[Part]:
    """Parts of one list, each with its weight in it."""
    groups = [_group(entry, train, options) for entry in entries]
    found: list[Part] = []
    for entry, group in zip(entries, groups, strict=True):
        inner = sum((part.weight for part in group), Fraction(0))
        weight = entry.get("weight")
        own = Fraction(str(weight)) if weight is not None else _size(group) * entry.get("repeat", 1)
        if temperature != 1.0:
            own = Fraction(float(own) ** (1 / temperature))
        found += [replace(part, weight=own * part.weight / inner) for part in group]
    return found


def _group(entry: Mapping[str, Any], train: Dataset, options: Mapping[str, Any]) -> list[Part]:
    """The one dataset of an entry, or those of its nested list."""
    if entry.get("blend") is not None:
        return _read(entry["blend"], train, options, float(entry.get("temperature") or 1.0))
    merged = {key: entry.get(key) or getattr(train, key) for key in DATASET_KEYS[1:]}
    dataset = Dataset(entry["shards"], **merged).bind(**options)
    wanted = entry.get("samples")
    count = len(dataset) if wanted is None else wanted
    if isinstance(count, float):
        count = max(1, round(count * len(dataset)))
    if not 1 <= count <= len(dataset):
        raise ValueError(
            f"data.blend: samples={wanted} of {_name(entry)} must be a fraction, or a number of"
            f" at most its {len(dataset)} samples"
        )
    return [Part(_name(entry), dataset, Fraction(1), entry.get("epochs"), count)]


def _size(group: Sequence[Part]) -> Fraction:
    return Fraction(sum(part.count for part in group))
