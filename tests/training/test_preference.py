"""Preference training of shards with pictures: the reference three ways, bad pairs, resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nvmm.checkpoint.files import find, read_state
from nvmm.data.samples import reference
from nvmm.data.samples.bad_sample import BadSample
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from tests import test_evaluate, tiny
from tests.ranks import run_ranks

BUILDER = "nvmm.data.samples.preference.PreferenceBuilder"
DOUBLE = {"dtype": "fp64", "grad_reduce_in_fp32": False}
"""Steps of Adam take rounding to single precision beyond what is called the same."""
NUM_PAIRS = 9
LONG = "long"
"""The key of a pair that is too long."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preference")
    run_ranks(test_evaluate.save, 1, path)
    return path


@pytest.fixture(scope="module")
def shards(checkpoint: Path) -> str:
    """Eight pairs, half of them with a picture, and one that is too long."""
    from nvmm.data.shards.dataset import write_shards

    words, samples = test_evaluate.WORDS, []
    for number in range(NUM_PAIRS):
        chosen, rejected = words[number : number + 3], words[2 + number : 4 + number]
        record = {
            "prompt": " ".join(words[: 3 + number]),
            "chosen": " ".join(chosen * (40 if number == 5 else 1)),
            "rejected": " ".join(rejected),
            "chosen_reward": number / 4,
            "rejected_reward": 0.5,
        }
        key = LONG if number == 5 else f"k{number}"
        sample: dict[str, Any] = {"__key__": key, "json": json.dumps(record).encode()}
        if number % 2 == 0:
            sample["png"] = test_evaluate.picture(16 + number, 20)
        samples.append(sample)
    write_shards(checkpoint / "pairs", "t", samples, samples_per_shard=4)
    return str(checkpoint / "pairs" / "t-*.tar")


def score(
    rank: int, world: int, init: str, run: Path, shards: str, output: Path, build: dict[str, Any]
) -> dict[str, Any]:
    import os

    import torch.distributed as dist

    from nvmm.inference.restore import restore
    from nvmm.jobs.job import run as run_job
    from nvmm.jobs.score import Score

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    parallel = {"tensor_model_parallel_size": world}
    precision = {"_target_": "nvmm.parallel.setup.Precision", **DOUBLE}
    job = Score(shards, preferences="drop", batch_size=3, part_size=4)
    assert job.build["_target_"] == BUILDER
    build = build | job.build
    model = restore(run, parallel=parallel, precision=precision, build=build)
    settings = {"job": {"_target_": "nvmm.jobs.score.Score", "shards": shards}}
    return run_job(job, settings, model, output)


def train(
    rank: int,
    world: int,
    init: str,
    run: Path,
    shards: str,
    run_dir: Path,
    objective: dict[str, Any],
    build: dict[str, Any] | None = None,
    until: int = 3,
    more: dict[str, Any] | None = None,
    init_from: Path | None = None,
) -> None:
    """Train to a step from a checkpoint's weights, on its own builder's pairs of the shards."""
    from hydra.utils import instantiate

    saved = read_state(find(run))["config"]
    dataset = saved["data"]["train"] | {
        "shards": shards,
        "build": saved["data"]["train"]["build"] | {"_target_": BUILDER, **(build or {})},
    }
    config = tiny.config(saved["model"], learning_rate=1e-3, decay_steps=9) | {
        "objective": objective,
        "precision": DOUBLE,
        "data": {
            "_target_": "nvmm.data.loader.Data",
            "_partial_": True,
            "sequence_length": saved["data"]["sequence_length"],
            "num_workers": 0,
            "train": dataset,
        },
        **(more or {}),
    }
    Parallel().initialize(seed=1234, rank=rank, world_size=world, init_method=init)
    data = instantiate(config["data"], _convert_="all")(
        tokenizer=instantiate(saved["tokenizer"]), seed=1
    )
    run_dir.mkdir(exist_ok=True)
    trainer = build_trainer(
        config,
        data,
        run_dir,
        max_steps=until,
        log=rank == 0,
        global_batch_size=4,
        micro_batch_size=2,
        init_from=str(init_from or run),
    )
    trainer.fit()


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


DPO = {"_target_": "nvmm.objectives.preference.Dpo", "beta": 0.5}
KTO = {"_target_": "nvmm.objectives.kto.Kto"}
METRICS = (
    *("loss", "grad_norm", "margin", "kl", "reward_chosen", "reward_rejected"),
    *("log_probability_chosen", "log_probability_rejected"),
)

KTO_METRICS = [name for name in METRICS if name != "margin"]


def test_the_reference_is_the_same_in_the_step_and_from_the_score_job(
    checkpoint: Path, shards: str, tmp_path: Path
) -> None:
    from nvmm.jobs.parts import Parts

    run, scores = checkpoint / "run", tmp_path / "scores"
    summary = run_ranks(score, 2, run, shards, scores, {})[0]
    assert (summary["rows"], summary["bad"]) == (NUM_PAIRS, 1)
    rows = {row["key"]: row for row in Parts(scores).read().to_pylist()}
    assert "a text of" in rows[LONG]["error"]
    assert all(len(row["tokens"]) == 2 for key, row in rows.items() if key != LONG)
    run_ranks(train, 1, run, shards, tmp_path / "step", DPO)
    given = DPO | {"reference": "data"}
    run_ranks(train, 1, run, shards, tmp_path / "data", given, {"reference": str(scores)})
    adapters = {"lora": tiny.lora(["*decoder.*linear*"])}
    run_ranks(train, 1, run, shards, tmp_path / "lora", DPO, None, 1, adapters)
    kto = KTO | {"beta": 0.5}
    run_ranks(train, 1, run, shards, tmp_path / "kto", kto)
    options = kto | {"reference": "data"}, {"reference": str(scores)}
    run_ranks(train, 1, run, shards, tmp_path / "kto_data", *options)
    for bound, expected, found in zip(
        (1e-5, 2e-4, 2e-4), records(tmp_path / "kto"), records(tmp_path / "kto_data"), strict=True
    ):
        for name in KTO_METRICS:
            assert found[name] == pytest.approx(expected[name], rel=bound, abs=bound), name
    assert records(tmp_path / "kto")[2]["kl"] > 1e-3, "the mismatched texts ran the reference too"
    step, data, [lora] = (records(tmp_path / name) for name in ("step", "data", "lora"))
    # The data's references are in single precision; Adam's steps take that further apart.
    for bound, expected, found in zip((1e-5, 2e-4, 2e-4), step, data, strict=True):
        for name in METRICS:
            assert found[name] == pytest.approx(expected[name], rel=bound, abs=bound), name
    assert step[0]["margin"] == step[0]["kl"] == lora["margin"] == lora["kl"] == 0.0
    assert step[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)
    assert abs(step[2]["margin"]) > 1e-3, "it has learned something"
    for name in ("log_probability_chosen", "log_probability_rejected"):
        assert lora[name] == pytest.approx(step[0][name], rel=1e-5)
    # The pair that is too long is a hole: it adds nothing, and not log 2.
    assert sum(record["datasets"]["train"]["bad"] for record in step[-1:]) == 1
    _refusals(checkpoint, shards, tmp_path, scores)


def _refusals(checkpoint: Path, shards: str, folder: Path, scores: Path) -> None:
    """Scores of other weights, of another builder, of records that have changed, and no scores."""
    from hydra.utils import instantiate

    from nvmm.data.shards.dataset import Dataset
    from nvmm.training.reference import check_scores

    saved = read_state(find(checkpoint / "run"))["config"]
    tokenizer = instantiate(saved["tokenizer"])

    def builder(reference: Path, **changes: Any) -> Any:
        build = saved["data"]["train"]["build"] | {"_target_": BUILDER} | changes
        made = instantiate(build | {"reference": str(reference)}, _convert_="all")
        return made(tokenizer=tokenizer, sequence_length=256)

    with pytest.raises(ValueError, match="was scored with another builder"):
        builder(scores, max_tiles=2)
    with pytest.raises(ValueError, match="is no output of job=score"):
        builder(folder)
    dataset = Dataset(shards, builder(scores))
    assert dataset[0].texts[0].extras.keys() == {"chosen", "reward", "reference"}
    assert dataset.build.blank(-3).text.extras.keys() == dataset[0].texts[0].extras.keys()
    members = dataset.members(0)
    with pytest.raises(BadSample, match=r"has scores of \[.*\] tokens, its answers have"):
        dataset.build(
            members | {"json": members["json"].replace(b'"rejected": "', b'"rejected": "a ')}
        )
    with pytest.raises(BadSample, match="no scores of it: no such key"):
        dataset.build(members | {"__key__": "other"})
    config = {"data": {"train": {"build": {"reference": str(scores)}}}}
    check_scores(config, str(checkpoint / "run"))
    with pytest.raises(ValueError, match=r"scores of a checkpoint of digest \w{12}, and init_from"):
        check_scores(config, str(folder / "step"))
    with pytest.raises(ValueError, match="needs init_from, the checkpoint it is of"):
        check_scores(config, None)
    part = scores / "part-00001.arrow"
    part.write_bytes(part.read_bytes()[:-9])
    reference._read.cache_clear()
    with pytest.raises(ValueError, match=r"part-00001\.arrow is damaged"):
        builder(scores)


def test_a_reference_that_is_not_finite_is_no_score() -> None:
    row = {"log_probabilities": [-1.5, -math.inf], "tokens": [2, 3]}
    assert "[-1.5, -inf] are not finite" in reference._scored(row)
    row["log_probabilities"][1] = -4.0
    assert reference._scored(row) == [(-1.5, 2), (-4.0, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_a_run_that_stops_in_the_middle_goes_on_exactly(
    objective: dict[str, Any], checkpoint: Path, shards: str, tmp_path: Path
) -> None:
    arguments = (checkpoint / "run", shards)
    run_ranks(train, 2, *arguments, tmp_path / "whole", objective, None, 5)
    for until in (2, 5):
        run_ranks(train, 2, *arguments, tmp_path / "parts", objective, None, until)
    names = ("loss", "grad_norm", "reward_chosen", "log_probability_chosen", "kl")
    whole, parts = (
        [[record[name] for name in names] for record in records(tmp_path / folder)]
        for folder in ("whole", "parts")
    )
    assert parts == whole and len(whole) == 5
    assert whole[2:] != [whole[1]] * 3
