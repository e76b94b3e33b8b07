"""Sample ids: (dataset, epoch, number in the dataset) as one int64.

    bit 63   sign   62..53   dataset   52..32   epoch   31..0   number

Dataset 0 in epoch 0 has ids that are its numbers. A negative id is a place without a sample:
-1 fills up the last batch of a validation, and `hole(id)` stands where sample `id` was bad.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

DATASET_BITS, EPOCH_BITS, NUMBER_BITS = 10, 21, 32
FILLING = -1


def join(dataset: ArrayLike, epoch: ArrayLike, number: ArrayLike) -> NDArray[np.int64]:
    """int64 [n] ids. Raises ValueError for what does not fit: 1,023 datasets, 2^21 epochs, 2^32
    samples a dataset."""
    parts = [np.asarray(part, dtype=np.int64) for part in (dataset, epoch, number)]
    # one dataset less than the bits allow, so that every id has a hole
    limits = {"dataset": (1 << DATASET_BITS) - 1, "epoch": 1 << EPOCH_BITS}
    limits["number"] = 1 << NUMBER_BITS
    for (name, limit), part in zip(limits.items(), parts, strict=True):
        if part.size and (part.min() < 0 or part.max() >= limit):
            raise ValueError(f"{name} {part.max()} of a sample has no id: it must be below {limit}")
    return parts[0] << (EPOCH_BITS + NUMBER_BITS) | parts[1] << NUMBER_BITS | parts[2]


def split(
    ids: ArrayLike,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(dataset, epoch, number) of each id, of a hole those of the sample that is missing there."""
    whole = np.asarray(ids, dtype=np.int64)
    whole = np.where(whole < FILLING, hole(whole), whole)
    return (
        whole >> (EPOCH_BITS + NUMBER_BITS),
        whole >> NUMBER_BITS & ((1 << EPOCH_BITS) - 1),
        whole & ((1 << NUMBER_BITS) - 1),
    )


def hole(sample_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """The id of the place where bad sample `sample_id` was; of a hole, the sample's."""
    return FILLING - 1 - sample_id
