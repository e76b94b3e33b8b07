"""M-BEIR: queries and candidates of text, pictures or both (UniIR, arXiv:2311.17136)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvmm.batch import QUERY
from nvmm.data.prepare import mbeir
from nvmm.data.prepare.mbeir import Item
from nvmm.evaluation.benchmark import Benchmark, Result, Settings, finite, refuse_settings
from nvmm.evaluation.ranking import hit_rate
from nvmm.inference.embedding import TextAndImage

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

_QUERIES = 256
_OWN_SET_ALONE = ("5", "6")
"""OVEN and InfoSeek: their queries' candidates of other sets do not count (UniIR)."""


@dataclass(frozen=True)
class UniversalRetrieval(Benchmark):
    """Rank a pool of candidates for every query.

    Hit rate at k, which UniIR calls Recall@k, is the share of queries with a relevant candidate
    among the k best. Modality accuracy at k is the share of the k best that have the modality of
    the query's relevant candidates; on the union pool it shows a retriever's modality bias.

    Args:
        pool, queries, qrels, instructions: M-BEIR's files: a candidate pool (the task's own, or the
            union of all), queries, `qid 0 did relevance task` and query_instructions.tsv.
        folder: where the paths of pictures begin.
        cutoffs: k of the hit rates. UniIR reports 5, for Fashion200K and FashionIQ 10.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    pool: str
    queries: str
    qrels: str
    instructions: str
    folder: str
    cutoffs: Sequence[int] = (1, 5, 10)
    name: str = "mbeir"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Embed candidates and queries, and score the rankings; ranks share the items."""
        refuse_settings(settings, keep=("batch_size", "seed"))
        # 1. Read the set; a query's target is the modality of its relevant candidates.
        try:
            pool = mbeir.read_pool(self.pool)
            queries = mbeir.read_queries(self.queries)
            qrels = mbeir.read_qrels(self.qrels)
            prompts = mbeir.read_instructions(self.instructions)
        except OSError as error:
            raise ValueError(f"a file of benchmark.* cannot be read ({error})") from error
        relevant = judged(qrels)
        strange = [query for query in relevant if query not in queries]
        unknown = [doc for documents in relevant.values() for doc in documents if doc not in pool]
        if unknown or strange or not relevant:
            raise ValueError(
                f"{self.qrels}: of {len(relevant)} judged queries {len(strange)} are not in"
                f" {self.queries}: {strange[:5]}; {len(unknown)} candidates are not in {self.pool}:"
                f" {unknown[:5]}"
            )
        target = {query: pool[next(iter(docs))].modality for query, docs in relevant.items()}
        # 2. Embed the pool, then the queries of each instruction together.
        embed = model.encoder(settings.batch_size)
        documents = finite(embed([self._content(item) for item in pool.values()]), "documents")
        chosen = {
            query: mbeir.instruction(prompts, query, queries[query].modality, target[query], None)
            for query in relevant
        }
        vectors: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(chosen.values()):
            names = [query for query in relevant if chosen[query] == prompt]
            contents = [self._content(queries[query]) for query in names]
            encoded = finite(embed(contents, prompt, QUERY), "queries")
            vectors |= dict(zip(names, encoded, strict=True))
        # 3. Rank and score.
        scores = evaluate(
            torch.stack([vectors[query] for query in relevant]),
            documents,
            list(relevant.values()),
            list(pool),
            [pool[document].modality for document in pool],
            list(target.values()),
            self.cutoffs,
        )
        text = "\n".join(f"{name:<24} {value:8.4f}" for name, value in scores.items())
        return Result(
            {
                "queries": len(relevant),
                "num_without_answer": len(queries) - len(relevant),
                **scores,
            },
            {f"{self.name}_retrieval": scores},
            text,
        )

    def _content(self, item: Item) -> TextAndImage:
        return TextAndImage(item.text, Path(self.folder) / item.image if item.image else None)


def judged(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the qrels that count: those of OVEN and InfoSeek lose other sets' candidates."""
    kept = {}
    for query, documents in qrels.items():
        own = query.partition(":")[0]
        if own in _OWN_SET_ALONE:
            documents = {d: r for d, r in documents.items() if d.partition(":")[0] == own}
        if documents:
            kept[query] = dict(documents)
    return kept


def evaluate(
    queries: Tensor,
    documents: Tensor,
    relevant: Sequence[Mapping[str, int]],
    ids: Sequence[str],
    modalities: Sequence[str],
    targets: Sequence[str],
    cutoffs: Iterable[int],
) -> dict[str, float]:
    """Return {"hit_rate_at_5": ..., "modality_accuracy_at_1": ..., ...}, means over the queries.

    queries: [q, h]; documents: [n, h], of `ids` and `modalities`; relevant, targets: of each query
    its relevant ids and their modality.
    """
    cutoffs = sorted(cutoffs)
    depths = [depth for depth in (1, 5) if depth <= len(ids)]
    totals = dict.fromkeys([f"hit_rate_at_{k}" for k in cutoffs], 0.0)
    totals |= dict.fromkeys([f"modality_accuracy_at_{k}" for k in depths], 0.0)
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ documents.t()
        best = torch.topk(scores, min(max(*cutoffs, 5), len(ids)), dim=1).indices.tolist()
        for offset, row in enumerate(best):
            number = start + offset
            ranking = [ids[place] for place in row]
            for k in cutoffs:
                totals[f"hit_rate_at_{k}"] += hit_rate(ranking, relevant[number], k)
            for k in depths:
                right = sum(modalities[place] == targets[number] for place in row[:k])
                totals[f"modality_accuracy_at_{k}"] += right / k
    return {name: total / len(queries) for name, total in totals.items()}
