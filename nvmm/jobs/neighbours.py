"""Which sounds of a training split stand before a sound: the nearest, or a draw, one a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nvmm.jobs.search import search

MORE = 50
"""Rows that are searched beyond the wanted ones, as in Audio Flamingo's code."""
_COLUMNS = {"key", "file", "group", "vector", "error"}
Ranking = Sequence[tuple[int, float]]
"""Rows and their distances, the nearest first."""


@dataclass(frozen=True)
class Query:
    """A sound that neighbours are wanted for. draw: what its random numbers depend on."""

    file: str
    group: str
    vector: NDArray[np.float32]
    draw: str


class Pool:
    """The sounds of a table of `encode_sounds` that have a vector, in their groups.

    normalize: bring vectors to length 1 before distances.
    """

    def __init__(self, table: pa.Table, normalize: bool) -> None:
        good = table["error"].is_null().to_numpy()
        self.files: list[str] = table["file"].to_pylist()
        self.groups: dict[str, NDArray[np.int64]] = {}
        encoded = table["group"].combine_chunks().dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        for code, group in enumerate(encoded.dictionary.to_pylist()):
            rows = np.flatnonzero((codes == code) & good)
            if len(rows):
                self.groups[group] = rows
        self._normalize = normalize
        self._chunks = [_values(chunk) for chunk in table["vector"].chunks]
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def nearest(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Return the k nearest rows of each query, which are of one group, by squared L2."""
        rows = self.groups[queries[0].group]
        vectors = self._scaled(np.stack([query.vector for query in queries]))
        scores, places = search(vectors, self._of_rows(rows), min(k, len(rows)), "l2")
        return [
            list(zip(rows[some].tolist(), (-values).tolist(), strict=True))
            for some, values in zip(places, scores, strict=True)
        ]

    def drawn(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Return k rows for each query, drawn without replacement; they have no distance."""
        rows = self.groups[queries[0].group]
        draws = [random.Random(f"{query.draw}/rows") for query in queries]
        places = [draw.sample(range(len(rows)), min(k, len(rows))) for draw in draws]
        return [[(row, float("nan")) for row in rows[some].tolist()] for some in places]

    def _of_rows(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the vectors of rows, which ascend, chunk by chunk."""
        bounds = np.searchsorted(rows, self._starts)
        for chunk, start, first, last in zip(
            self._chunks, self._starts, bounds[:-1], bounds[1:], strict=False
        ):
            yield self._scaled(chunk[rows[first:last] - start])

    def _scaled(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._normalize:
            return vectors
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        scaled: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return scaled


def check_columns(table: pa.Table, folder: str) -> None:
    """Raise ValueError for a table that is no output of `encode_sounds`."""
    if not set(table.column_names) >= _COLUMNS:
        raise ValueError(f"{folder} is no output of job=encode_sounds: {table.column_names}")


def queries_of(rows: pa.Table, seed: int) -> list[Query | str]:
    """Return the query of each row of `encode_sounds`, or its error."""
    found: list[Query | str] = []
    for row in rows.to_pylist():
        if row["error"] is not None:
            found.append(row["error"])
            continue
        vector = np.asarray(row["vector"], dtype=np.float32)
        found.append(Query(row["file"], row["group"], vector, f"{seed}/{row['key']}"))
    return found


def neighbours(
    queries: Sequence[Query],
    ranked: Callable[[Sequence[Query], int], list[Ranking]],
    files: Sequence[str],
    most: int,
    count: int,
) -> list[list[tuple[int, float]]]:
    """Return at most `count` rows of each query with their distances, of as many files.

    ranked: the best rows of queries. files: of all rows. most: rows that there are.

    Queries that find too few files among `count` + 51 rows look at four times as many, and so on.
    """
    result: dict[int, list[tuple[int, float]]] = {}
    pending, k = list(range(len(queries))), count + 1 + MORE
    while pending:
        rankings = ranked([queries[number] for number in pending], k)
        for number, ranking in zip(pending, rankings, strict=True):
            result[number] = one_a_file(ranking, files, queries[number], count)
        pending = [number for number in pending if len(result[number]) < count and k < most]
        k *= 4
    return [result[number] for number in range(len(queries))]


def one_a_file(
    ranking: Ranking, files: Sequence[str], query: Query, count: int
) -> list[tuple[int, float]]:
    """Return a drawn row of each of the first `count` files of a ranking, without the query's."""
    rows: dict[str, list[tuple[int, float]]] = {}
    for row, distance in ranking:
        if files[row] != query.file:
            rows.setdefault(files[row], []).append((row, distance))
    draw = random.Random(f"{query.draw}/file")
    return [draw.choice(some) for some in list(rows.values())[:count]]


def _values(chunk: Any) -> NDArray[np.float32]:
    """Return the vectors of a chunk [rows, h]; those of null rows are whatever is there."""
    size = chunk.type.list_size
    values: NDArray[np.float32] = chunk.values.to_numpy(zero_copy_only=False).reshape(-1, size)
    return values[chunk.offset : chunk.offset + len(chunk)]
