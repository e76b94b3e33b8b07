"""Retrieval on a folder in BEIR's layout: embed, rank all documents by dot product, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from nvmm.batch import POSITIVE, QUERY
from nvmm.evaluation.benchmark import (
    Benchmark,
    Encode,
    Result,
    Settings,
    finite,
    refuse_settings,
)
from nvmm.evaluation.ranking import check_cutoffs, hit_rate, ndcg, recall, reciprocal_rank

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored


_CUTOFFS = (1, 5, 10, 100)


@dataclass(frozen=True)
class Retrieval(Benchmark):
    """A folder in BEIR's layout, whose documents an embedder ranks for every query.

    Args:
        folder: corpus.jsonl, queries.jsonl and qrels/<split>.tsv.
        split: name of the qrels' file.
        instruction: text before queries; None for that of training.
        ignore_identical_ids: leave out the document that has the query's id (ArguAna, Quora, ...).
        cutoffs: ranks k of nDCG, MRR, recall and hit rate at k, where nvmm judges.
        judge: "nvmm", or "mteb" for that library's scores (the embed extra).
        name, builder: see `Benchmark`.
    """

    folder: str
    split: str = "test"
    instruction: str | None = None
    ignore_identical_ids: bool = False
    cutoffs: Sequence[int] = _CUTOFFS
    judge: Literal["nvmm", "mteb"] = "nvmm"
    name: str = "beir"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_cutoffs(self.cutoffs)
        if self.judge == "mteb" and list(self.cutoffs) != list(_CUTOFFS):
            raise ValueError(
                f"benchmark.cutoffs={list(self.cutoffs)} needs benchmark.judge=nvmm: mteb has its"
                " own"
            )

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Embed corpus and queries, and score the rankings; ranks share the texts."""
        refuse_settings(settings, keep=("batch_size", "seed"))
        from nvmm.data.prepare import retrieval_sets

        if self.judge == "mteb" and find_spec("mteb") is None:  # not after all has been embedded
            raise ValueError("benchmark.judge=mteb needs pip install 'nvmm[embed]'")

        try:
            queries = retrieval_sets.read_queries(self.folder)
            qrels = retrieval_sets.read_qrels(self.folder, self.split)
            corpus = retrieval_sets.read_corpus(self.folder)
        except OSError as error:
            raise ValueError(f"benchmark.folder={self.folder} cannot be read ({error})") from error
        embed = model.encoder(settings.batch_size)
        options: dict[str, Any] = {
            "instruction": self.instruction or embed.builder.instruction,
            "ignore_identical_ids": self.ignore_identical_ids,
        }
        if self.judge == "mteb":
            from nvmm.evaluation import mteb_task

            scores = mteb_task.evaluate(embed, corpus, queries, qrels, **options)
        else:
            scores = evaluate(embed, corpus, queries, qrels, **options, cutoffs=self.cutoffs)
        text = "\n".join(f"{name:<16} {value:8.4f}" for name, value in scores.items())
        main = {key: scores[key] for key in ("ndcg_at_10", "recall_at_100") if key in scores}
        return Result(
            {"judge": self.judge, **scores}, {f"{self.name}_retrieval": main or scores}, text
        )


METRICS = {"ndcg": ndcg, "mrr": reciprocal_rank, "recall": recall, "hit_rate": hit_rate}
_QUERIES = 256


def evaluate(
    encode: Encode,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    instruction: str | None = None,
    ignore_identical_ids: bool = False,
    cutoffs: Sequence[int] = _CUTOFFS,
) -> dict[str, float]:
    """Return means over the queries that have a relevant document: {"ndcg_at_10": ..., ...}.

    corpus, queries: id -> text. qrels: query id -> document id -> relevance above 0.
    instruction: text before queries, not before documents.
    ignore_identical_ids: leave the document with a query's id out of its ranking, as mteb does for
        sets whose queries are documents (ArguAna, Quora, ...).

    Raises ValueError when the qrels name a query or document that is not there, and for vectors
    that are not finite: any ranking of them would be chance.
    """
    asked = [query for query in qrels if qrels[query]]
    unknown = [query for query in asked if query not in queries]
    unknown += [document for query in asked for document in qrels[query] if document not in corpus]
    if unknown or not asked:
        raise ValueError(f"qrels name {len(unknown)} unknown ids ({unknown[:5]}) of {len(asked)}")
    ids = list(corpus)
    documents = finite(encode(list(corpus.values()), None, POSITIVE), "documents")
    totals = dict.fromkeys((f"{name}_at_{k}" for name in METRICS for k in cutoffs), 0.0)
    for start in range(0, len(asked), _QUERIES):
        some = asked[start : start + _QUERIES]
        texts = [queries[query] for query in some]
        vectors = finite(encode(texts, instruction, QUERY), "queries")
        scores = vectors @ documents.t()
        # One more than is scored, as the document with the query's own id may be left out.
        best = torch.topk(scores, min(max(cutoffs) + 1, len(ids)), dim=1).indices.tolist()
        for query, row in zip(some, best, strict=True):
            ranking = [ids[i] for i in row if not (ignore_identical_ids and ids[i] == query)]
            for name, metric in METRICS.items():
                for k in cutoffs:
                    totals[f"{name}_at_{k}"] += metric(ranking, qrels[query], k)
    return {name: total / len(asked) for name, total in totals.items()}
