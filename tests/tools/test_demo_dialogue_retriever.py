"""The demo's data, its commands and its scores, without its trainings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare.packages import SOURCES
from nvmm.jobs import encode
from tests.data.prepare.test_python_faq import FAQ
from tools import demo_dialogue_retriever as demo


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's files of a small FAQ, in the place of the unpacked package."""
    folder = tmp_path / "data"
    (folder / "package" / SOURCES / "faq").mkdir(parents=True)
    (folder / "package" / SOURCES / "faq" / "small.rst.txt").write_text(FAQ)
    monkeypatch.setattr(demo, "DATA", folder)
    demo.build(folder, None)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_document_of_a_held_out_question_is_asked_about_in_training(data: Path) -> None:
    training = {line["document_id"] for line in lines(data / "train.jsonl")}
    for form in demo.FORMS:
        held_out = lines(data / f"{form}.jsonl")
        assert held_out and training.isdisjoint(line["document_id"] for line in held_out)
    before = (data / "train.jsonl").read_bytes()
    demo.build(data, None)
    assert (data / "train.jsonl").read_bytes() == before


def test_every_training_composes_and_passes_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "minilm", lambda: Path("minilm"))
    for model in demo.MODELS:
        chain = demo.variant(tmp_path, model, 1, 7).commands
        trainings = [c.arguments for c in chain if "nvmm.train" in c.arguments]
        assert len(trainings) == (model != "untouched")
        for arguments in trainings:
            overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
            config = composed("train", overrides)
            assert check(config) == []
            plain = to_plain(config)
            assert plain["trainer"]["max_steps"] == 7
            assert ("language" in plain["model"]) is (model == "towers")
        jobs = {c.folder.name: c.arguments for c in chain if "nvmm.job" in c.arguments}
        assert list(jobs) == ["corpus", *demo.FORMS]
        for arguments in jobs.values():
            overrides = [argument(text) for text in arguments if "=" in text]
            assert check(composed("job", overrides), entry="job", world_size=1) == []
        assert len({command.folder for command in chain}) == len(chain)


def test_scores_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three chunks the first query finds its own second, the other query finds it first."""
    vectors = {
        "corpus": (["a", "b", "c"], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.6]]),
        "dialogue": (["q0", "q1"], [[1.0, 0.3], [0.0, 2.0]]),
    }

    def read(folder: Path) -> SimpleNamespace:
        names, rows = vectors[folder.parent.name]
        return SimpleNamespace(ids=names, chunks=[np.array(row)[None] for row in rows])

    monkeypatch.setattr(encode.Vectors, "read", read)
    qrels = tmp_path / "data/dialogue/beir/qrels"
    qrels.mkdir(parents=True)
    (qrels / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc\t1\nq1\tb\t1\n")
    found = demo.measure(tmp_path, 1, "trained", "dialogue")
    by_hand = (1 + 1 / math.log2(3)) / 2
    assert found.pop("ndcg@10") == pytest.approx(by_hand)
    assert found == {"recall@1": 0.5, "recall@5": 1.0, "recall@20": 1.0, "mrr": 0.75}
    found["ndcg@10"] = 0.5
    made = demo.table({"trained": [found, found | {"mrr": 0.25}]})
    assert made.rows == [
        ("trained", ["0.500 ± 0.000", *["1.000 ± 0.000"] * 2, "0.500 ± 0.000", "0.500 ± 0.354"])
    ]
