"""Jobs of saved checkpoints: stopped and gone on with at other numbers of ranks, and by command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvmm.io import files
from nvmm.jobs.encode import Vectors
from nvmm.jobs.job import Work
from nvmm.jobs.parts import Parts
from tests import test_evaluate
from tests.convert import test_nv_embed
from tests.convert.test_nv_embed import tokenizer  # noqa: F401
from tests.ranks import run_ranks

WHOLE = 10**6
BEIR = "nvmm.data.prepare.layouts.BeirFolder"
MBEIR = "nvmm.data.prepare.layouts.MBeirFiles"


def job(
    rank: int,
    world: int,
    init: str,
    checkpoint: Path,
    options: dict[str, Any],
    output: Path,
    parallel: dict[str, int],
    budget: int,
) -> Any:
    """Run a job on this rank, which dies after `budget` parts of its own."""
    import torch.distributed as dist
    from hydra.utils import instantiate

    from nvmm.inference.restore import restore
    from nvmm.jobs.job import run

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    model = restore(checkpoint, parallel=parallel)
    made = instantiate(options, _convert_="all")
    work: Work = made.prepare(model)
    done = 0

    def rows(numbers: range) -> Any:
        nonlocal done
        if done == budget:
            raise InterruptedError("stopped")
        done += 1
        return work.rows(numbers)

    type(made).prepare = lambda self, model: replace(work, rows=rows)
    try:
        return run(made, {"job": options}, model, output)
    except InterruptedError:
        return None


def interrupted_equals_whole(checkpoint: Path, options: dict[str, Any], folder: Path) -> Parts:
    """2 ranks, then 1, then 2, each stopped before the next: the files of one undisturbed rank."""
    whole, pieces = folder / "whole", folder / "pieces"
    [summary] = run_ranks(job, 1, checkpoint, options, whole, {}, WHOLE)
    assert summary["written"] == summary["rows"]
    written = []
    for ranks, budget in ((2, 1), (1, 1)):
        assert run_ranks(job, ranks, checkpoint, options, pieces, {}, budget) == [None] * ranks
        written.append(len(list(pieces.glob("*.arrow"))))
        with pytest.raises(ValueError, match="is not whole"):
            Parts(pieces).read()
    assert written == [2, 3]
    last = run_ranks(job, 2, checkpoint, options, pieces, {}, WHOLE)
    assert last[0]["rows"] == summary["rows"]
    assert 0 < last[0]["written"] < summary["rows"]
    names = sorted(path.name for path in whole.glob("*"))
    assert names == sorted(path.name for path in pieces.glob("*"))
    for name in names:
        assert (whole / name).read_bytes() == (pieces / name).read_bytes(), name
    return Parts(whole)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multimodal")
    run_ranks(test_evaluate.save, 1, path)
    return path


@pytest.fixture(scope="module")
def shards(checkpoint: Path) -> str:
    """Eight samples, two of them bad: no text, and a damaged picture."""
    from nvmm.data.shards.dataset import write_shards

    samples = []
    for number in range(8):
        question = " ".join(test_evaluate.WORDS[: 3 + number])
        record = {"question": None if number == 4 else question, "answer": "read it"}
        sample: dict[str, Any] = {"__key__": f"k{number}", "json": json.dumps(record).encode()}
        if number % 2:
            picture = test_evaluate.picture(16 + number, 20)
            sample["png"] = picture[:40] if number == 5 else picture
        samples.append(sample)
    write_shards(checkpoint / "jobs", "t", samples, samples_per_shard=3)
    return str(checkpoint / "jobs" / "t-*.tar")


def test_a_stopped_generation_goes_on(checkpoint: Path, shards: str, tmp_path: Path) -> None:
    options = {
        "_target_": "nvmm.jobs.generate.Generate",
        "shards": shards,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "seed": 5,
        "batch_size": 2,
        "part_size": 2,
    }
    rows = interrupted_equals_whole(checkpoint / "run", options, tmp_path).read().to_pylist()
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(8)]
    assert [number for number, row in enumerate(rows) if row["error"]] == [4, 5]
    assert "t-00001.tar:k5" in rows[5]["error"]
    assert all((row["text"] is None) == (row["error"] is not None) for row in rows)
    assert len({row["text"] for row in rows}) > 4


def test_a_stopped_scoring_goes_on(checkpoint: Path, shards: str, tmp_path: Path) -> None:
    options = {
        "_target_": "nvmm.jobs.score.Score",
        "shards": shards,
        "continuations": ["read it", "no"],
        "part_size": 2,
    }
    rows = interrupted_equals_whole(checkpoint / "run", options, tmp_path).read().to_pylist()
    good = [row for row in rows if row["error"] is None]
    assert len(good) == 6
    for row in good:
        first, second = row["log_probabilities"]
        expected = 1 / (1 + np.exp(second - first))
        assert row["probability"] == pytest.approx(expected, rel=1e-9)
    # The answer of the data, with the end of its turn, is a continuation like any other.
    answers = {"_target_": "nvmm.jobs.score.Score", "shards": shards, "part_size": 8}
    end = test_evaluate.SPECIAL[1]
    given = answers | {"continuations": [f"read it{end}", "no"]}
    tables = []
    for number, some in enumerate((answers, given)):
        output = tmp_path / str(number)
        layout = {"tensor_model_parallel_size": 2} if number else {}
        run_ranks(job, 1 + number, checkpoint / "run", some, output, layout, WHOLE)
        tables.append(Parts(output).read().to_pylist())
    compared = 0
    for own, other in zip(*tables, strict=True):
        if own["error"] is None:
            assert own["log_probability"] == pytest.approx(other["log_probabilities"][0], abs=1e-4)
            compared += 1
    assert compared == 6


def test_a_stopped_encoding_goes_on_and_is_mined(
    tokenizer: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = test_nv_embed.config_of(tokenizer)
    [vectors] = run_ranks(test_nv_embed.save, 1, {}, config, tmp_path / "run")
    texts = dict(zip(["a", "b", "c"], test_nv_embed.TEXTS, strict=True))
    texts |= {f"d{n}": "bird " * n + "sings" for n in range(6)}
    for name in ("corpus", "queries"):
        lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    options = {
        "_target_": "nvmm.jobs.encode.Encode",
        "data": {"_target_": BEIR, "folder": str(tmp_path)},
        "side": "queries",
        "batch_size": 2,
        "part_size": 2,
    }
    parts = interrupted_equals_whole(tmp_path / "run", options, tmp_path)
    found = Vectors.read(parts.folder)
    assert found.ids == list(texts) and not found.errors
    encoded = torch.from_numpy(np.concatenate(found.chunks))
    torch.testing.assert_close(encoded[:3], vectors[0], rtol=1e-5, atol=1e-6)
    halves = options | {"side": "corpus", "dtype": "fp16", "part_size": 100}
    layout = {"tensor_model_parallel_size": 2}
    run_ranks(job, 2, tmp_path / "run", halves, tmp_path / "half", layout, WHOLE)
    [documents] = Vectors.read(tmp_path / "half").chunks
    assert documents.dtype == np.float16
    torch.testing.assert_close(torch.tensor(documents[:3]).float(), vectors[1], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_command(checkpoint: Path, shards: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-W", "ignore", "-m", "nvmm.job", "job=generate"),
        *(f"checkpoint={checkpoint / 'run'}", f"job.shards={shards}", "job.max_new_tokens=2"),
        f"output={tmp_path / 'out'}",
    ]

    def run(*changes: str) -> tuple[int, str]:
        result = subprocess.run([*command, *changes], capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    code, text = run()
    assert code == 0, text
    assert "8 rows, 8 of them new" in text
    assert "2 rows have an error; the first: " in text
    code, text = run("job.seed=2")
    assert code == 2
    assert "job.seed was 1234, is 2" in text
    assert "Traceback" not in text
    with files.lock(tmp_path / "out" / ".lock"):
        code, text = run()
    assert code == 2
    assert "another job works in" in text


KEYS = {
    "encode": ["job.side=corpus"],
    "encode_sounds": ["job.shards=x.tar", "job.encoder=e"],
    "few_shot": ["job.shards=x.tar", "job.vectors=v", "job.train=t", "job.train_vectors=w"],
    "generate": ["job.shards=x.tar"],
    "mine": ["job.queries=y", "job.corpus=z"],
    "rag": ["job.documents=d.jsonl", "job.questions=q.jsonl", "job.retriever=r"],
    "rerank": ["job.ranking=x"],
    "reward": ["job.shards=x.tar"],
    "score": ["job.shards=x.tar", "job.continuations=['True','False']"],
    "search": ["job.queries=y", "job.corpus=z"],
    "synthesise": ["job.generators.writer.model=x"],
}
OPTIONS = Path(__file__).parents[2] / "configs" / "job"


@pytest.mark.parametrize("name", sorted(path.stem for path in OPTIONS.glob("*.yaml")))
@pytest.mark.parametrize("layout", ["beir", "mbeir"])
def test_every_job_composes(name: str, layout: str) -> None:
    from hydra.utils import instantiate

    from nvmm.config import check, compose
    from nvmm.jobs.few_shot import FewShot
    from nvmm.jobs.job import Job
    from nvmm.jobs.rag.pipeline import Rag
    from nvmm.jobs.synthesise import Synthesise

    data = list(KEYS[name])
    if "job.shards=x.tar" not in data and name not in ("rag", "synthesise"):
        data += [f"job/data={layout}", "job.data.folder=x"]
        data += ["job.data.pool=p"] * (layout == "mbeir")
    composed = compose.composed("job", [f"job={name}", *data, "output=o"])
    assert check.check(composed, entry="job", world_size=1) == []
    made = instantiate(composed.job, _convert_="all")
    assert isinstance(made, Job | FewShot | Rag | Synthesise)
    assert made.name == name


def test_a_job_refuses_what_does_nothing(tmp_path: Path) -> None:
    from nvmm.data.prepare.layouts import BeirFolder
    from nvmm.jobs.encode import Encode
    from nvmm.jobs.generate import Generate
    from nvmm.jobs.score import Score

    with pytest.raises(ValueError, match=r"job\.data\.split=test is of judgements"):
        Encode(data=BeirFolder("x", "test"), side="queries").prepare(None)
    with pytest.raises(ValueError, match="give one of them"):
        Score("x.tar", preferences="drop", continuations=["a", "b"])
    with pytest.raises(ValueError, match=r"job\.top_p=0\.5 does nothing with job\.temperature=0"):
        Generate("x.tar", top_p=0.5)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(ValueError, match="must be at least"):
            Generate("x.tar", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"part_size": 0}, {"batch_size": -1}])
def test_sizes_are_at_least_one(wrong: dict[str, int]) -> None:
    from nvmm.jobs.generate import Generate
    from nvmm.jobs.job import run

    with pytest.raises(ValueError, match="must be at least 1"):
        run(Generate("x.tar", **wrong), {}, None, "out")  # type: ignore[arg-type]


def test_keys_of_a_checkpoint_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    from nvmm import job as command
    from nvmm.config import check, compose

    search = ["job=search", "job.data.folder=x", "job.queries=y", "job.corpus=z", "output=o"]
    for change, key in (
        ("sequence_length=64", "sequence_length"),
        ("build.masking=none", "build"),
        ("tokenizer.path=x", "tokenizer"),
        ("backend=native", "backend"),
        ("trust_config=true", "trust_config"),
    ):
        composed = compose.composed("job", [*search, change])
        assert check.check(composed, entry="job", world_size=1) == []
        with pytest.raises(SystemExit) as stopped:
            command.run(compose.Job(check.to_plain(composed), []))
        assert stopped.value.code == compose.BAD_CONFIG
        assert f"{key} is of a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("number_format", ["fp16", "fp32"])
def test_values_that_fp16_cannot_hold(
    number_format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from nvmm.data.prepare.layouts import BeirFolder
    from nvmm.jobs import encode

    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": str(n), "text": "a"}) + "\n" for n in range(3))
    )
    vectors = torch.tensor([[1.0, 2.0], [7e4, 0.0], [float("nan"), 0.0]])
    encoder = SimpleNamespace(
        size=2, builder=SimpleNamespace(instruction=None), local=lambda *_: vectors.clone()
    )
    model: Any = SimpleNamespace(encoder=lambda batch_size: encoder)
    monkeypatch.setattr(encode, "pictures_digest", lambda paths: "")
    job = encode.Encode(data=BeirFolder(str(tmp_path)), side="corpus", dtype=number_format)
    rows = job.prepare(model).rows(range(3)).to_pylist()
    assert rows[0] == {"id": "0", "vector": [1, 2], "error": None}
    assert "is not finite" in rows[2]["error"]
    if number_format == "fp16":
        assert rows[1]["vector"] is None
        assert rows[1]["error"] == "1: its vector has no place in job.dtype=fp16; take fp32"
    else:
        assert rows[1]["vector"] == [7e4, 0]
