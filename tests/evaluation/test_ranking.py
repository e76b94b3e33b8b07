"""Ranking metrics by hand, and the runner over a toy corpus; mteb agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nvmm.evaluation import beir, mteb_task
from nvmm.evaluation.ranking import (
    average_precision,
    hit_rate,
    mean_scores,
    modality_accuracy,
    ndcg,
    recall,
    reciprocal_rank,
)

RANKING = ["a", "b", "c", "d"]


def test_metrics_by_hand() -> None:
    relevant = {"b": 2, "d": 1, "z": 1}
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    found = 2 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(RANKING, relevant, 10) == pytest.approx(found / ideal)
    assert ndcg(RANKING, relevant, 1) == 0
    assert ndcg(["b"], {"b": 3}, 1) == 1
    assert reciprocal_rank(RANKING, relevant, 10) == 0.5
    assert reciprocal_rank(RANKING, relevant, 1) == 0
    assert recall(RANKING, relevant, 4) == pytest.approx(2 / 3)
    assert recall(RANKING, relevant, 2) == pytest.approx(1 / 3)
    assert hit_rate(RANKING, relevant, 2) == 1
    assert hit_rate(RANKING, relevant, 1) == 0
    # Precision 1/2 at b and 2/4 at d, over three relevant ones; over the first two, 1/2 at b.
    assert average_precision(RANKING, relevant, 4) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert average_precision(RANKING, relevant, 2) == pytest.approx((1 / 2) / 2)
    assert average_precision(["z", "b"], {"b": 1, "z": 1, "d": 1}, 2) == 1
    assert modality_accuracy(["text", "image", "text"], "text", 3) == pytest.approx(2 / 3)


def test_a_query_without_a_ranking_finds_nothing() -> None:
    relevant = {"q": {"b": 1}, "lost": {"a": 1}}
    scores = mean_scores({"q": RANKING, "unjudged": ["b"]}, relevant, [1, 2])
    assert scores == {
        **{f"{name}_at_1": 0 for name in ("hit_rate", "recall", "ndcg", "mrr", "map")},
        **{"hit_rate_at_2": 0.5, "recall_at_2": 0.5, "mrr_at_2": 0.25, "map_at_2": 0.25},
        "ndcg_at_2": pytest.approx(0.5 / math.log2(3)),
    }


CORPUS = {f"d{i}": f"document {i} of the bird" for i in range(12)}
QUERIES = {f"q{i}": f"ask for {i}" for i in range(5)}
QRELS = {f"q{i}": {f"d{i}": 2, f"d{(3 * i + 1) % 12}": 1} for i in range(5)}


def encode(texts: Sequence[str], instruction: str | None) -> Tensor:
    """Random unit vectors that depend on text and instruction, a little alike by number."""
    rows = []
    for text in texts:
        seed = sum(map(ord, text + (instruction or "")))
        row = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        number = next(int(word) for word in text.split() if word.isdigit())
        row[number] += 2.0
        rows.append(row)
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_the_runner_ranks_all_documents() -> None:
    scores = beir.evaluate(encode, CORPUS, QUERIES, QRELS, instruction="find", cutoffs=(1, 10))
    similarity = encode(list(QUERIES.values()), "find") @ encode(list(CORPUS.values()), None).t()
    first = [list(CORPUS)[i] for i in similarity.argmax(1).tolist()]
    hits = [doc in QRELS[query] for doc, query in zip(first, QUERIES, strict=True)]
    assert scores["hit_rate_at_1"] == sum(hits) / 5
    assert 0 < scores["ndcg_at_10"] < 1
    other = beir.evaluate(encode, CORPUS, QUERIES, QRELS, cutoffs=(10,))
    assert other["ndcg_at_10"] != scores["ndcg_at_10"], "the instruction reaches queries"
    with pytest.raises(ValueError, match="qrels name 1 unknown ids"):
        beir.evaluate(encode, CORPUS, QUERIES, {"q0": {"lost": 1}})


def test_vectors_that_are_not_finite_have_no_ranking() -> None:
    def broken(texts: Sequence[str], instruction: str | None) -> Tensor:
        vectors = encode(texts, instruction)
        vectors[1, 3] = float("nan")
        return vectors if instruction is None else encode(texts, None)

    with pytest.raises(ValueError, match="1 of 12 vectors of documents are not finite"):
        beir.evaluate(broken, CORPUS, QUERIES, QRELS, instruction="find")


def test_a_query_that_is_a_document_does_not_find_itself() -> None:
    corpus = {"same": "ask for 1", "other": "document 1"}
    data = (corpus, {"same": "ask for 1"}, {"same": {"other": 1}})
    assert beir.evaluate(encode, *data, cutoffs=(1,))["hit_rate_at_1"] == 0
    found = beir.evaluate(encode, *data, ignore_identical_ids=True, cutoffs=(1,))
    assert found["hit_rate_at_1"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("instruction", [None, "find"])
@pytest.mark.parametrize("ignore", [False, True])
def test_mteb_gives_the_same_scores(instruction: str | None, ignore: bool) -> None:
    queries = {f"d{name[1:]}": text for name, text in QUERIES.items()}
    qrels = {
        f"d{name[1:]}": {doc: 1 for doc in known if doc[1:] != name[1:]}
        for name, known in QRELS.items()
    }
    data = (encode, CORPUS, queries, qrels)
    options = {"instruction": instruction, "ignore_identical_ids": ignore}
    ours = beir.evaluate(*data, **options, cutoffs=(1, 5, 10))
    theirs = mteb_task.evaluate(*data, **options)
    for k in (1, 5, 10):
        for name in ("ndcg", "recall", "hit_rate", "mrr"):
            key = f"{name}_at_{k}"
            assert theirs[key] == pytest.approx(ours[key], abs=2e-5), key


def test_a_judge_that_is_not_installed_is_named_before_anything_is_embedded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nvmm.evaluation.benchmark import Settings

    monkeypatch.setattr(beir, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"benchmark.judge=mteb needs pip install"):
        beir.Retrieval("folder", judge="mteb").run(None, Settings(), None)  # type: ignore[arg-type]
