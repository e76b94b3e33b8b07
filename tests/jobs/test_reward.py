"""Rewards of the answers in shards: stopped and gone on with, equal to the model's scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.shards.dataset import write_shards
from nvmm.jobs.parts import Parts
from tests import reward_run
from tests.jobs.test_job import WHOLE, interrupted_equals_whole, job
from tests.ranks import run_ranks

TARGET = {"_target_": "nvmm.jobs.reward.Reward", "weights": [1.0, -2.0], "batch_size": 2}


def shards(folder: Path, records: list[dict[str, Any]]) -> str:
    samples = [
        {"__key__": f"k{number}", "json": json.dumps(record).encode()}
        for number, record in enumerate(records)
    ]
    write_shards(folder, "t", samples, samples_per_shard=3)
    return str(folder / "t-*.tar")


def test_a_stopped_scoring_goes_on(tmp_path: Path) -> None:
    """Without labels; a record without an answer, and one that is too long, have an error."""
    config = reward_run.config_of(tmp_path / "tokenizer")
    [expected] = run_ranks(reward_run.save, 1, {}, config, tmp_path / "run", reward_run.TURNS)
    asked = [(turns[0].text, turns[1].text) for turns in reward_run.TURNS]
    records: list[dict[str, Any]] = [
        {"prompt": asked[n % 2][0], "response": asked[n % 2][1]} for n in range(8)
    ]
    records[4] = {"prompt": "What is it?"}
    records[6]["prompt"] *= 50
    options = TARGET | {"shards": shards(tmp_path, records), "part_size": 2}
    rows = interrupted_equals_whole(tmp_path / "run", options, tmp_path).read().to_pylist()
    assert [row["key"] for row in rows] == [f"k{n}" for n in range(8)]
    for number, row in enumerate(rows):
        if number in (4, 6):
            assert row["scores"] is None and row["error"]
            continue
        assert row["error"] is None
        [scores] = row["scores"]
        assert scores == pytest.approx(expected[number % 2].tolist(), abs=1e-5)
        assert row["rewards"] == pytest.approx([scores[0] - 2 * scores[1]])


def test_a_pair_has_two_scores(tmp_path: Path) -> None:
    build = {"_target_": "nvmm.data.samples.preference.PreferenceBuilder"}
    config = reward_run.config_of(tmp_path / "tokenizer", **build)
    for key in ("attributes", "end"):
        del config["data"]["train"]["build"][key]
    [expected] = run_ranks(reward_run.save, 1, {}, config, tmp_path / "run", reward_run.TURNS)
    prompt, answer = reward_run.TURNS[0][0].text, reward_run.TURNS[0][1].text
    record = {"prompt": prompt, "chosen": answer, "rejected": "It sings."}
    options = TARGET | {"shards": shards(tmp_path, [record])}
    [summary] = run_ranks(job, 1, tmp_path / "run", options, tmp_path / "out", {}, WHOLE)
    assert (summary["rows"], summary["bad"]) == (1, 0)
    [row] = Parts(tmp_path / "out").read().to_pylist()
    assert row["scores"][0] == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert len(row["scores"]) == len(row["rewards"]) == 2
    assert row["rewards"][0] != row["rewards"][1]
