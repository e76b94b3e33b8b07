"""Which samples share a packed row: a pure plan from the lengths of a window of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvmm.data.order.permutation import Permutation

_BLOCK = 1024


@dataclass(frozen=True)
class Pack:
    """The samples of one packed row.

    samples: indices into the window, ascending (of a global batch: sample ids). length: tokens
    with the segments' padding. cost: sum of squared sample lengths + tile_cost x tiles.
    """

    samples: tuple[int, ...]
    length: int
    cost: int


def plan(
    lengths: Sequence[int] | NDArray[np.int64],
    capacity: int,
    *,
    tiles: Sequence[int] | NDArray[np.int64] | None = None,
    tile_cost: int = 0,
    segment_multiple: int = 1,
    group: int = 8,
    seed: int = 0,
) -> list[Pack]:
    """Pack a window of samples into rows of at most `capacity` tokens, every sample once.

    Fill comes first: the longest sample not placed yet goes to the fullest row that still takes
    it. Then the rows are ordered so that every `group` consecutive ones cost nearly the same,
    and the groups are shuffled: a global batch whose size `group` divides can be dealt evenly.
    The plan knows nothing of ranks.

    Args:
        lengths: tokens of each sample of the window.
        capacity: tokens of a row (data.sequence_length).
        tiles: encoder tiles of each sample, all zero by default.
        tile_cost: what a tile costs, in pairs of tokens that attend to one another.
        segment_multiple: each sample takes a multiple of this (Parallel.segment_multiple).
        group: rows of like cost.
        seed: of the order of the groups.

    Raises ValueError naming the first sample that is empty or longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    taken = -(-sizes // segment_multiple)
    room = capacity // segment_multiple
    bad = np.flatnonzero((sizes < 1) | (taken > room))
    if bad.size:
        raise ValueError(
            f"sample {bad[0]} of the window has {sizes[bad[0]]} tokens, a row takes 1 to"
            f" {room * segment_multiple} (data.sequence_length={capacity})"
        )
    if not sizes.size:
        return []
    rows = _best_fit(taken, room)
    cost = sizes**2
    if tiles is not None:
        cost += tile_cost * np.asarray(tiles, dtype=np.int64)
    count = int(rows.max()) + 1
    costs, used = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    np.add.at(costs, rows, cost)
    np.add.at(used, rows, taken)
    members = np.argsort(rows, kind="stable")
    ends = np.bincount(rows, minlength=count).cumsum()[:-1]
    samples = [part.tolist() for part in np.split(members, ends)]
    return [
        Pack(tuple(samples[row]), int(used[row]) * segment_multiple, int(costs[row]))
        for row in _order(costs, group, seed)
    ]


def _order(costs: NDArray[np.int64], group: int, seed: int) -> list[int]:
    """Rows in groups of like cost, the groups shuffled; what fills no group comes last.

    The dearest row of a group goes to the place that has had the least so far.
    """
    ranked = np.argsort(-costs, kind="stable")
    whole = len(ranked) // group * group
    groups = ranked[:whole].reshape(-1, group)
    total = np.zeros(group, dtype=np.int64)
    for dealt in groups:
        dealt[np.argsort(total, kind="stable")] = dealt.copy()
        total += costs[dealt]
    if len(groups):
        groups = groups[Permutation(len(groups), seed)(np.arange(len(groups)))]
    return [*groups.ravel().tolist(), *ranked[whole:].tolist()]


def deal(
    costs: Sequence[int], micro_batch_size: int, size: int, *, padded: bool
) -> list[list[list[int]]]:
    """Deal a global batch: for each of `size` ranks its micro-batches of indices into `costs`.

    All ranks get as many micro-batches, all micro-batches as many packs. padded: a micro-batch is
    as long as its longest row, so neighbours in cost share one; else packs are put together so
    that the micro-batches cost alike. Then the m-th micro-batches of the ranks are neighbours in
    cost, the dearest for the rank that has had the least.
    """
    cost = np.asarray(costs, dtype=np.int64)
    ranked = np.argsort(-cost, kind="stable")
    if padded:
        members = ranked.reshape(-1, micro_batch_size)
    else:
        members = np.empty((len(cost) // micro_batch_size, micro_batch_size), dtype=np.int64)
        total = np.zeros(len(members), dtype=np.int64)
        for layer, packs in enumerate(ranked.reshape(micro_batch_size, -1)):
            members[np.argsort(total, kind="stable"), layer] = packs
            total += cost[members[:, layer]]
    sums = cost[members].sum(axis=1)
    rounds = np.argsort(-sums, kind="stable").reshape(-1, size)
    had = np.zeros(size, dtype=np.int64)
    dealt: list[list[list[int]]] = [[] for _ in range(size)]
    for slots in rounds:
        for rank, slot in zip(np.argsort(had, kind="stable").tolist(), slots, strict=True):
            dealt[rank].append(sorted(members[slot].tolist()))
            had[rank] += sums[slot]
    return dealt


def _best_fit(taken: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Row of each sample, by best fit in decreasing order of size.

    `rooms[r]` lists the open rows with room r. A set of the rooms in use, in blocks of bits with
    a bit per block, finds the least sufficient one in constant time.
    """
    rows = np.empty(len(taken), dtype=np.int64)
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    blocks, in_use = [0] * (capacity // _BLOCK + 1), 0
    opened = 0
    order = np.argsort(-taken, kind="stable")
    least = int(taken.min())
    for sample, need in zip(order.tolist(), taken[order].tolist(), strict=True):
        block, bit = divmod(need, _BLOCK)
        found = blocks[block] >> bit
        if found:
            room = need + (found & -found).bit_length() - 1
        elif later := in_use >> (block + 1):
            block += (later & -later).bit_length()
            bits = blocks[block]
            room = block * _BLOCK + (bits & -bits).bit_length() - 1
        else:
            room = -1
        if room < 0:
            row, room = opened, capacity
            opened += 1
        else:
            row = rooms[room].pop()
            if not rooms[room]:
                block, bit = divmod(room, _BLOCK)
                blocks[block] ^= 1 << bit
                if not blocks[block]:
                    in_use ^= 1 << block
        rows[sample] = row
        left = room - need
        if left >= least:
            rooms[left].append(row)
            block, bit = divmod(left, _BLOCK)
            blocks[block] |= 1 << bit
            in_use |= 1 << block
    return rows
