"""Planning which samples share a packed row, from the lengths of a window of samples alone.

capacity 8, samples of 5 2 4 3 1 tokens (a b c d e), longest first into the fullest row:

row 0   a a a a a d d d
row 1   b b c c c c e .
"""

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

    samples: indices into the window, ascending; in a global batch, sample ids. length: its tokens
    with the padding of the segments. cost: sum of squared sample lengths + tile_cost x tiles.
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
    texts: Sequence[int] | NDArray[np.int64] | int = 1,
    group: int = 8,
    seed: int = 0,
) -> list[Pack]:
    """Pack a window of samples into rows of at most `capacity` tokens, every sample once.

    Fill comes first: the longest sample not placed yet goes to the fullest row that still takes
    it. Then the rows are ordered so that every `group` consecutive ones cost nearly the same,
    and the groups are shuffled: a global batch whose size `group` divides can be assigned to ranks
    evenly. The plan knows nothing of ranks.

    Args:
        lengths: tokens of each sample of the window.
        capacity: tokens of a row (data.sequence_length).
        tiles: encoder tiles of each sample, all zero by default.
        tile_cost: cost of a tile, in pairs of tokens that attend to one another.
        segment_multiple: each text takes a multiple of this (Parallel.segment_multiple).
        texts: most texts of each sample, whose lengths are not known.
        group: number of consecutive rows of like cost.
        seed: seed of the order of the groups.

    Raises ValueError naming the first sample that is empty or longer than a row.
    """
    # 1. Measure samples and rows in multiples of a segment, and refuse what fits no row.
    sizes = np.asarray(lengths, dtype=np.int64)
    taken = multiples(sizes, segment_multiple, np.asarray(texts, dtype=np.int64))
    room = capacity // segment_multiple
    bad = np.flatnonzero((sizes < 1) | (taken > room))
    if bad.size:
        raise ValueError(
            f"sample {bad[0]} of the window has {sizes[bad[0]]} tokens, with the padding of"
            f" its texts a row takes 1 to {room * segment_multiple}"
            f" (data.sequence_length={capacity})"
        )
    if not sizes.size:
        return []
    # 2. Give every sample a row, then add up what each row takes and costs. Attention inside a
    # segment costs the square of its length.
    rows = _best_fit(taken, room)
    cost = sizes**2
    if tiles is not None:
        cost += tile_cost * np.asarray(tiles, dtype=np.int64)
    count = int(rows.max()) + 1
    costs, used = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    np.add.at(costs, rows, cost)
    np.add.at(used, rows, taken)
    # 3. List the samples of each row, and put the rows in their order.
    members = np.argsort(rows, kind="stable")
    ends = np.bincount(rows, minlength=count).cumsum()[:-1]
    samples = [row_members.tolist() for row_members in np.split(members, ends)]
    return [
        Pack(tuple(samples[row]), int(used[row]) * segment_multiple, int(costs[row]))
        for row in _order(costs, group, seed)
    ]


def multiples(
    tokens: NDArray[np.int64], segment_multiple: int, texts: NDArray[np.int64] | int = 1
) -> NDArray[np.int64]:
    """Return how many times `segment_multiple` samples of at most so many texts take at most.

    Each text is padded by itself: two of 3 tokens take 8 where the multiple is 4, and not 6.
    """
    return (tokens + texts * (segment_multiple - 1)) // segment_multiple


def _order(costs: NDArray[np.int64], group: int, seed: int) -> list[int]:
    """Return the rows in groups of like cost, the groups shuffled; the last may be incomplete.

    The costliest row of a group goes to the column of the groups that costs the least so far, so
    that the columns, which ranks are given, cost alike too.
    """
    ranked = np.argsort(-costs, kind="stable")
    in_groups = len(ranked) // group * group
    groups = ranked[:in_groups].reshape(-1, group)
    column_costs = np.zeros(group, dtype=np.int64)
    for members in groups:
        members[np.argsort(column_costs, kind="stable")] = members.copy()
        column_costs += costs[members]
    if len(groups):
        groups = groups[Permutation(len(groups), seed)(np.arange(len(groups)))]
    return [*groups.ravel().tolist(), *ranked[in_groups:].tolist()]


def assign(
    costs: Sequence[int], micro_batch_size: int, size: int, *, padded: bool
) -> list[list[list[int]]]:
    """Assign a global batch to `size` ranks: return micro-batches of indices into `costs` for each.

    All ranks get as many micro-batches, all micro-batches as many packs. padded: a micro-batch is
    as long as its longest row, so neighbours in cost share one; else packs are put together so
    that the micro-batches cost alike. Then the m-th micro-batches of the ranks are neighbours in
    cost, the costliest for the rank whose micro-batches cost the least so far.
    """
    # 1. Make micro-batches: rows of `members`.
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
    # 2. Give every rank one of each `size` neighbours in cost.
    sums = cost[members].sum(axis=1)
    rounds = np.argsort(-sums, kind="stable").reshape(-1, size)
    rank_costs = np.zeros(size, dtype=np.int64)
    assigned: list[list[list[int]]] = [[] for _ in range(size)]
    for neighbours in rounds:
        ranks = np.argsort(rank_costs, kind="stable").tolist()
        for rank, micro_batch in zip(ranks, neighbours, strict=True):
            assigned[rank].append(sorted(members[micro_batch].tolist()))
            rank_costs[rank] += sums[micro_batch]
    return assigned


def _best_fit(taken: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return int64 [n], the row of each sample, by best fit in decreasing order of size.

    `rooms[r]` lists the open rows with room r. The rooms in use are a set of bits in blocks, with
    a bit for each block, so that the least sufficient room is found in constant time.
    """
    rows = np.empty(len(taken), dtype=np.int64)
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    blocks, in_use = [0] * (capacity // _BLOCK + 1), 0
    opened = 0
    order = np.argsort(-taken, kind="stable")
    least = int(taken.min())
    for sample, need in zip(order.tolist(), taken[order].tolist(), strict=True):
        # 1. Find the least room that suffices: in the need's own block of bits, else in the next
        # block that has any. `x & -x` is the lowest bit of x.
        block, bit = divmod(need, _BLOCK)
        if sufficient := blocks[block] >> bit:
            room = need + (sufficient & -sufficient).bit_length() - 1
        elif later := in_use >> (block + 1):
            block += (later & -later).bit_length()
            bits = blocks[block]
            room = block * _BLOCK + (bits & -bits).bit_length() - 1
        else:
            room = -1
        # 2. Take a row with that room off its list, or open a new row.
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
        # 3. List the row under the room that is left, unless no sample is that short.
        left = room - need
        if left >= least:
            rooms[left].append(row)
            block, bit = divmod(left, _BLOCK)
            blocks[block] |= 1 << bit
            in_use |= 1 << block
    return rows
