"""M-BEIR: queries and candidates of text, pictures or both (UniIR, arXiv:2311.17136)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nvmm.batch import QUERY
from nvmm.data.prepare.layouts import MBeirFiles, require_known
from nvmm.data.prepare.mbeir import Item
from nvmm.data.samples.images import decode_image
from nvmm.data.samples.retrieval import Content
from nvmm.evaluation.benchmark import Benchmark, Result, Settings, finite, refuse_settings
from nvmm.evaluation.ranking import check_cutoffs, hit_rate, modality_accuracy, ndcg
from nvmm.inference.embedding import TextAndImage, TextEncoder

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

_QUERIES = 256
MTEB_CUTOFFS = (1, 3, 5, 10, 20, 100, 1000)


@dataclass(frozen=True)
class UniversalRetrieval(Benchmark):
    """Rank a pool of candidates for every query.

    Hit rate at k, which UniIR calls Recall@k, is the share of queries with a relevant candidate
    among the k best. Modality accuracy at k is the share of the k best that have the modality of
    the query's relevant candidates; on the union pool it shows a retriever's modality bias. nDCG is
    that of the 10 best.

    Args:
        pool, queries, qrels, instructions: M-BEIR's files: a candidate pool (the task's own, or the
            union of all), queries, `qid 0 did relevance task` and query_instructions.tsv.
        folder: where the paths of pictures begin.
        cutoffs: k of the hit rates. UniIR reports 5, for Fashion200K and FashionIQ 10.
        judge: "nvmm", or "mteb" for that library's scores, where pool and queries are a task of its
            type Any2AnyRetrieval (the embed extra); the pictures are in memory then.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    pool: str
    queries: str
    qrels: str
    instructions: str
    folder: str
    cutoffs: Sequence[int] = (1, 5, 10)
    judge: Literal["nvmm", "mteb"] = "nvmm"
    name: str = "mbeir"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_cutoffs(self.cutoffs)
        if self.judge == "mteb" and (strange := sorted(set(self.cutoffs) - set(MTEB_CUTOFFS))):
            raise ValueError(
                f"benchmark.cutoffs={strange} need benchmark.judge=nvmm: mteb has"
                f" {', '.join(map(str, MTEB_CUTOFFS))}"
            )

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Embed candidates and queries, and score the rankings; ranks share the items.

        Raises ValueError for files that cannot be read or do not fit together.
        """
        refuse_settings(settings, keep=("batch_size", "seed"))
        if self.judge == "mteb" and find_spec("mteb") is None:  # not after all has been embedded
            raise ValueError("benchmark.judge=mteb needs pip install 'nvmm[embed]'")
        data = MBeirFiles(self.folder, self.pool, self.queries, self.instructions, self.qrels)
        relevant = data.relevant
        require_known(relevant, data.questions, data.documents)
        summary = {
            "queries": len(relevant),
            "num_without_answer": len(data.questions) - len(relevant),
            "judge": self.judge,
        }
        embed = model.encoder(settings.batch_size)
        if self.judge == "mteb":
            scores = self._by_mteb(embed, data)
            names = [f"{name}_at_{k}" for k in self.cutoffs for name in ("hit_rate", "ndcg")]
            main = {name: scores[name] for name in names if name in scores}
        else:
            scores = main = self._ours(embed, data)
        text = "\n".join(f"{name:<24} {value:8.4f}" for name, value in main.items())
        return Result({**summary, **scores}, {f"{self.name}_retrieval": main}, text)

    def _ours(self, embed: TextEncoder, data: MBeirFiles) -> dict[str, float]:
        """Return the scores of our own ranking."""
        # 1. Embed the pool, then the queries of each instruction together.
        pool, relevant, prompts = data.documents, data.relevant, data.prompts
        documents = finite(embed([content(item) for item in pool.values()]), "documents")
        vectors: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts.values()):
            names = [query for query in relevant if prompts[query] == prompt]
            encoded = embed([content(data.questions[query]) for query in names], prompt, QUERY)
            vectors |= dict(zip(names, finite(encoded, "queries"), strict=True))
        # 2. Rank and score.
        return evaluate(
            torch.stack([vectors[query] for query in relevant]),
            documents,
            list(relevant.values()),
            list(pool),
            list(data.modalities.values()),
            [data.targets[query] for query in relevant],
            self.cutoffs,
        )

    def _by_mteb(self, embed: TextEncoder, data: MBeirFiles) -> dict[str, float]:
        """Return mteb's scores, whose model gets the pictures decoded."""
        from nvmm.evaluation import mteb_task

        limit = embed.builder.limits.max_pixels
        return mteb_task.evaluate(
            embed,
            {name: _decoded(item, limit) for name, item in data.documents.items()},
            {name: _decoded(data.questions[name], limit) for name in data.relevant},
            data.relevant,
            instruction=data.prompts,
        )


def content(item: Item) -> TextAndImage:
    """Return what an embedder takes of a query or candidate of a `RetrievalSet`."""
    return TextAndImage(item.text, Path(item.image) if item.image else None)


def _decoded(item: Item, max_pixels: int) -> Content:
    """Return an item with its picture in memory; ValueError names one that cannot be read."""
    if item.image is None:
        return Content(item.text)
    try:
        data = Path(item.image).read_bytes()
    except OSError as error:
        raise ValueError(f"{item.image} cannot be read ({error.strerror})") from error
    return Content(item.text, decode_image(data, source=item.image, max_pixels=max_pixels))


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
    totals["ndcg_at_10"] = 0.0
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ documents.t()
        best = torch.topk(scores, min(max(*cutoffs, 10), len(ids)), dim=1).indices.tolist()
        for offset, row in enumerate(best):
            number = start + offset
            ranking = [ids[place] for place in row]
            for k in cutoffs:
                totals[f"hit_rate_at_{k}"] += hit_rate(ranking, relevant[number], k)
            for k in depths:
                kinds = [modalities[place] for place in row]
                totals[f"modality_accuracy_at_{k}"] += modality_accuracy(kinds, targets[number], k)
            totals["ndcg_at_10"] += ndcg(ranking, relevant[number], 10)
    return {name: total / len(queries) for name, total in totals.items()}
