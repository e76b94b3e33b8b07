"""Ranking metrics of one query, as trec_eval and mteb define them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Raise ValueError for no ranks, and for one below 1."""
    if not cutoffs or any(k < 1 for k in cutoffs):
        raise ValueError(f"benchmark.cutoffs={list(cutoffs)} must be ranks of at least 1")


def ndcg(ranking: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Return the discounted gain of the first k over the best possible; gains are relevances.

    ranking: document ids, best first. relevant: id -> relevance above 0, not empty.
    """
    gains = [relevant.get(document, 0) for document in ranking[:k]]
    ideal = sorted(relevant.values(), reverse=True)[:k]
    return _discounted(gains) / _discounted(ideal)


def reciprocal_rank(ranking: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Return 1 / the rank of the first relevant document, 0 where the first k have none."""
    for place, document in enumerate(ranking[:k], 1):
        if document in relevant:
            return 1 / place
    return 0.0


def recall(ranking: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Return the share of the relevant documents that are among the first k."""
    return sum(document in relevant for document in ranking[:k]) / len(relevant)


def hit_rate(ranking: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Return 1 if a relevant document is among the first k (UniIR's Recall@k), else 0."""
    return float(any(document in relevant for document in ranking[:k]))


def average_precision(ranking: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Return the mean of the precisions at the relevant ones of the first k, over min(k, relevant).

    It is the mAP@k of CIRCO (arXiv:2303.15247); trec_eval's map_cut divides by all relevant ones.
    """
    found, total = 0, 0.0
    for place, document in enumerate(ranking[:k], 1):
        if document in relevant:
            found += 1
            total += found / place
    return total / min(k, len(relevant))


def modality_accuracy(modalities: Sequence[str], target: str, k: int) -> float:
    """Return the share of a ranking's first k modalities that are the target's (MM-Embed)."""
    return sum(modality == target for modality in modalities[:k]) / k


def mean_scores(
    rankings: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Mapping[str, int]],
    cutoffs: Iterable[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return {"hit_rate_at_1": ..., ...}, the means over the queries of `relevant`.

    rankings: query id -> document ids, best first; a judged query without one finds nothing.
    """
    metrics = {
        "hit_rate": hit_rate,
        "recall": recall,
        "ndcg": ndcg,
        "mrr": reciprocal_rank,
        "map": average_precision,
    }
    cutoffs = list(cutoffs)
    return {
        f"{name}_at_{k}": sum(
            metric(rankings.get(query, ()), known, k) for query, known in relevant.items()
        )
        / len(relevant)
        for name, metric in metrics.items()
        for k in cutoffs
    }


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))
