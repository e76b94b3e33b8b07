"""tools/demo_retrieval.py: its commands are valid, arms differ in their negatives alone, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvmm import studies
from nvmm.commands import shard
from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare.openmoji_tasks import MODALITIES
from tools import demo_retrieval as demo

RUNS = Path("runs/x")


def plan(*seeds: int) -> dict[tuple[str, int], studies.Variant]:
    made = demo.plan(RUNS, seeds, demo.ARMS, 100)
    return {(variant.name, variant.seed): variant for variant in made}


def of_kind(variant: studies.Variant, kind: str) -> list[tuple[str, ...]]:
    """The overrides of a variant's commands `python -m nvmm.KIND`."""
    return [
        command.arguments[4:]
        for command in variant.commands
        if command.arguments[2:4] == ("-m", f"nvmm.{kind}")
    ]


def train(variant: studies.Variant) -> list[dict]:
    configs = [composed("train", overrides) for overrides in of_kind(variant, "train")]
    assert all(check(config) == [] for config in configs)
    return [to_plain(config) for config in configs]


def test_arms_differ_in_their_negatives_alone() -> None:
    made = plan(5)
    [first] = train(made["stage 1", 5])
    last = {arm: train(made[arm, 5])[-1] for arm in demo.ARMS}
    shards = {config["data"]["train"].pop("shards") for config in last.values()}
    shards.add(first["data"]["train"].pop("shards"))
    assert len(shards) == 1 + len(demo.ARMS)
    for config in last.values():
        config["run"] = first["run"]
        assert config["init_from"] is None, "the weights that stage 1 began with"
        assert config == last["mined"]
    assert first["data"]["train"]["build"].pop("num_negatives") == 0
    assert last["mined"]["data"]["train"]["build"].pop("num_negatives") == 1
    assert first == last["mined"] and first["seed"] == 5


def test_mining_follows_stage_1_and_feeds_stage_2() -> None:
    variant = plan(5)["mined", 5]
    folders = [str(command.folder.relative_to(RUNS)) for command in variant.commands[:7]]
    assert folders == [
        "data/in_batch",
        "seed5/stage1",
        "seed5/stage1/train_corpus",
        "seed5/stage1/train_queries",
        "seed5/stage1/train_mine",
        "seed5/data_mined",
        "seed5/mined",
    ]
    mine = of_kind(variant, "job")[2]
    assert {"job.modality_floor=45", "job.range_max=50", "job.seed=5"} <= set(mine)
    assert f"{RUNS}/seed5/stage1/train_mine/rows" in variant.commands[5].arguments


def test_jobs_and_evaluations_compose() -> None:
    given = ["random", "mined"]
    for arm in given:
        variant = plan(5)[arm, 5]
        evaluations = of_kind(variant, "evaluate")
        assert len(evaluations) == 2 * len(MODALITIES)
        assert len({word for e in evaluations for word in e if "output=" in word}) == 8
        for kind, all_of in (("evaluate", evaluations), ("job", of_kind(variant, "job"))):
            for overrides in all_of:
                config = composed(kind, [argument(text) for text in overrides])
                assert check(config, entry=kind) == [], overrides


def test_negatives_of_the_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(5)
    for arm, negatives in (("random", "random.jsonl"), ("siblings", None), ("mined", "rows")):
        commands = [c for c in made[arm, 5].commands if "tools/retrieval_data.py" in c.arguments]
        options = shard.parser().parse_args(commands[-1].arguments[3:])
        assert options.num_negatives == 1
        assert (options.negatives or "").endswith(negatives or "")
        assert bool(options.negatives) == bool(negatives)


def test_longest_chains_start_first_and_share_their_start() -> None:
    made = demo.plan(RUNS, (5, 6), demo.ARMS, 100)
    assert [(v.name, v.seed) for v in made[:2]] == [("mined", 5), ("mined", 6)]
    assert len(made) == 2 * (len(demo.ARMS) + 1)
    of_folder: dict[Path, tuple[str, ...]] = {}
    for command in (command for variant in made for command in variant.commands):
        assert of_folder.setdefault(command.folder, command.arguments) == command.arguments


def test_scores_are_read_and_printed(tmp_path: Path) -> None:
    run = demo.run_folder(tmp_path, 5, demo.STAGE_1)
    names = [f"hit_rate_at_{k}" for k in demo.CUTOFFS]
    names += [f"modality_accuracy_at_{k}" for k in (1, 5)]
    for pool in ("union", "local"):
        for task in demo.TASKS:
            folder = demo.scores_folder(run, task, pool)
            folder.mkdir(parents=True)
            found = dict.fromkeys(names, (task + (pool == "union")) / 16)
            (folder / "metrics.json").write_text(json.dumps({"queries": 9, **found}))
    seed = demo.measure(run)
    assert seed["union/7/hit_rate_at_5"] == 0.5 and seed["local/4/modality_accuracy_at_1"] == 0.25
    other = {key: value + 0.25 for key, value in seed.items()}
    made = demo.tables({"stage 1": [seed, other], "mined": [seed]})
    assert len(made) == 8
    union = {table.title: table for table in made}["image,text to image, union pool"]
    assert list(union.columns) == ["hit@1", "hit@5", "hit@10", "modality@1", "modality@5"]
    assert union.rows[0] == ("stage 1", ["62.5 ± 17.7"] * 5)
    assert union.rows[1] == ("mined", ["50.0"] * 5)
    local = {table.title: table for table in made}["text to image, local pool"]
    assert list(local.columns) == ["hit@1", "hit@5", "hit@10"]
