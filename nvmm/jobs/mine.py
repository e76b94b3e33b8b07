"""Hard negatives: the documents that an embedder ranks high without their being relevant."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nvmm.config.choices import require
from nvmm.data.prepare import retrieval_sets
from nvmm.inference.restore import Restored
from nvmm.jobs.encode import read_vectors
from nvmm.jobs.job import Job, Work, digest, file_digest

Strategy = Literal["top", "random"]
_SLACK = 64
"""Documents of equal score are ranked by place; so many more are searched to see them all."""


@dataclass(frozen=True)
class Hit:
    """A document of a ranking. rank: 1 for the best."""

    document: str
    score: float
    rank: int


@dataclass(frozen=True)
class Filters:
    """Which of a query's best documents may be its negatives; relevant ones never are.

    The names are those of sentence-transformers' `mine_hard_negatives`. A positive's score is that
    of the lowest-scored relevant document.

    range_min: best ranks to leave out. range_max: worst rank to take. max_score, min_score: bounds
    of a negative's score. absolute_margin: its score is at most the positive's minus this.
    relative_margin: at most (1 - this) times the positive's; 0.05 is NV-Retriever's 95 % (Moreira
    et al. 2024, arXiv:2407.15831, TopK-PercPos).
    """

    range_min: int = 0
    range_max: int = 100
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"job.range_min={self.range_min} must be at least 0 and below"
                f" job.range_max={self.range_max}"
            )

    def accepts(self, hit: Hit, positive: float) -> bool:
        """Return whether a document may be a negative beside a positive of this score."""
        highest = [] if self.max_score is None else [self.max_score]
        if self.absolute_margin is not None:
            highest.append(positive - self.absolute_margin)
        if self.relative_margin is not None:
            highest.append(positive * (1 - self.relative_margin))
        return (
            self.range_min < hit.rank <= self.range_max
            and hit.score <= min(highest, default=float("inf"))
            and (self.min_score is None or hit.score >= self.min_score)
        )


def modality_aware(
    ranking: Sequence[Hit],
    relevant: Mapping[str, int],
    modality: Mapping[str, str],
    target: str,
    floor: int,
) -> tuple[list[Hit], list[Hit]]:
    """Return the two kinds of negatives of MM-Embed (arXiv:2411.02571, section 3).

    The first are documents of another modality than the target above the best relevant one, the
    second those of the target modality below rank `floor`. A relevant document that the ranking
    has not lies behind its end.
    """
    positive = min((hit.rank for hit in ranking if hit.document in relevant), default=None)
    others = [hit for hit in ranking if hit.document not in relevant]
    wrong = [
        hit
        for hit in others
        if modality[hit.document] != target and (positive is None or hit.rank < positive)
    ]
    weak = [hit for hit in others if modality[hit.document] == target and hit.rank > floor]
    return wrong, weak


def choose(hits: Sequence[Hit], count: int, strategy: Strategy, seed: object) -> list[Hit]:
    """Return at most `count` of the hits, best first: the best, or a draw by the seed."""
    if strategy == "random" and len(hits) > count:
        return sorted(random.Random(repr(seed)).sample(list(hits), count), key=lambda h: h.rank)
    return list(hits[:count])


def choose_from_both(
    first: Sequence[Hit], second: Sequence[Hit], count: int, seed: object
) -> list[Hit]:
    """Return at most `count` of the hits; each draw takes either list with equal probability.

    A list that is used up leaves the draws to the other.
    """
    draw = random.Random(repr(seed))
    lists = [list(first), list(second)]
    chosen: list[Hit] = []
    while len(chosen) < count and any(lists):
        side = [hits for hits in lists if hits]
        hits = side[draw.randrange(len(side))]
        chosen.append(hits.pop(draw.randrange(len(hits))))
    return chosen


def search(
    queries: NDArray[Any], chunks: Sequence[NDArray[Any]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and places [q, k] of the documents of largest dot product, best first.

    chunks: the documents' vectors [rows, h], chunk after chunk; one chunk is in memory at a time.
    Equal scores are ranked by place.
    """
    import faiss

    rows = np.ascontiguousarray(queries, dtype=np.float32)
    scores = np.empty((len(rows), 0), dtype=np.float32)
    places = np.empty((len(rows), 0), dtype=np.int64)
    first = 0
    for chunk in chunks:
        documents = np.ascontiguousarray(chunk, dtype=np.float32)
        some = min(k + _SLACK, len(documents))
        new_scores, new_places = faiss.knn(rows, documents, some, metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([scores, new_scores], axis=1)
        places = np.concatenate([places, new_places + first], axis=1)
        order = np.lexsort((places, -scores), axis=1)[:, : k + _SLACK]
        scores = np.take_along_axis(scores, order, axis=1)
        places = np.take_along_axis(places, order, axis=1)
        first += len(documents)
    return scores[:, :k], places[:, :k]


@dataclass(frozen=True, kw_only=True)
class Mine(Filters, Job):
    """Mine hard negatives with the vectors that two `encode` jobs wrote.

    A row has `query_id`, `ids` and `scores` of its negatives, best first, and `positive_score`
    (null where the query has no relevant document among the vectors, and so no negatives).
    `tools/retrieval_data.py beir --negatives` takes the folder.

    Args:
        folder: the set in BEIR's layout, for its qrels.
        queries, corpus: folders of the `encode` jobs.
        split: which qrels; only their queries are mined for.
        num_negatives: negatives of a query, at most.
        strategy: "top", the best ranked, or "random", a draw by the seed.
        range_min ... relative_margin: see `Filters`.
        modality_floor: None, or the rank below which a document of the target modality is a
            negative (MM-Embed: 45, of range_max=50): negatives then are those of `modality_aware`.
            Documents have a field `modality` in corpus.jsonl; the target is that of the query's
            relevant documents.
        seed: seed of draws; a draw depends on it and the query's id alone.
        part_size: queries of a part file.
    """

    folder: str
    queries: str
    corpus: str
    split: str = "train"
    num_negatives: int = 7
    strategy: Strategy = "top"
    modality_floor: int | None = None
    seed: int = 1234
    part_size: int = 1024
    name: str = "mine"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("job.strategy", self.strategy, Strategy)
        if self.num_negatives < 1:
            raise ValueError(f"job.num_negatives={self.num_negatives} must be at least 1")
        if self.modality_floor is not None and not 0 <= self.modality_floor < self.range_max:
            raise ValueError(
                f"job.modality_floor={self.modality_floor} must be at least 0 and below"
                f" job.range_max={self.range_max}"
            )

    def prepare(self, model: Restored | None) -> Work:
        """Open vectors and qrels. Raises ValueError for qrels of ids that have no vector."""
        if model is not None:
            raise ValueError("job=mine reads vectors; leave checkpoint= out")
        documents, chunks = read_vectors(self.corpus)
        query_ids, query_chunks = read_vectors(self.queries)
        qrels = retrieval_sets.read_qrels(self.folder, self.split)
        place_of_query = {name: place for place, name in enumerate(query_ids)}
        place_of_document = {name: place for place, name in enumerate(documents)}
        mined = list(qrels)
        unknown = [name for name in mined if name not in place_of_query]
        unknown += [name for q in mined for name in qrels[q] if name not in place_of_document]
        if unknown:
            raise ValueError(
                f"{self.folder}: qrels of {self.split} name {len(unknown)} ids without a vector:"
                f" {unknown[:5]}"
            )
        modality: dict[str, str] = {}
        if self.modality_floor is not None:
            modality = retrieval_sets.read_modalities(self.folder)
        vectors = _Rows(query_chunks)
        document_vectors = _Rows(chunks)

        def rows(numbers: range) -> pa.Table:
            chosen = [mined[number] for number in numbers]
            asked = vectors[[place_of_query[name] for name in chosen]].astype(np.float32)
            # A relevant document takes a place in the ranking, but is no negative.
            most = max(len(qrels[name]) for name in chosen)
            k = min(self.range_max + most, len(documents))
            scores, places = search(asked, chunks, k)
            records = []
            for row, query in enumerate(chosen):
                relevant = qrels[query]
                ranking = [
                    Hit(documents[place], float(score), rank)
                    for rank, (score, place) in enumerate(
                        zip(scores[row].tolist(), places[row].tolist(), strict=True), 1
                    )
                ]
                there = document_vectors[[place_of_document[name] for name in relevant]]
                positive = float((there.astype(np.float32) @ asked[row]).min())
                negatives = self._negatives(query, ranking, relevant, positive, modality)
                records.append(
                    {
                        "query_id": query,
                        "ids": [hit.document for hit in negatives],
                        "scores": [hit.score for hit in negatives],
                        "positive_score": positive,
                    }
                )
            return pa.Table.from_pylist(records, _SCHEMA)

        inputs = digest(
            file_digest(f"{self.queries}/manifest.json"),
            file_digest(f"{self.corpus}/manifest.json"),
            qrels,
            modality,
        )
        return Work(len(mined), inputs, rows)

    def _negatives(
        self,
        query: str,
        ranking: Sequence[Hit],
        relevant: Mapping[str, int],
        positive: float,
        modality: Mapping[str, str],
    ) -> list[Hit]:
        """Return the negatives of one query."""
        seed = self.seed, query
        if self.modality_floor is None:
            hits = [hit for hit in ranking if hit.document not in relevant]
            hits = [hit for hit in hits if self.accepts(hit, positive)]
            return choose(hits, self.num_negatives, self.strategy, seed)
        target = modality[next(iter(relevant))]
        kinds = modality_aware(ranking, relevant, modality, target, self.modality_floor)
        wrong, weak = ([h for h in hits if self.accepts(h, positive)] for hits in kinds)
        return choose_from_both(wrong, weak, self.num_negatives, seed)


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


_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "positive_score": pa.float32(),
    }
)
