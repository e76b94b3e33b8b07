"""The command that goes on with a run is the one that was given."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from nvmm.training import again
from nvmm.training.again import resume_command

ROOT = Path(__file__).parents[2]
RUN = Path("runs/mine/1")
TORCHRUN = "torchrun --nnodes 2 --node-rank 0 --rdzv-backend c10d --rdzv-endpoint a:1 -m nvmm train"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "NVMM_COMMAND", "NVMM_SWEEP_JOB"):
        monkeypatch.delenv(name, raising=False)


def as_given(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", list(words))


def test_a_console_command_keeps_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    as_given(monkeypatch, "/venv/bin/python", "/venv/bin/nvmm", "train", "--config-dir", "conf")
    sys.orig_argv += ["experiment=mine/a", "data.train.shards=a b.tar", "resume=never"]
    overrides = ["--config-dir=conf", *sys.orig_argv[5:]]
    assert shlex.split(resume_command(overrides, RUN, 1)) == [
        *("nvmm", "train", "--config-dir", "conf"),
        *("experiment=mine/a", "data.train.shards=a b.tar", "run.dir=runs/mine/1"),
    ]


@pytest.mark.parametrize("named", ["run.id=first", "run.dir=there"])
def test_a_named_run_has_its_very_command(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_given(monkeypatch, "python", "-m", "nvmm.train", "experiment=a/b", named)
    assert (
        resume_command(["experiment=a/b", named], RUN, 1)
        == f"python -m nvmm.train experiment=a/b {named}"
    )
    # A job of a sweep has a folder that its number ends.
    monkeypatch.setenv("NVMM_SWEEP_JOB", "3")
    expected = "python -m nvmm.train experiment=a/b run.dir=runs/mine/1"
    assert resume_command(["experiment=a/b", named], RUN, 1) == expected


def test_under_torchrun_it_is_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two nodes too: all that torchrun was told is in it."""

    class Process:
        words: ClassVar[list[str]] = [
            "/venv/bin/python",
            f"/venv/bin/{TORCHRUN.split()[0]}",
            *TORCHRUN.split()[1:],
            "seed=1",
        ]

        def parent(self) -> Process:
            return self

        def cmdline(self) -> list[str]:
            return self.words

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(again.psutil, "Process", Process)
    assert resume_command(["seed=1"], RUN, 16) == f"{TORCHRUN} seed=1 run.dir=runs/mine/1"
    Process.words = ["sh", "-c", "something else"]
    made = "torchrun --standalone --nproc-per-node 16 -m nvmm train seed=1 run.dir=runs/mine/1"
    assert resume_command(["seed=1"], RUN, 16) == made


def test_a_launcher_says_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVMM_COMMAND", "sbatch --nodes 2 launchers/slurm.sh experiment=a/b ")
    expected = "sbatch --nodes 2 launchers/slurm.sh experiment=a/b run.dir=runs/mine/1"
    assert resume_command(["experiment=a/b"], RUN, 16) == expected


def test_elsewhere_a_command_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    as_given(monkeypatch, "python", "-m", "pytest")
    assert resume_command(["seed=1"], RUN, 1) == "nvmm train seed=1 run.dir=runs/mine/1"


SAYS = "from nvmm.training.again import given; print(given(['seed=1']))"


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_read_from_its_agents(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SAYS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        *("torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two", str(script), "seed=1"),
    ]
    command = [sys.executable, Path(sys.executable).with_name("torchrun"), *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [node.communicate()[0] for node in nodes]
    assert outputs == [f"{words}\n"] * 2
