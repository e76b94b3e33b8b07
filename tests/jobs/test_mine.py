"""Hard negatives against hand-worked cases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nvmm.data.prepare.layouts import BeirFolder, MBeirFiles
from nvmm.jobs.encode import Vectors
from nvmm.jobs.mine import Filters, Mine, choose, choose_from_both, modality_aware
from nvmm.jobs.parts import Parts
from nvmm.jobs.search import Hit
from tests.jobs.test_search import same_files, work, write_vectors
from tests.ranks import run_ranks


def hits(**scores: float) -> list[Hit]:
    return [Hit(name, score, rank) for rank, (name, score) in enumerate(scores.items(), 1)]


def names(some: list[Hit]) -> list[str]:
    return [hit.document for hit in some]


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
    # Below 0 the margin goes down too: at most -0.84, and at most -0.1 without one.
    below = hits(f=-0.5, g=-0.82, h=-0.9)
    filters = Filters(relative_margin=0.05)
    assert [hit.document for hit in below if filters.accepts(hit, -0.8)] == ["h"]


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


Options = dict[str, Any]


@pytest.fixture
def retrieval_set(tmp_path: Path) -> Options:
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
        "data": BeirFolder(str(tmp_path), "train"),
        "corpus": write_vectors(tmp_path / "c", documents, vectors, 40),
        "queries": write_vectors(tmp_path / "q", queries, noisy, 7, side="queries"),
    }


def mined(options: Options, output: Path, ranks: int = 1) -> dict[str, Any]:
    """Mine on so many ranks; the rows by query."""
    run_ranks(work, ranks, Mine(**options), str(output))
    return {row["query_id"]: row for row in Parts(output).read().to_pylist()}


def test_a_mining_job_on_one_and_two_ranks(retrieval_set: Options, tmp_path: Path) -> None:
    options = {**retrieval_set, "num_negatives": 4, "relative_margin": 0.1, "part_size": 6}
    rows = mined(options, tmp_path / "one")
    assert rows == mined(options, tmp_path / "two", ranks=2)
    same_files(tmp_path / "one", tmp_path / "two")
    assert list(rows) == [f"q{n}" for n in range(1, 20)]
    documents = np.concatenate(Vectors.read(retrieval_set["corpus"]).chunks)
    queries = np.concatenate(Vectors.read(retrieval_set["queries"]).chunks)
    assert any(len(row["ids"]) == 4 for row in rows.values())
    for number in range(1, 20):
        scores = documents @ queries[number]
        relevant = {4 * number, 50} if number == 3 else {4 * number}
        positive = min(scores[list(relevant)])
        expected = [
            f"d{n}"
            for n in np.argsort(-scores)
            if n not in relevant and scores[n] <= positive - 0.1 * abs(positive)
        ]
        assert rows[f"q{number}"]["ids"] == expected[:4]
        assert rows[f"q{number}"]["positive_score"] == pytest.approx(positive, abs=1e-5)
        assert rows[f"q{number}"]["error"] is None


def test_what_has_no_vector_is_left_out_with_its_reason(
    retrieval_set: Options, tmp_path: Path
) -> None:
    bad = {"d4": "4.png is damaged", "d12": "12.png is damaged", "d30": "30.png is damaged"}
    vectors = np.concatenate(Vectors.read(retrieval_set["corpus"]).chunks)
    ids = [f"d{n}" for n in range(90)]
    corpus = write_vectors(tmp_path / "bad", ids, vectors, 40, bad)
    queries = Vectors.read(retrieval_set["queries"])
    chunks = queries.chunks
    asked = write_vectors(
        tmp_path / "asked",
        queries.ids,
        np.concatenate(chunks),
        7,
        {"q5": "5.png is damaged"},
        side="queries",
    )
    options = {**retrieval_set, "corpus": corpus, "queries": asked, "num_negatives": 90}
    rows = mined(options, tmp_path / "out")
    assert rows["q5"]["error"] == "5.png is damaged"
    assert rows["q1"]["error"] == "query q1: nothing relevant to it has a vector"
    for query in ("q5", "q1"):
        assert rows[query]["ids"] == [] and rows[query]["positive_score"] is None
    # d50 alone is left of what is relevant to q3; all else is found at its place.
    score = float(vectors[50] @ np.concatenate(chunks)[3])
    assert rows["q3"]["positive_score"] == pytest.approx(score, abs=1e-6)
    assert sorted(rows["q3"]["ids"]) == sorted(set(ids) - set(bad) - {"d50"})


def circle(tmp_path: Path, qrels: str) -> Options:
    """M-BEIR's layout: 60 candidates at ranks 1 to 60 of every query, each third one a picture.

    Candidates of odd rank are of set 5 (OVEN), the others of set 6.
    """
    names = [f"{5 if rank % 2 else 6}:{rank}" for rank in range(1, 61)]
    lines = [
        {"did": name, "modality": "image", "img_path": "p.png", "txt": None}
        if rank % 3 == 0
        else {"did": name, "modality": "text", "txt": name, "img_path": None}
        for rank, name in enumerate(names, 1)
    ]
    (tmp_path / "pool").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "qrels").write_text(qrels)
    angles = np.arange(1, 61) / 60
    queries = ["1:1", "1:2", "5:1", "5:2"]
    return {
        "data": MBeirFiles(str(tmp_path), str(tmp_path / "pool"), qrels=str(tmp_path / "qrels")),
        "corpus": write_vectors(
            tmp_path / "c",
            names,
            np.stack([np.cos(angles), np.sin(angles)], 1),
            16,
            texts={line["did"]: line["txt"] and f"{line['txt']}." for line in lines},
        ),
        "queries": write_vectors(tmp_path / "q", queries, np.eye(2)[[0] * 4], 4, side="queries"),
        "num_negatives": 50,
        "range_max": 50,
        "modality_floor": 45,
    }


def test_modality_aware_mining_of_mbeir_by_hand(tmp_path: Path) -> None:
    options = circle(tmp_path, "1:1 0 6:12 1 7\n1:2 0 5:57 1 7\n5:1 0 5:9 1 7\n5:1 0 6:6 1 7\n")
    rows = mined(options, tmp_path / "out")
    ranks = {
        query: sorted(int(name.partition(":")[2]) for name in row["ids"])
        for query, row in rows.items()
    }
    # The target is a picture: texts above the picture at rank 12, and pictures at ranks 46 to 50.
    assert ranks["1:1"] == [1, 2, 4, 5, 7, 8, 10, 11, 48]
    # The relevant picture is at rank 57, behind the 50: it counts as 51, so every text qualifies.
    assert ranks["1:2"] == sorted([r for r in range(1, 51) if r % 3] + [48])
    # OVEN: the picture of another set does not count, so that 9 is the positive's rank, and not 6.
    # It is no negative of either query.
    assert ranks["5:1"] == [1, 2, 4, 5, 7, 8, 48]
    # Without modalities, no candidate that is known to be relevant is a negative.
    plain = mined(options | {"modality_floor": None}, tmp_path / "plain")
    assert "6:6" not in plain["5:1"]["ids"] and len(plain["5:1"]["ids"]) == 48


def test_modality_aware_mining_takes_both_kinds(retrieval_set: Options, tmp_path: Path) -> None:
    options = {**retrieval_set, "num_negatives": 6, "range_max": 30, "modality_floor": 20}
    rows = mined(options, tmp_path / "out")
    assert any(row["ids"] for row in rows.values())
    assert not {"d12", "d50"} & set(rows["q3"]["ids"])


def test_what_mining_refuses(retrieval_set: Options, tmp_path: Path) -> None:
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnone\t1\n")
    folder = str(tmp_path)

    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Mine(**(retrieval_set | changes)).prepare(None)

    refuse(r"1 ids without a vector: \['none'\]", data=BeirFolder(folder, "test"))
    refuse(r"job\.data\.split is not given", data=BeirFolder(folder))
    refuse("dev.tsv cannot be read", data=BeirFolder(folder, "dev"))
    refuse(r"job\.range_min=5 must be at least 0 and below", range_min=5, range_max=5)
    refuse(r"num_negatives=6 must be at least 1 and at most 5", num_negatives=6, range_max=5)
    refuse(r"job\.min_score=0.9 must be at most job\.max_score=0.1", min_score=0.9, max_score=0.1)
    refuse(r"job\.relative_margin=-0.1 must be at least 0", relative_margin=-0.1)
    asked, found = retrieval_set["queries"], retrieval_set["corpus"]
    refuse(r"job\.corpus=.* was encoded with job\.side=queries", corpus=asked, queries=found)
    renamed = dict.fromkeys([f"d{n}" for n in range(90)], "another text")
    other = write_vectors(tmp_path / "d", list(renamed), np.eye(90)[:, :8], 40, texts=renamed)
    refuse("has vectors of other documents than job.data names", corpus=other)
    foreign = write_vectors(
        tmp_path / "foreign", ["q1"], np.eye(9), 1, side="queries", weights="other"
    )
    refuse("vectors of two checkpoints, whose weights differ: w and other", queries=foreign)
    refuse(r"job\.strategy", strategy="best")
    refuse(r"job\.strategy=random does nothing", strategy="random", modality_floor=3)
    parts = Parts.begin(tmp_path / "other", 1, 1, {})
    parts.write(0, pa.table({"text": ["a"]}))
    parts.finish()
    refuse("no output of job=encode", corpus=str(tmp_path / "other"))
