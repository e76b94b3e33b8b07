"""M-BEIR through the jobs: encode pictures, search, mine, and make shards of what was mined."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvmm.commands import shard
from nvmm.data.prepare.layouts import MBeirFiles
from nvmm.data.shards.dataset import Dataset
from nvmm.jobs.encode import Vectors
from nvmm.jobs.mine import Mine
from nvmm.jobs.parts import Parts
from nvmm.jobs.search import Search
from tests.evaluation import test_mbeir
from tests.jobs.test_job import MBEIR, WHOLE, interrupted_equals_whole, job
from tests.jobs.test_search import same_files, work
from tests.ranks import run_ranks


def one_by_one(
    rank: int, world: int, init: str, checkpoint: Path, data: MBeirFiles
) -> tuple[Any, Any]:
    """The vectors of candidates and queries, each in a forward pass of its own."""
    import torch.distributed as dist

    from nvmm.evaluation.mbeir import content
    from nvmm.inference.restore import restore

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    encoder = restore(checkpoint).encoder()
    documents = [encoder([content(item)])[0].numpy() for item in data.documents.values()]
    queries = [
        encoder([content(item)], data.prompts[name])[0].numpy()
        for name, item in data.questions.items()
    ]
    return np.stack(documents), np.stack(queries)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mm_embed")
    run_ranks(test_mbeir.save, 1, path)
    return path / "run"


def options_of(files: dict[str, str], side: str) -> dict[str, Any]:
    return {
        "_target_": "nvmm.jobs.encode.Encode",
        "data": {"_target_": MBEIR, **files},
        "side": side,
        "batch_size": 2,
        "part_size": 2,
    }


def test_a_stopped_encoding_of_pictures_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """A picture that is missing or damaged costs its own row; one that changes is noticed."""
    files = test_mbeir.write_set(tmp_path)
    data = MBeirFiles(**files)
    [(documents, _)] = run_ranks(one_by_one, 1, checkpoint, data)
    (tmp_path / "4.png").unlink()
    (tmp_path / "8.png").write_bytes((tmp_path / "8.png").read_bytes()[:40])
    options = options_of(files, "corpus")
    parts = interrupted_equals_whole(checkpoint, options, tmp_path)
    found = Vectors.read(parts.folder)
    errors = found.errors
    assert list(errors) == ["1:4", "1:8"]
    assert errors["1:4"] == f"{tmp_path}/4.png cannot be read (No such file or directory)"
    assert "cannot decode image" in errors["1:8"]
    assert found.ids == [f"1:{n}" for n in range(9) if n not in (4, 8)]
    rest = [n for n in range(9) if n not in (4, 8)]
    np.testing.assert_allclose(np.concatenate(found.chunks), documents[rest], rtol=0, atol=1e-6)
    run = functools.partial(run_ranks, job, 1, checkpoint, options, tmp_path / "whole", {}, WHOLE)
    [summary] = run()
    assert summary["written"] == 0 and summary["bad"] == 2
    picture = tmp_path / "1.png"
    data_of = bytearray(picture.read_bytes())
    data_of[-1] ^= 1
    picture.write_bytes(data_of)  # its size stays
    with pytest.raises(RuntimeError, match=r"output of another job: inputs\.pictures was"):
        run()


@pytest.mark.slow
def test_encode_search_mine_and_shards(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = test_mbeir.write_set(tmp_path)
    data = MBeirFiles(**files)
    [vectors] = run_ranks(one_by_one, 1, checkpoint, data)
    # 1. Queries get the instruction of their set, modality and target; one is not judged.
    (tmp_path / "qrels").write_text("\n".join(f"1:{n} 0 1:{n} 1 0" for n in range(8)))
    queries = interrupted_equals_whole(checkpoint, options_of(files, "queries"), tmp_path).folder
    found = Vectors.read(queries)
    assert found.errors == {"1:8": "query 1:8: no judgement says what it looks for"}
    np.testing.assert_allclose(np.concatenate(found.chunks), vectors[1][:8], rtol=0, atol=1e-6)
    corpus, layout = tmp_path / "corpus", {"tensor_model_parallel_size": 2}
    run_ranks(job, 2, checkpoint, options_of(files, "corpus"), corpus, layout, WHOLE)
    chunks = Vectors.read(corpus).chunks
    np.testing.assert_allclose(np.concatenate(chunks), vectors[0], rtol=0, atol=1e-5)
    # 2. The search has the evaluation's hit rates.
    data = MBeirFiles(**files)
    folders = {"data": data, "queries": str(queries), "corpus": str(corpus)}
    [summary] = run_ranks(work, 1, Search(**folders, k=9), str(tmp_path / "found"))
    [expected] = run_ranks(test_mbeir.score, 1, checkpoint.parent, {}, 2, "nvmm", files)
    for name in ("hit_rate_at_1", "hit_rate_at_5", "ndcg_at_10"):
        assert summary["metrics"][name] == pytest.approx(expected[name], abs=1e-6), name
    # 3. What is mined becomes the negatives of training, on one rank as on two.
    options = {"num_negatives": 2, "modality_floor": 6, "range_max": 9, "part_size": 3}
    for ranks in (1, 2):
        output = tmp_path / f"mined{ranks}"
        run_ranks(work, ranks, Mine(**folders, **options), str(output))
    same_files(tmp_path / "mined1", tmp_path / "mined2")
    rows = Parts(tmp_path / "mined1").read().to_pylist()
    mined = {row["query_id"]: row["ids"] for row in rows}
    assert any(mined.values())
    arguments = {
        "from": files["queries"],
        "pool": files["pool"],
        "instructions": files["instructions"],
        "images": files["folder"],
        "negatives": tmp_path / "mined1",
        "num-negatives": 2,
        "to": tmp_path / "shards",
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    monkeypatch.setattr(sys, "argv", ["shard.py", "mbeir", *command])
    shard.main()
    samples = Dataset(f"{tmp_path}/shards/*.tar", build=dict)
    records = [json.loads(samples.members(number)["json"]) for number in range(9)]
    for record in records:
        assert record["negative_ids"] == mined.get(record["positive_id"], [])
