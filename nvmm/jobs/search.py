"""Rankings: the documents of largest dot product with each query, by the vectors of two jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from numpy.typing import NDArray

from nvmm.data.prepare.layouts import RetrievalSet
from nvmm.evaluation.ranking import mean_scores
from nvmm.inference.restore import Restored
from nvmm.jobs.encode import Vectors
from nvmm.jobs.job import Job, Work, digest, file_digest, items_digest
from nvmm.jobs.parts import Parts, recorded

Metric = Literal["dot", "l2"]
_SLACK = 64
"""Documents of equal score are ranked by place; so many more are searched to see them all."""


@dataclass(frozen=True)
class Hit:
    """A document of a ranking. rank: 1 for the best."""

    document: str
    score: float
    rank: int


def search(
    queries: NDArray[Any],
    chunks: Iterable[NDArray[Any]],
    k: int,
    metric: Metric = "dot",
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and places [q, k] of the documents nearest to each query, best first.

    chunks: the documents' vectors [rows, h], chunk after chunk; one chunk is in memory at a time.
    metric: dot: scores are dot products. l2: they are squared distances times -1.
    Equal scores are ranked by place.
    """
    scores, places = _best(queries, _placed(chunks), k, metric)
    return scores[:, :k], places[:, :k]


def _placed(chunks: Iterable[NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield each chunk with its first place."""
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)


def _best(
    queries: NDArray[Any],
    chunks: Iterable[tuple[int, NDArray[Any]]],
    k: int,
    metric: Metric = "dot",
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and places of the k best and some more of chunks, each with its first place."""
    import faiss

    kind, sign = (faiss.METRIC_L2, -1) if metric == "l2" else (faiss.METRIC_INNER_PRODUCT, 1)

    rows = np.ascontiguousarray(queries, dtype=np.float32)
    scores = np.empty((len(rows), 0), dtype=np.float32)
    places = np.empty((len(rows), 0), dtype=np.int64)
    for first, chunk in chunks:
        documents = np.ascontiguousarray(chunk, dtype=np.float32)
        if not len(documents):
            continue
        some = min(k + _SLACK, len(documents))
        new_scores, new_places = faiss.knn(rows, documents, some, metric=kind)
        scores, places = _merged([(scores, places), (sign * new_scores, new_places + first)], k)
    return scores, places


def _merged(
    parts: Sequence[tuple[NDArray[Any], NDArray[Any]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the best scores and their places of several lists; equal scores by place."""
    scores, places = (np.concatenate(list(some), axis=1) for some in zip(*parts, strict=True))
    order = np.lexsort((places, -scores), axis=1)[:, : k + _SLACK]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(places, order, axis=1)


def _require_fitting(
    found: Mapping[str, Any], asked: Mapping[str, Any], corpus: str, queries: str
) -> None:
    """Raise ValueError for vectors of the other side, and for those of two models.

    found, asked: identities of the jobs that wrote the folders `corpus` and `queries`. The sample
    builders may differ, as by a sequence length of its own for queries.
    """
    for key, folder, identity in (("corpus", corpus, found), ("queries", queries, asked)):
        side = recorded(identity, folder, "job", "side")
        if side != key:
            raise ValueError(f"job.{key}={folder} was encoded with job.side={side}")
    for part in ("weights", "model", "tokenizer"):
        first = recorded(found, corpus, "checkpoint", part)
        second = recorded(asked, queries, "checkpoint", part)
        if first != second:
            raise ValueError(
                f"{corpus} and {queries} are vectors of two checkpoints, whose {part} differ:"
                f" {first[:12]} and {second[:12]}"
            )


class Neighbours:
    """The judged queries of a set, and the documents near them, by the vectors of two jobs.

    asked: ids of the queries to rank for, by default the judged ones in their order. items: a
        digest of the documents. inputs: one of what rankings depend on. errors: id -> why a query
        has no vector.

    Raises ValueError for judgements of ids that the `encode` jobs have not, and for vectors of
    other documents, of the other side, and of two checkpoints.
    """

    def __init__(self, data: RetrievalSet, queries: str, corpus: str) -> None:
        found, asked = Vectors.read(corpus), Vectors.read(queries)
        _require_fitting(found.identity, asked.identity, corpus, queries)
        self.items = items_digest(data.documents)
        if recorded(found.identity, corpus, "inputs", "items") != self.items:
            raise ValueError(
                f"job.corpus={corpus} has vectors of other documents than job.data names"
            )
        self.documents, self._chunks = found.ids, found.chunks
        self.errors = asked.errors
        self.relevant = data.relevant
        self.asked = data.asked
        self._query_places = {name: place for place, name in enumerate(asked.ids)}
        self._places = {name: place for place, name in enumerate(self.documents)}
        unknown = [q for q in self.asked if q not in self._query_places and q not in asked.errors]
        unknown += [
            name
            for query in self.asked
            for name in self.relevant.get(query, ())
            if name not in self._places and name not in found.errors
        ]
        if unknown or not self.asked:
            raise ValueError(
                f"{corpus} and {queries}: judgements name {len(unknown)} ids without a vector:"
                f" {unknown[:5]}"
                if unknown
                else "there are no judgements, so there is no query to rank documents for"
            )
        self._queries, self._vectors = _Rows(asked.chunks), _Rows(self._chunks)
        self.inputs = digest(
            *(
                file_digest(Path(folder).expanduser() / "manifest.json")
                for folder in (queries, corpus)
            ),
            data.judgements,
        )

    def query(self, name: str) -> NDArray[np.float32]:
        """Return the vector [h] of a query that has one."""
        return self._queries[[self._query_places[name]]][0].astype(np.float32)

    def positive_score(self, name: str) -> float | None:
        """Return the score of a query's lowest-scored relevant document, None without a vector."""
        places = [self._places[doc] for doc in self.relevant[name] if doc in self._places]
        if not places:
            return None
        return float((self._vectors[places].astype(np.float32) @ self.query(name)).min())

    def rankings(self, names: Sequence[str], k: int) -> dict[str, list[Hit]]:
        """Return the k nearest documents of each query that has a vector, best first; collective.

        Each rank searches its part of the documents, and the parts are merged.
        """
        found = [name for name in names if name in self._query_places]
        if not found:
            return {}
        rank, size = dist.get_rank(), dist.get_world_size()
        starts = np.cumsum([0, *map(len, self._chunks)]).tolist()
        own = list(zip(starts, self._chunks, strict=False))[rank::size]
        k = min(k, len(self.documents))
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, _best(np.stack([self.query(name) for name in found]), own, k))
        scores, places = _merged(parts, k)
        return {
            name: [
                Hit(self.documents[place], score, number)
                for number, (score, place) in enumerate(zip(*row, strict=True), 1)
            ]
            for name, *row in zip(
                found, scores[:, :k].tolist(), places[:, :k].tolist(), strict=True
            )
        }


@dataclass(frozen=True, kw_only=True)
class Search(Job):
    """Rank the documents for every judged query, with the vectors that two `encode` jobs wrote.

    A row has `query_id`, `ids` and `scores` of its best documents, best first, and `error` (why the
    query has no vector, else null). metrics.json has the means over the judged queries.

    Args:
        data: the retrieval set, for its judgements.
        queries, corpus: folders of the `encode` jobs.
        k: documents of a ranking.
        part_size: queries of a part file.
    """

    data: RetrievalSet
    queries: str
    corpus: str
    k: int = 100
    part_size: int = 1024
    name: str = "search"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"job.k={self.k} must be at least 1")

    def prepare(self, model: Restored | None) -> Work:
        """Open vectors and judgements."""
        if model is not None:
            raise ValueError("job=search reads vectors; leave checkpoint= out")
        near = Neighbours(self.data, self.queries, self.corpus)

        def rows(numbers: range) -> pa.Table:
            chosen = [near.asked[number] for number in numbers]
            rankings = near.rankings(chosen, self.k)
            return pa.Table.from_pylist(
                [
                    {
                        "query_id": query,
                        "ids": [hit.document for hit in rankings.get(query, [])],
                        "scores": [hit.score for hit in rankings.get(query, [])],
                        "error": near.errors.get(query),
                    }
                    for query in chosen
                ],
                SCHEMA,
            )

        inputs = {"items": near.items, "vectors": near.inputs}
        return Work(len(near.asked), inputs, rows, together=True)

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return hit rate, recall, nDCG, MRR and mAP of the rankings; none without judgements."""
        if not self.data.relevant:
            return {}
        return mean_scores(rankings_of(rows), self.data.relevant)


def read_rankings(folder: str | Path) -> dict[str, list[str]]:
    """Return query id -> document ids, best first, of the output of `search` or `rerank`.

    Raises ValueError where it is not whole, or is another job's.
    """
    table = Parts(Path(folder).expanduser()).read()
    if not {"query_id", "ids"} <= set(table.column_names):
        raise ValueError(f"{folder} is no output of job=search: it has {table.column_names}")
    return rankings_of(table)


def rankings_of(rows: pa.Table) -> dict[str, list[str]]:
    """Return query id -> document ids of a table of rankings."""
    return dict(zip(rows["query_id"].to_pylist(), rows["ids"].to_pylist(), strict=True))


class _Rows:
    """Rows of chunks by place, without joining the chunks."""

    def __init__(self, chunks: Sequence[NDArray[Any]]) -> None:
        self._chunks = chunks
        self._starts = np.cumsum([0, *map(len, chunks)])

    def __getitem__(self, places: Sequence[int]) -> NDArray[Any]:
        """Return the rows at these places."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        return np.stack(
            [
                self._chunks[chunk][place - self._starts[chunk]]
                for chunk, place in zip(numbers.tolist(), places, strict=True)
            ]
        )


SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "error": pa.string(),
    }
)
