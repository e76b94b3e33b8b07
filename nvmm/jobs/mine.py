"""Hard negatives: the documents that an embedder ranks high without their being relevant."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from nvmm.config.choices import require
from nvmm.data.prepare.layouts import RetrievalSet
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest
from nvmm.jobs.search import Hit, Neighbours

Strategy = Literal["top", "random"]


@dataclass(frozen=True)
class Filters:
    """Which of a query's best documents may be its negatives; relevant ones never are.

    The names are those of sentence-transformers' `mine_hard_negatives`. A positive's score is that
    of the lowest-scored relevant document.

    range_min: best ranks to leave out. range_max: worst rank to take. max_score, min_score: bounds
    of a negative's score. absolute_margin: its score is at most the positive's minus this.
    relative_margin: at most the positive's minus this share of its size; 0.05 is the 95 % of
    NV-Retriever (Moreira et al. 2024, arXiv:2407.15831, TopK-PercPos).
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
        lowest = float("-inf") if self.min_score is None else self.min_score
        if self.max_score is not None and lowest > self.max_score:
            raise ValueError(
                f"job.min_score={self.min_score} must be at most job.max_score={self.max_score}"
            )
        for name in ("absolute_margin", "relative_margin"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"job.{name}={value} must be at least 0")

    def accepts(self, hit: Hit, positive: float) -> bool:
        """Return whether a document may be a negative beside a positive of this score."""
        highest = [] if self.max_score is None else [self.max_score]
        if self.absolute_margin is not None:
            highest.append(positive - self.absolute_margin)
        if self.relative_margin is not None:
            highest.append(positive - abs(positive) * self.relative_margin)
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


@dataclass(frozen=True, kw_only=True)
class Mine(Filters, Job):
    """Mine hard negatives with the vectors that two `encode` jobs wrote.

    A row has `query_id`, `ids` and `scores` of its negatives, best first, `positive_score`, and
    `error`: why there can be no negatives, else null (the query, or all that is relevant to it, has
    no vector). `nvmm shard beir --negatives` takes the folder.

    Args:
        data: the retrieval set, for its judgements; only judged queries are mined for.
        queries, corpus: folders of the `encode` jobs.
        num_negatives: negatives of a query, at most.
        strategy: "top", the best ranked, or "random", a draw by the seed.
        range_min ... relative_margin: see `Filters`.
        modality_floor: None, or the rank below which a document of the target modality is a
            negative (MM-Embed: 45, of range_max=50): negatives then are those of `modality_aware`.
            The target is the modality of the query's relevant documents.
        seed: seed of draws; a draw depends on it and the query's id alone.
        part_size: queries of a part file.
    """

    data: RetrievalSet
    queries: str
    corpus: str
    num_negatives: int = 7
    strategy: Strategy = "top"
    modality_floor: int | None = None
    seed: int = 1234
    part_size: int = 1024
    name: str = "mine"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("job.strategy", self.strategy, Strategy)
        window = self.range_max - self.range_min
        if not 1 <= self.num_negatives <= window:
            raise ValueError(
                f"job.num_negatives={self.num_negatives} must be at least 1 and at most {window},"
                " the ranks from job.range_min to job.range_max"
            )
        if self.modality_floor is None:
            return
        if self.strategy != "top":
            raise ValueError(
                f"job.strategy={self.strategy} does nothing with job.modality_floor, which draws"
            )
        if not 0 <= self.modality_floor < self.range_max:
            raise ValueError(
                f"job.modality_floor={self.modality_floor} must be at least 0 and below"
                f" job.range_max={self.range_max}"
            )

    def prepare(self, model: Restored | None) -> Work:
        """Open vectors and judgements. Raises ValueError for judgements of unknown ids."""
        if model is not None:
            raise ValueError("job=mine reads vectors; leave checkpoint= out")
        near = Neighbours(self.data, self.queries, self.corpus)
        known = self.data.judgements
        modality: Mapping[str, str] = {}
        if self.modality_floor is not None:
            modality = self.data.modalities

        def row(query: str, rankings: Mapping[str, Sequence[Hit]]) -> dict[str, Any]:
            negatives: list[Hit] = []
            positive = error = None
            if query not in rankings:
                error = near.errors[query]
            elif (positive := near.positive_score(query)) is None:
                error = f"query {query}: nothing relevant to it has a vector"
            else:
                negatives = self._negatives(
                    query, rankings[query], near.relevant[query], known[query], positive, modality
                )
            return {
                "query_id": query,
                "ids": [hit.document for hit in negatives],
                "scores": [hit.score for hit in negatives],
                "positive_score": positive,
                "error": error,
            }

        def rows(numbers: range) -> pa.Table:
            chosen = [near.asked[number] for number in numbers]
            rankings = near.rankings(chosen, self.range_max)
            return pa.Table.from_pylist([row(query, rankings) for query in chosen], _SCHEMA)

        return Work(len(near.asked), digest(near.inputs, dict(modality)), rows, together=True)

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return negatives a query, and the share of queries with fewer than wanted, and none."""
        counts = [len(ids) for ids in rows["ids"].to_pylist()]
        few = sum(count < self.num_negatives for count in counts)
        return {
            "negatives_per_query": sum(counts) / len(counts),
            "queries_with_fewer": few / len(counts),
            "queries_without": counts.count(0) / len(counts),
        }

    def _negatives(
        self,
        query: str,
        ranking: Sequence[Hit],
        relevant: Mapping[str, int],
        known: Mapping[str, int],
        positive: float,
        modality: Mapping[str, str],
    ) -> list[Hit]:
        """Return the negatives of one query.

        relevant: what is scored; known: that and what else is no negative (M-BEIR's judgements of
        other sets). positive: score of the lowest-scored relevant document.
        """
        seed = self.seed, query
        if self.modality_floor is None:
            hits = [hit for hit in ranking if hit.document not in known]
            hits = [hit for hit in hits if self.accepts(hit, positive)]
            return choose(hits, self.num_negatives, self.strategy, seed)
        target = modality[next(iter(relevant))]
        kinds = modality_aware(ranking, relevant, modality, target, self.modality_floor)
        wrong, weak = (
            [hit for hit in hits if hit.document not in known and self.accepts(hit, positive)]
            for hits in kinds
        )
        return choose_from_both(wrong, weak, self.num_negatives, seed)


_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "positive_score": pa.float32(),
        "error": pa.string(),
    }
)
