"""Reranking by P(True): what is asked, in what order the candidates come, and stopped jobs."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from nvmm.data.prepare.layouts import BeirFolder, MBeirFiles, RetrievalSet
from nvmm.data.samples.record import plain_question
from nvmm.evaluation.ranking import mean_scores
from nvmm.jobs.job import items_digest
from nvmm.jobs.parts import Parts
from nvmm.jobs.rerank import Rerank, _Pairs, reordered
from nvmm.jobs.search import SCHEMA, read_rankings
from tests import test_evaluate
from tests.evaluation.test_mbeir import write_set
from tests.jobs.test_job import BEIR, MBEIR, WHOLE, interrupted_equals_whole, job
from tests.ranks import run_ranks

PROMPT = "{candidate}\nQuery: {query}\nDo they match? True or False"


def write_ranking(folder: Path, rankings: dict[str, list[str]], data: RetrievalSet) -> str:
    """Write the output of a search of `data`."""
    identity = {"inputs": {"items": items_digest(data.documents)}}
    parts = Parts.begin(folder, len(rankings), len(rankings), identity)
    rows = [{"query_id": query, "ids": ids} for query, ids in rankings.items()]
    parts.write(0, pa.Table.from_pylist(rows, SCHEMA))
    parts.finish()
    return str(folder)


def asked(
    rank: int, world: int, init: str, checkpoint: Path, text: str, pictures: list[bytes]
) -> float:
    """P(True) of one question."""
    import torch.distributed as dist

    from nvmm.inference.restore import restore

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    model = restore(checkpoint)
    sample = model.builder.prompt(plain_question(text, pictures, "by hand"))
    words = [model.tokenizer.encode(word) for word in ("True", "False")]
    true, false = model.score_continuations([sample], words)[0].tolist()
    return 1 / (1 + float(torch.tensor(false - true).exp()))


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multimodal")
    run_ranks(test_evaluate.save, 1, path)
    return path / "run"


def test_the_scored_candidates_come_first() -> None:
    ids = list("abcdef")
    assert reordered(ids, [0.2, None, 0.9, 0.2]) == (
        ["c", "a", "d", "b", "e", "f"],
        [0.9, 0.2, 0.2, None, None, None],
    )
    assert reordered(["a"], [0.0]) == (["a"], [0.0])
    assert reordered([], []) == ([], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{query}?"}, r"must have \{query\} and \{candidate\} once each"),
        ({"prompt": "{query} {query} {candidate}"}, "once each"),
        ({"prompt": "{query} {candidate} {title}"}, r"may have \{instruction\}"),
        ({"prompt": r"{query}\n{candidate}"}, "has a backslash and an n, no line break"),
        ({"top": 0}, r"job\.top=0 must be at least 1"),
        ({"max_candidate_tokens": 0}, r"job\.max_candidate_tokens=0"),
        ({"continuations": ["True"]}, r"job\.continuations=1 must be at least 2"),
    ],
)
def test_what_reranking_refuses(changes: dict[str, Any], message: str) -> None:
    data: Any = None
    with pytest.raises(ValueError, match=message):
        Rerank(**({"data": data, "ranking": "r", "prompt": PROMPT} | changes))


def test_what_is_asked_of_a_pair(tmp_path: Path) -> None:
    data = MBeirFiles(**write_set(tmp_path))
    rankings = {"1:2": ["1:5", "1:1", "1:3"], "1:0": ["1:0"]}
    ranking = Rerank(data, "r", "{instruction} {candidate}\n{query}?", 2, max_candidate_tokens=3)
    words: Any = SimpleNamespace(encode=str.split, decode=" ".join)
    model: Any = SimpleNamespace(tokenizer=words, reads_pictures=True)
    pairs = _Pairs(ranking, rankings, model)
    assert [list(pairs.of(number)) for number in (0, 1)] == [[0, 1], [2]]
    members = pairs.members(0)
    assert json.loads(members["json"]) == {
        "question": "Find image,text. <image>\nRed red red\n<image>\nRed red square.?"
    }
    pictures = [(tmp_path / f"{number}.png").read_bytes() for number in (5, 2)]
    assert [members["0.png"], members["1.png"]] == pictures, "in the order of the prompt"
    question = json.loads(pairs.members(1)["json"])["question"]
    assert question == "Find image,text. <image>\n<image>\nRed red square.?"
    assert not {"0.png", "1.png"} & set(pairs.members(2))
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        pairs.members(1)
    model.reads_pictures = False
    with pytest.raises(ValueError, match="1:2, 1:5: the checkpoint reads texts alone"):
        pairs.members(0)


@pytest.mark.slow
def test_pairs_of_pictures_and_texts(multimodal: Path, tmp_path: Path) -> None:
    """A pair has both pictures, in the prompt's order; one that cannot be read has no score."""
    files = write_set(tmp_path)
    pictures = {number: (tmp_path / f"{number}.png").read_bytes() for number in (2, 5)}
    (tmp_path / "8.png").write_bytes((tmp_path / "8.png").read_bytes()[:40])
    (tmp_path / "7.png").unlink()
    rankings = {f"1:{n}": [f"1:{(n + step) % 9}" for step in (3, 1, 5, 0, 2)] for n in range(9)}
    options = {
        "_target_": "nvmm.jobs.rerank.Rerank",
        "data": {"_target_": MBEIR, **files},
        "ranking": write_ranking(tmp_path / "ranking", rankings, MBeirFiles(**files)),
        "prompt": PROMPT + " {instruction}",
        "top": 4,
        "batch_size": 3,
        "part_size": 2,
    }
    rows = interrupted_equals_whole(multimodal, options, tmp_path).read().to_pylist()
    found = {row["query_id"]: row for row in rows}
    for query, row in found.items():
        number = int(query[2:])
        assert sorted(row["ids"]) == sorted(rankings[query])
        assert row["ids"][-1] == rankings[query][4], "the fifth was not asked about"
        scores = dict(zip(row["ids"], row["scores"], strict=True))
        broken = {7, 8} & {number, *(int(name[2:]) for name in rankings[query][:4])}
        lost = 4 if number in (7, 8) else len(broken)
        assert list(scores.values()).count(None) == 1 + lost
        assert (row["error"] is not None) == bool(broken)
    assert "7.png cannot be read (No such file" in found["1:7"]["error"]
    assert found["1:8"]["error"].startswith("1:8, 1:2:: member 1.png: cannot decode image")
    # Query 2, candidate 5: both have a text and a picture.
    text = (
        "<image>\nRed red red red red square.\nQuery: <image>\nRed red square."
        "\nDo they match? True or False Find image,text."
    )
    scores = dict(zip(found["1:2"]["ids"], found["1:2"]["scores"], strict=True))
    [expected] = run_ranks(asked, 1, multimodal, text, [pictures[5], pictures[2]])
    assert scores["1:5"] == pytest.approx(expected, abs=1e-5)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    judged = {query: {query: 1} for query in rankings}
    after = mean_scores(read_rankings(tmp_path / "whole"), judged)
    before = {f"{name}_before": value for name, value in mean_scores(rankings, judged).items()}
    assert metrics == pytest.approx(after | before)
    assert metrics["hit_rate_at_1_before"] == 0 and metrics["map_at_5_before"] == 1 / 4


@pytest.mark.slow
def test_texts_by_a_text_only_model_at_any_layout(tmp_path: Path) -> None:
    run_ranks(functools.partial(test_evaluate.save, text_only=True), 1, tmp_path)
    corpus = {"a": "the number", "b": "many " * 300, "c": "read it in this picture", "d": "no"}
    queries = {"q": "what is it", "r": "how many"}
    for name, texts in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "qrels").mkdir()
    qrels = "query-id\tcorpus-id\tscore\nq\ta\t1\nr\tb\t1\n"
    (tmp_path / "qrels" / "test.tsv").write_text(qrels)
    rankings = {"q": ["a", "c"], "r": ["d", "b", "a"]}
    data = BeirFolder(str(tmp_path), "test")
    options = {
        "_target_": "nvmm.jobs.rerank.Rerank",
        "data": {"_target_": BEIR, "folder": str(tmp_path), "split": "test"},
        "ranking": write_ranking(tmp_path / "ranking", rankings, data),
        "prompt": PROMPT,
        "max_candidate_tokens": 3,
        "part_size": 1,
    }
    run = tmp_path / "run"

    def rows(name: str, ranks: int, layout: dict[str, int], **changes: Any) -> list[dict[str, Any]]:
        run_ranks(job, ranks, run, options | changes, tmp_path / name, layout, WHOLE)
        return Parts(tmp_path / name).read().to_pylist()

    whole = rows("whole", 1, {})
    assert rows("dp", 2, {}) == whole
    split = rows("tp", 2, {"tensor_model_parallel_size": 2})
    for one, other in zip(whole, split, strict=True):
        assert one["ids"] == other["ids"] and one["error"] is None
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    text = "no\nQuery: how many\nDo they match? True or False"
    scores = dict(zip(whole[1]["ids"], whole[1]["scores"], strict=True))
    assert scores["d"] == pytest.approx(run_ranks(asked, 1, run, text, [])[0], abs=1e-5)
    # A document that is not cut does not fit, and has no score.
    uncut = rows("uncut", 1, {}, max_candidate_tokens=None)
    assert uncut[1]["ids"][-1] == "b" and uncut[1]["scores"][-1] is None
    assert "r, b:" in uncut[1]["error"]
    # A text-only model has no score for a picture.
    (tmp_path / "mbeir").mkdir()
    files = write_set(tmp_path / "mbeir")
    pictures = {
        "data": {"_target_": MBEIR, **files},
        "ranking": write_ranking(
            tmp_path / "r2",
            {f"1:{n}": ["1:0", "1:1"] for n in range(9)},
            MBeirFiles(**files),
        ),
    }
    first = rows("pictures", 1, {}, **pictures)[0]
    assert first["ids"] == ["1:0", "1:1"] and first["scores"][1] is None
    assert "reads texts alone, no pictures" in first["error"]
    with pytest.raises(RuntimeError, match=r"1 of their candidates are not in it: \['z'\]"):
        rows("x", 1, {}, ranking=write_ranking(tmp_path / "r3", {"q": ["z"], "r": []}, data))
    with pytest.raises(RuntimeError, match=r"lacks 1 judged queries: \['r'\]"):
        rows("y", 1, {}, ranking=write_ranking(tmp_path / "r4", {"q": ["a"]}, data))
    other = write_ranking(tmp_path / "r5", rankings, MBeirFiles(**files))
    with pytest.raises(RuntimeError, match=r"r5 ranks other documents than job\.data's"):
        rows("z", 1, {}, ranking=other)
