"""Rankings by vectors against brute force, on one and on two ranks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nvmm.data.prepare.layouts import BeirFolder
from nvmm.data.prepare.mbeir import Item
from nvmm.jobs.encode import Vectors
from nvmm.jobs.job import Job, items_digest
from nvmm.jobs.parts import Parts
from nvmm.jobs.search import Search, search
from tests.ranks import run_ranks


def write_vectors(
    folder: Path,
    ids: list[str],
    vectors: Any,
    part_size: int,
    bad: Mapping[str, str] | None = None,
    *,
    side: str = "corpus",
    weights: str = "w",
    texts: Mapping[str, str | None] | None = None,
) -> str:
    """Write the output of an encode job; `bad` ids have an error and no vector.

    texts: of the items, null for a picture; else each is its id.
    """
    bad = bad or {}
    checkpoint = {"weights": weights, "model": "m", "tokenizer": "t", "builder": "b"}
    texts = texts or {name: name for name in ids}
    items = {n: Item(t or "", "p.png" if t is None else None, "") for n, t in texts.items()}
    identity = {
        "job": {"side": side},
        "checkpoint": checkpoint,
        "inputs": {"items": items_digest(items)},
    }
    parts = Parts.begin(folder, len(ids), part_size, identity)
    for part in range(parts.count):
        numbers = parts.numbers(part)
        flat = pa.array(vectors[numbers.start : numbers.stop].astype(np.float32).reshape(-1))
        names = [ids[number] for number in numbers]
        column = pa.FixedSizeListArray.from_arrays(
            flat, vectors.shape[1], mask=pa.array([name in bad for name in names])
        )
        errors = pa.array([bad.get(name) for name in names], pa.string())
        parts.write(part, pa.table({"id": names, "vector": column, "error": errors}))
    parts.finish()
    return str(folder)


def work(rank: int, world: int, init: str, job: Job, output: str) -> Any:
    """Run a job without a checkpoint on this rank."""
    from nvmm.jobs.job import run
    from nvmm.parallel.setup import Parallel

    Parallel().initialize(seed=1, rank=rank, world_size=world, init_method=init)
    return run(job, {"job": repr(job)}, None, output)


def same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.glob("*"))
    assert names == sorted(path.name for path in second.glob("*"))
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_search_equals_brute_force() -> None:
    random = np.random.default_rng(1)
    documents = random.standard_normal((5000, 24)).astype(np.float32)
    queries = random.standard_normal((70, 24)).astype(np.float32)
    chunks = [documents[:1700], documents[1700:1703], documents[1703:]]
    scores, places = search(queries, chunks, 100)
    exact = queries.astype(np.float64) @ documents.T.astype(np.float64)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, 1), atol=2e-5)


def test_equal_scores_are_ranked_by_place() -> None:
    documents = np.tile(np.eye(4, dtype=np.float32)[:1], (30, 1))
    _, places = search(np.eye(4, dtype=np.float32)[:1], [documents[:11], documents[11:]], 20)
    assert places.tolist() == [list(range(20))]


def test_a_searching_job_equals_brute_force_on_one_and_two_ranks(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    documents = random.standard_normal((5000, 16)).astype(np.float32)
    documents[7:4000:400] = documents[7]  # equal scores, in the parts of both ranks
    queries = random.standard_normal((25, 16)).astype(np.float32)
    queries[0] = documents[7]
    names = [f"d{n}" for n in range(5000)]
    corpus = [json.dumps({"_id": name, "text": name}) for name in names]
    (tmp_path / "corpus.jsonl").write_text("\n".join(corpus))
    (tmp_path / "qrels").mkdir()
    lines = [f"q{n}\td{100 * n}\t1" for n in range(25)]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    job = Search(
        data=BeirFolder(str(tmp_path), "test"),
        corpus=write_vectors(tmp_path / "c", names, documents, 700, {"d9": "damaged"}),
        queries=write_vectors(
            tmp_path / "q", [f"q{n}" for n in range(25)], queries, 10, side="queries"
        ),
        k=50,
        part_size=9,
    )
    for ranks in (1, 2):
        summary = run_ranks(work, ranks, job, str(tmp_path / str(ranks)))[0]
    same_files(tmp_path / "1", tmp_path / "2")
    rows = Parts(tmp_path / "1").read().to_pylist()
    exact = queries.astype(np.float64) @ documents.T.astype(np.float64)
    exact[:, 9] = -np.inf
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :50]
    assert [row["ids"] for row in rows] == [[names[p] for p in places] for places in expected]
    scores = np.take_along_axis(exact, expected, 1)
    np.testing.assert_allclose([row["scores"] for row in rows], scores, atol=2e-5)
    found = np.mean([100 * n in expected[n][:10] for n in range(25)])
    assert summary["metrics"]["hit_rate_at_10"] == pytest.approx(found)
    assert json.loads((tmp_path / "2" / "metrics.json").read_text()) == summary["metrics"]


def test_vectors_and_errors_are_read_apart(tmp_path: Path) -> None:
    vectors = np.arange(12).reshape(6, 2)
    folder = write_vectors(tmp_path / "v", list("abcdef"), vectors, 4, {"b": "bad", "f": "worse"})
    found = Vectors.read(folder)
    assert found.ids == ["a", "c", "d", "e"]
    assert np.concatenate(found.chunks).tolist() == [[0, 1], [4, 5], [6, 7], [8, 9]]
    assert found.errors == {"b": "bad", "f": "worse"}
