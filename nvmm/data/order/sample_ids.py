"""Sample ids: (dataset, epoch, number in the dataset) as one int64.

    bit 63   sign   62..53   dataset   52..32   epoch   31..0   number

Dataset 0 in epoch 0 has ids that are its numbers. A negative id is a slot without a sample:
-1 fills up the last batch of a validation, and `empty_slot(id)` stands where sample `id` was bad.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

DATASET_BITS, EPOCH_BITS, NUMBER_BITS = 10, 21, 32
FILLING = -1


def join(dataset: ArrayLike, epoch: ArrayLike, number: ArrayLike) -> NDArray[np.int64]:
    """Return int64 [n] ids.

    Raises ValueError for what does not fit: 1,023 datasets, 2^21 epochs, 2^32 samples a dataset.
    """
    fields = [np.asarray(field, dtype=np.int64) for field in (dataset, epoch, number)]
    # There is one dataset less than the bits allow, so that every id has an empty slot's id.
    limits = {"dataset": (1 << DATASET_BITS) - 1, "epoch": 1 << EPOCH_BITS}
    limits["number"] = 1 << NUMBER_BITS
    for (name, limit), field in zip(limits.items(), fields, strict=True):
        if field.size and (field.min() < 0 or field.max() >= limit):
            raise ValueError(
                f"{name} {field.max()} of a sample has no id: it must be below {limit}"
            )
    return fields[0] << (EPOCH_BITS + NUMBER_BITS) | fields[1] << NUMBER_BITS | fields[2]


def split(
    ids: ArrayLike,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (dataset, epoch, number) of each id, three int64 [n].

    The id of an empty slot gives those of the bad sample that it stands for.
    """
    samples = np.asarray(ids, dtype=np.int64)
    samples = np.where(samples < FILLING, empty_slot(samples), samples)
    return (
        samples >> (EPOCH_BITS + NUMBER_BITS),
        samples >> NUMBER_BITS & ((1 << EPOCH_BITS) - 1),
        samples & ((1 << NUMBER_BITS) - 1),
    )


def empty_slot(sample_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the id of the empty slot of bad sample `sample_id`; for an empty slot, the sample's.

    Its own inverse: id -> -2 - id.
    """
    return FILLING - 1 - sample_id
