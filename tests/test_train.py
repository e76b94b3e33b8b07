"""Before training: one run directory and one config for all ranks."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm import train
from nvmm.config import compose
from tests.ranks import run_ranks

UUID = "0b8ee7ad-6f3d-4e5b-9a51-0d0c3a1f2b3c"
LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """Set the launcher's variables; without arguments there is no launcher."""

    def launch(**variables: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    launch()
    return launch


def run(**values: Any) -> dict[str, Any]:
    return {"name": "language/tiny", "id": None, "dir": None, **values}


@pytest.mark.parametrize(
    ("variables", "values", "expected"),
    [
        ({}, {"id": "mine"}, "language/tiny/mine"),
        ({}, {"id": 12}, "language/tiny/12"),
        ({"SLURM_JOB_ID": "77"}, {}, "language/tiny/77"),
        ({"SLURM_JOB_ID": "77"}, {"id": "mine"}, "language/tiny/mine"),
        ({"TORCHELASTIC_RUN_ID": "job3"}, {}, "language/tiny/job3"),
        ({"TORCHELASTIC_RUN_ID": "job3", "SLURM_JOB_ID": "77"}, {}, "language/tiny/77"),
    ],
)
def test_ids_that_survive_a_requeue(
    launched, tmp_path: Path, variables: dict[str, str], values: dict[str, Any], expected: str
) -> None:
    launched(**variables)
    for _ in range(2):
        assert train.run_directory(run(**values), tmp_path) == tmp_path / expected
    assert (tmp_path / expected).is_dir()


def test_a_given_directory_is_used_as_it_is(launched, tmp_path: Path) -> None:
    launched(SLURM_JOB_ID="77")
    assert train.run_directory(run(dir=str(tmp_path / "here"))) == tmp_path / "here"
    assert (tmp_path / "here").is_dir()


@pytest.mark.parametrize("variables", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_without_an_id_every_start_has_a_directory_of_its_own(
    launched, tmp_path: Path, variables: dict[str, str]
) -> None:
    launched(**variables)
    found = {train.run_directory(run(), tmp_path) for _ in range(3)}
    assert len(found) == 3
    assert all(path.parent == tmp_path / "language/tiny" for path in found)


def test_a_restart_by_torchrun_finds_its_directory_again(launched, tmp_path: Path) -> None:
    """torchrun on one machine makes up an id: it names no requeue, but all its restarts."""
    launched(TORCHELASTIC_RUN_ID=UUID)
    first = train.run_directory(run(), tmp_path)
    assert first.name.endswith(UUID[:8])
    assert train.run_directory(run(), tmp_path) == first
    launched(TORCHELASTIC_RUN_ID="9" + UUID[1:])
    assert train.run_directory(run(), tmp_path) != first


def test_two_commands_of_one_job_have_directories_of_their_own(launched, tmp_path: Path) -> None:
    launched(SLURM_JOB_ID="77")
    owners = [{"config": "a" * 64, "sweep_job": None}, {"config": "b" * 64, "sweep_job": None}]
    first, second = (train.run_directory(run(), tmp_path, owner) for owner in owners)
    assert first == tmp_path / "language/tiny/77"
    assert second.parent == first.parent and second.name.startswith("77-")
    # A requeue starts both again, in any order.
    assert [train.run_directory(run(), tmp_path, owner) for owner in owners[::-1]] == [
        second,
        first,
    ]


@pytest.mark.parametrize("values", [{"id": "mine"}, {"dir": "here"}, {}])
def test_jobs_of_a_sweep_have_directories_of_their_own(
    launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    launched(SLURM_JOB_ID="77")
    monkeypatch.chdir(tmp_path)
    found = []
    for job in ("0", "1"):
        monkeypatch.setenv("NVMM_SWEEP_JOB", job)
        found.append(train.run_directory(run(**values), owner={"config": "a", "sweep_job": job}))
    assert [path.name[-2:] for path in found] == ["-0", "-1"]
    assert found[0].name[:-2] == values.get("id", values.get("dir", "77"))


HOLD = """
import sys
from pathlib import Path
from nvmm.io.files import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    lock = str(tmp_path / ".lock")
    command = [sys.executable, "-c", HOLD, lock]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "None\n"
    second = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert second.stdout == f"process {first.pid} of {socket.gethostname()}\n"
    first.kill()
    first.wait()
    third = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert third.stdout == "None\n"


def test_missing_paths_are_named_before_torch(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    shards = [f"{tmp_path}/*.tar", f"{tmp_path}/b-*.tar", "s3://far/*.tar"]
    config = {"tokenizer": {"path": "/nope"}, "init_from": None, "resume": "auto"}
    config["data"] = {"train": {"shards": shards}, "blend": [{"shards": "/nope/{0..3}.tar"}]}
    assert list(map(str, train.missing_paths(config))) == [
        "tokenizer.path=/nope does not exist",
        f"data.train.shards={tmp_path}/b-*.tar matches no file",
    ]
    assert "resume=x does not exist" in map(str, train.missing_paths(config | {"resume": "x"}))


def _agree(
    rank: int, world_size: int, init_method: str, folder: str, configs: list[dict[str, Any]]
) -> dict[str, Any]:
    import torch.distributed as dist

    os.environ["RANK"] = str(rank)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    errors = io.StringIO()
    result: dict[str, Any] = {"code": 0, "directory": None}
    with contextlib.redirect_stderr(errors):
        try:
            train._agree(configs[rank])
            result["directory"] = str(train._agree_on_directory(configs[rank]))
        except SystemExit as stopped:
            result["code"] = stopped.code
    dist.destroy_process_group()
    return {**result, "errors": errors.getvalue()}


def config(**values: Any) -> dict[str, Any]:
    return {"seed": 1, "optim": {"eps": 1e-8}, "run": run(), "resume": "auto", **values}


def test_ranks_share_the_first_ranks_directory(tmp_path: Path) -> None:
    first, second = run_ranks(_agree, 2, str(tmp_path), [config(), config()])
    assert first == second
    assert first["code"] == 0
    assert (tmp_path / first["directory"]).is_dir()
    assert len(list((tmp_path / "runs/language/tiny").iterdir())) == 1


def test_ranks_refuse_configs_that_differ(tmp_path: Path) -> None:
    configs = [config(), config(seed=2, optim={"eps": 1e-6})]
    first, second = run_ranks(_agree, 2, str(tmp_path), configs)
    assert first["code"] == second["code"] == compose.BAD_CONFIG
    assert "ranks [1]" in first["errors"]
    assert "optim.eps=1e-06 is 1e-08 on rank 0" in second["errors"]
    assert not (tmp_path / "runs").exists()


def test_resume_never_refuses_a_directory_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "here/checkpoints/step_00000010").mkdir(parents=True)
    both = [config(resume="never", run=run(dir="here"))] * 2
    first, second = run_ranks(_agree, 2, str(tmp_path), both)
    assert first["code"] == second["code"] == compose.BAD_CONFIG
    assert "resume=never must be auto where here has a checkpoint" in first["errors"]


def test_config_and_overrides_are_written(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    job = compose.Job({"seed": 1, "run": run()}, ["seed=1", "data.train.shards='a/*.tar'"])
    train._write(tmp_path, job)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == job.config
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "overrides.yaml")) == job.overrides
    # A tokenizer's files go with the run.
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    (tmp_path / "words" / "config.json").write_text("{}")
    (tmp_path / "words" / "weights.bin").write_text("x")
    job = compose.Job(job.config | {"tokenizer": {"path": str(tmp_path / "words")}}, job.overrides)
    (tmp_path / "run").mkdir()
    train._write(tmp_path / "run", job)
    kept = {p.name for p in (tmp_path / "run" / "tokenizer").iterdir()}
    assert kept == {"tokenizer.json", "config.json"}
    job = compose.Job({"seed": 1, "run": run()}, ["seed=1", "data.train.shards='a/*.tar'"])
    for name in ("words", "run"):
        shutil.rmtree(tmp_path / name)
    # The same start again changes nothing, and another keeps what was there.
    train._write(tmp_path, job)
    assert len(list(tmp_path.iterdir())) == 2
    for number, seed in enumerate((2, 3), 1):
        before = (tmp_path / "config.yaml").read_text(), (tmp_path / "overrides.yaml").read_text()
        train._write(tmp_path, compose.Job({"seed": seed, "run": run()}, [f"seed={seed}"]))
        names = [f"{name}.{number:04d}.yaml" for name in ("config", "overrides")]
        assert tuple((tmp_path / name).read_text() for name in names) == before


def test_a_damaged_checkpoint_of_a_run_refuses_no_start_from_it(tmp_path: Path) -> None:
    """Loading leaves it aside for the one before it; alone, it is refused."""
    model = {"padded_vocab_size": 512}
    config = {"model": model | {"padded_vocab_size": 64}, "init_from": str(tmp_path)}
    config |= {"run": run(dir=str(tmp_path / "new")), "resume": "auto"}
    folders = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[1] / "state.json").write_text("{")
    assert "no JSON" in str(train.unfit(config)[0])
    state = {"config": {"model": model}}
    record = {"step": 1, "layout": {}, "optimizer": {}, "state": state, "number": 1}
    (folders[0] / "state.json").write_text(json.dumps(record))
    assert [*map(str, train.unfit(config))] == [
        f"model.padded_vocab_size=64 must be 512 for init_from={tmp_path}"
    ]
    record["state"] = {"config": None}
    (folders[0] / "state.json").write_text(json.dumps(record))
    assert train.unfit(config) == []


@pytest.mark.parametrize(
    ("variables", "values"),
    [
        ({}, {"id": "mine"}),
        ({}, {"dir": "there"}),
        ({"NVMM_SWEEP_JOB": "3"}, {"dir": "there"}),
        ({"NVMM_SWEEP_JOB": "3"}, {"id": "mine"}),
        ({"SLURM_JOB_ID": "77"}, {}),
        ({"TORCHELASTIC_RUN_ID": "job3"}, {}),
        ({"TORCHELASTIC_RUN_ID": UUID}, {}),
    ],
)
def test_a_disk_is_asked_where_the_run_goes_on(
    launched,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    values: dict[str, Any],
) -> None:
    """A requeued job's checkpoints are there: they need no room again."""
    monkeypatch.chdir(tmp_path)
    launched()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = {"run": run(**values)}
    owner = {"config": train.configs.digest(config), "sweep_job": variables.get("NVMM_SWEEP_JOB")}
    made = train.run_directory(config["run"], owner=owner)
    assert train._expected_directory(config) == made
    # Another command of the same job has a folder of its own.
    if "SLURM_JOB_ID" in variables:
        other = {"run": run(), "seed": 2}
        owner["config"] = train.configs.digest(other)
        second = train.run_directory(other["run"], owner=owner)
        assert train._expected_directory(other) == second != made


def test_a_requeued_job_is_not_refused_for_checkpoints_that_it_has(
    launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched(SLURM_JOB_ID="77")
    folders = []
    monkeypatch.setattr(train.machine, "disk", lambda config, folder: folders.append(folder) or ())
    train.unfit({"run": run(), "init_from": None, "resume": "auto"})
    assert folders == [tmp_path / "runs" / "language" / "tiny" / "77"]


def test_a_run_goes_on_whatever_became_of_its_start(tmp_path: Path) -> None:
    """Its init_from may have lost its checkpoints by then; a new run is refused."""
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    config = {"init_from": str(tmp_path / "earlier"), "resume": "auto", "model": {}}
    config["run"] = run(dir=str(tmp_path / "run"))
    refusal = [f"init_from={tmp_path / 'earlier'} is neither a checkpoint nor a run directory"]
    refusal[0] += " with one"
    assert [*map(str, train.missing_paths(config))] == refusal
    state = tmp_path / "run" / "checkpoints" / "step_00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    assert train.missing_paths(config) == train.unfit(config) == []
    assert [*map(str, train.missing_paths(config | {"resume": "never"}))] == refusal
