"""Hard negatives against brute force and hand-worked cases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nvmm.jobs.mine import (
    Filters,
    Hit,
    Mine,
    choose,
    choose_from_both,
    modality_aware,
    search,
)
from nvmm.jobs.parts import Parts
from tests.ranks import run_ranks


def hits(**scores: float) -> list[Hit]:
    return [Hit(name, score, rank) for rank, (name, score) in enumerate(scores.items(), 1)]


def names(some: list[Hit]) -> list[str]:
    return [hit.document for hit in some]


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


def test_every_filter_by_hand() -> None:
    ranking = hits(a=0.9, b=0.76, c=0.75, d=0.7, e=0.2)

    def kept(positive: float = 0.8, **options: Any) -> str:
        filters = Filters(**options)
        return "".join(hit.document for hit in ranking if filters.accepts(hit, positive))

    assert kept() == "abcde"
    assert kept(range_min=1) == "bcde"
    assert kept(range_max=3) == "abc"
    assert kept(range_min=1, range_max=3) == "bc"
    assert kept(max_score=0.75) == "cde"
    assert kept(min_score=0.7) == "abcd"
    assert kept(absolute_margin=0.06) == "de"  # at most 0.74
    assert kept(relative_margin=0.05) == "bcde"  # at most 0.76
    assert kept(relative_margin=0.06) == "cde"  # at most 0.752
    assert kept(relative_margin=0.05, max_score=0.72, min_score=0.3) == "d"


def test_modality_aware_negatives_by_hand() -> None:
    ranking = hits(t1=9, i1=8, t2=7, pos=6, t3=5, i2=4, i3=3, t4=2)
    modality = {name: "text" if name[0] == "t" else "image" for name in names(ranking)}
    wrong, weak = modality_aware(ranking, {"pos": 1}, modality, "image", floor=6)
    assert names(wrong) == ["t1", "t2"]  # above the positive, of the wrong modality
    assert names(weak) == ["i3"]  # of the right one, below rank 6
    wrong, weak = modality_aware(ranking, {"elsewhere": 1}, modality, "image", floor=3)
    assert names(wrong) == ["t1", "t2", "t3", "t4"]  # the positive is behind the end
    assert names(weak) == ["pos", "i2", "i3"]
    first = modality_aware(ranking, {"t1": 1}, modality, "text", floor=8)
    assert first == ([], [])


def test_a_choice_depends_on_its_seed_alone() -> None:
    ranking = hits(**{f"d{n}": 1.0 - n / 100 for n in range(40)})
    assert names(choose(ranking, 3, "top", 0)) == ["d0", "d1", "d2"]
    drawn = choose(ranking, 5, "random", (1, "q"))
    assert drawn == choose(ranking, 5, "random", (1, "q"))
    assert drawn != choose(ranking, 5, "random", (2, "q"))
    assert [hit.rank for hit in drawn] == sorted({hit.rank for hit in drawn})
    assert len(choose(ranking[:2], 5, "random", 0)) == 2


def test_both_kinds_are_drawn_alike() -> None:
    first, second = hits(a=1, b=1), hits(**{f"x{n}": 1 for n in range(50)})
    drawn = [choose_from_both(first, second, 1, seed)[0].document for seed in range(400)]
    assert 160 < sum(name in "ab" for name in drawn) < 240
    assert len(choose_from_both(first, [], 5, 0)) == 2
    assert choose_from_both([], [], 5, 0) == []
    everything = choose_from_both(first, second, 52, 3)
    assert sorted(names(everything)) == sorted(names(first) + names(second))


def write_vectors(folder: Path, ids: list[str], vectors: Any, part_size: int) -> str:
    parts = Parts.begin(folder, len(ids), part_size, {})
    for part in range(parts.count):
        numbers = parts.numbers(part)
        flat = pa.array(vectors[numbers.start : numbers.stop].astype(np.float32).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        parts.write(part, pa.table({"id": [ids[n] for n in numbers], "vector": column}))
    parts.finish()
    return str(folder)


@pytest.fixture
def retrieval_set(tmp_path: Path) -> dict[str, str]:
    random = np.random.default_rng(3)
    vectors = random.standard_normal((90, 8))
    documents = [f"d{n}" for n in range(90)]
    queries = [f"q{n}" for n in range(20)]
    lines = [
        {"_id": name, "text": name, "modality": "image" if n % 3 else "text"}
        for n, name in enumerate(documents)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "qrels").mkdir()
    rows = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{4 * n}\t1" for n in range(1, 20))]
    (tmp_path / "qrels" / "train.tsv").write_text("\n".join([*rows, "q3\td50\t1"]) + "\n")
    noisy = vectors[::4][:20] + random.standard_normal((20, 8))
    return {
        "folder": str(tmp_path),
        "corpus": write_vectors(tmp_path / "c", documents, vectors, 40),
        "queries": write_vectors(tmp_path / "q", queries, noisy, 7),
    }


def mine(rank: int, world: int, init: str, options: dict[str, Any], output: str) -> Any:
    from nvmm.jobs.job import run
    from nvmm.parallel.setup import Parallel

    Parallel().initialize(seed=1, rank=rank, world_size=world, init_method=init)
    return run(Mine(**options), options, None, output)


def test_a_mining_job_on_one_and_two_ranks(retrieval_set: dict[str, str], tmp_path: Path) -> None:
    options = {**retrieval_set, "num_negatives": 4, "relative_margin": 0.1, "part_size": 6}
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    summary = run_ranks(mine, 1, options, one)[0]
    assert summary["rows"] == summary["written"] == 19
    run_ranks(mine, 2, options, two)
    for path in sorted(Path(one).glob("part-*")):
        assert path.read_bytes() == (Path(two) / path.name).read_bytes()
    rows = {row["query_id"]: row for row in Parts(Path(one)).read().to_pylist()}
    assert list(rows) == [f"q{n}" for n in range(1, 20)]
    from nvmm.jobs.encode import read_vectors

    documents = np.concatenate(read_vectors(retrieval_set["corpus"])[1])
    queries = np.concatenate(read_vectors(retrieval_set["queries"])[1])
    assert any(len(row["ids"]) == 4 for row in rows.values())
    for number in range(1, 20):
        scores = documents @ queries[number]
        relevant = {4 * number, 50} if number == 3 else {4 * number}
        positive = min(scores[list(relevant)])
        expected = [
            f"d{n}"
            for n in np.argsort(-scores)
            if n not in relevant and scores[n] <= 0.9 * positive
        ]
        assert rows[f"q{number}"]["ids"] == expected[:4]
        assert rows[f"q{number}"]["positive_score"] == pytest.approx(positive, abs=1e-5)


def test_modality_aware_mining_takes_both_kinds(
    retrieval_set: dict[str, str], tmp_path: Path
) -> None:
    options = {**retrieval_set, "num_negatives": 6, "range_max": 30, "modality_floor": 20}
    run_ranks(mine, 1, options, str(tmp_path / "out"))
    rows = Parts(tmp_path / "out").read().to_pylist()
    assert any(row["ids"] for row in rows)
    assert not {"d12", "d50"} & set(rows[2]["ids"])


def test_what_mining_refuses(retrieval_set: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnone\t1\n")
    with pytest.raises(ValueError, match=r"1 ids without a vector: \['none'\]"):
        Mine(**retrieval_set, split="test").prepare(None)
    with pytest.raises(ValueError, match=r"job\.range_min=5 must be at least 0 and below"):
        Mine(**retrieval_set, range_min=5, range_max=5)
    with pytest.raises(ValueError, match=r"job\.strategy"):
        Mine(**retrieval_set, strategy="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no output of job=encode"):
        parts = Parts.begin(tmp_path / "other", 1, 1, {})
        parts.write(0, pa.table({"text": ["a"]}))
        parts.finish()
        Mine(**(retrieval_set | {"corpus": str(tmp_path / "other")})).prepare(None)
