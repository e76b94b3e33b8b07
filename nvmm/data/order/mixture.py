"""The list `data.blend` of a config becomes datasets with their weights.

data:
  blend:
    - {name: captions, weight: 3, shards: captions/*.tar}
    - {name: charts, weight: 1, epochs: 2, shards: charts/*.tar, build: ${...}}
    - weight: 2
      temperature: 2
      blend: # nested: these share the weight 2
        - {name: wiki, shards: wiki/*.tar}
        - {name: books, shards: books/*.tar, samples: 100000}

or, where a run's passes over every data set are given, `passes` for each of them and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvmm.data.order.blend import Source, samples_of
from nvmm.data.shards.dataset import Dataset

DATASET_KEYS = ("shards", "build", "local_window", "index_dir", "storage")


@dataclass(frozen=True)
class Component:
    """One dataset of a blend.

    weight: its share of the whole blend. epochs: passes after which it leaves (None: never), which
    may be a fraction.
    count: samples of a pass, all or as many chosen ones.
    """

    name: str
    dataset: Dataset
    weight: Fraction
    epochs: float | None
    count: int

    def source(self, consumed: int = 0) -> Source:
        """Return it as a source of a blend, without the dataset."""
        return Source(self.name, self.count, self.weight, self.epochs, consumed)

    def identity(self) -> dict[str, Any]:
        """Return the values that decide its order.

        With other values, the samples that were consumed are other samples.
        """
        return {
            "samples": self.count,
            "of": len(self.dataset),
            "local_window": self.dataset.local_window,
        }

    def numbers(self, epoch: int, places: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Return int64 [n], the numbers in the dataset at `places`, in [0, count), of an epoch."""
        return self.dataset.epoch(epoch, seed, self.count)(places)


def names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all datasets of a blend, in order; `name`, else the shards' patterns.

    Raises ValueError when two have the same.
    """
    all_names = [_name(entry) for entry in _leaves(entries)]
    twice = sorted({name for name in all_names if all_names.count(name) > 1})
    if twice:
        raise ValueError(f"data.blend has several datasets named {', '.join(twice)}; give names")
    return all_names


def read(
    entries: Sequence[Mapping[str, Any]], train: Dataset, options: Mapping[str, Any]
) -> list[Component]:
    """Return the datasets of a blend, their builders bound with `options`; their weights sum to 1.

    An entry inherits the keys that it does not name (DATASET_KEYS) from `train`. Without weights,
    datasets count by their samples (times `repeat`), so that all come to an end together. With
    `passes` they count by the samples of so many passes, and the blend ends when all have had them.

    Raises ValueError for a name that is there twice, a number of samples that a dataset lacks, and
    passes that are no sample.
    """
    names(entries)
    components = _read(entries, train, options)
    total = sum(component.weight for component in components)
    return [replace(component, weight=component.weight / total) for component in components]


def builders(
    entries: Sequence[Mapping[str, Any]], train: Dataset, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the builder of each dataset, by its name, bound with `options`; opens no shard."""
    return {_name(entry): _dataset(entry, train, options).build for entry in _leaves(entries)}


def _leaves(entries: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the entries that are datasets, those of nested lists too."""
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
) -> list[Component]:
    """Return the datasets of one list, each with its weight in it."""
    groups = [_group(entry, train, options) for entry in entries]
    components: list[Component] = []
    for entry, group in zip(entries, groups, strict=True):
        # The weights inside a group are shares of the weight that the group has in this list.
        inner_sum = sum((component.weight for component in group), Fraction(0))
        if entry.get("weight") is not None:
            weight = Fraction(str(entry["weight"]))
        elif entry.get("passes") is not None:
            weight = Fraction(samples_of(entry["passes"], group[0].count))
        else:
            num_samples = sum(component.count for component in group)
            weight = Fraction(num_samples) * entry.get("repeat", 1)
        # A temperature above 1 brings the weights of the list closer together.
        if temperature != 1.0:
            weight = Fraction(float(weight) ** (1 / temperature))
        components += [
            replace(component, weight=weight * component.weight / inner_sum) for component in group
        ]
    return components


def _dataset(entry: Mapping[str, Any], train: Dataset, options: Mapping[str, Any]) -> Dataset:
    merged = {key: entry.get(key) or getattr(train, key) for key in DATASET_KEYS[1:]}
    return Dataset(entry["shards"], **merged).bind(**options)


def _group(entry: Mapping[str, Any], train: Dataset, options: Mapping[str, Any]) -> list[Component]:
    """Return the one dataset of an entry, or those of its nested list."""
    if entry.get("blend") is not None:
        return _read(entry["blend"], train, options, float(entry.get("temperature") or 1.0))
    dataset = _dataset(entry, train, options)
    limit = entry.get("samples")
    count = len(dataset) if limit is None else limit
    if isinstance(count, float):
        count = max(1, round(count * len(dataset)))
    if not 1 <= count <= len(dataset):
        raise ValueError(
            f"data.blend: samples={limit} of {_name(entry)} must be a fraction, or a number of"
            f" at most its {len(dataset)} samples"
        )
    passes = entry.get("passes")
    if passes is not None and samples_of(passes, count) < 1:
        raise ValueError(
            f"data.blend: passes={passes} of {_name(entry)} with {count} samples are no sample"
        )
    epochs = entry.get("epochs") if passes is None else passes
    return [Component(_name(entry), dataset, Fraction(1), epochs, count)]
