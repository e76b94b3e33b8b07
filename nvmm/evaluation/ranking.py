"""Ranking metrics of one query, as trec_eval and mteb define them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


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


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))
