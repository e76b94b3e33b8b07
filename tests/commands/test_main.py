"""The console command: what it lists, refuses and calls, and what it does not import for that."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvmm import __version__
from nvmm.commands.main import COMMANDS

ROOT = Path(__file__).parents[2]


def nvmm(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "nvmm", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(arguments: tuple[str, ...]) -> None:
    done = nvmm(*arguments)
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines() if line[:2] == "  "} == {*COMMANDS}


@pytest.mark.parametrize("arguments", [("--version",), ("train", "--version")])
def test_version_is_ours(arguments: tuple[str, ...]) -> None:
    done = nvmm(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith(f"nvmm {__version__} (")
    assert "megatron-core 0.16" in done.stdout and "torch 2." in done.stdout


def test_an_unknown_command_names_the_nearest() -> None:
    done = nvmm("inspct")
    assert done.returncode == 2
    assert done.stderr == (
        "nvmm: inspct is no command; did you mean inspect? (nvmm --help lists them)\n"
    )


def test_help_and_version_import_nothing_heavy() -> None:
    code = "from nvmm.commands import main; from nvmm import version; main.help_text()"
    code += "; version.line(); import sys; print(set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "megatron"} & ast.literal_eval(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"train", "torchrun"}))
def test_every_command_has_help_of_its_own(command: str) -> None:
    done = nvmm(command, "--help")
    assert done.returncode == 0, done.stderr
    assert command in done.stdout or f"nvmm.{command}" in done.stdout


def test_a_command_sees_a_package_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "losses.py").write_text(
        "class Focal:\n    def __init__(self, gamma: float): ...\n"
    )
    arguments = ("experiment=language/tiny", "objective._target_=mylab.losses.Focal")
    done = nvmm("train", *arguments, "--cfg", "job", cwd=tmp_path)
    assert "mylab.losses.Focal" in done.stdout
    done = nvmm("train", *arguments, "+objective.gama=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "objective.gamma" in done.stderr and "no module" not in done.stderr
    done = nvmm("verify-parallel", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "objective.gamma" in done.stderr and "no module" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "command"),
    [("retrieval_data.py", "shard"), ("convert.py", "convert"), ("memory.py", "plan")],
)
def test_the_old_names_work(script: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / script, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith(f"usage: nvmm {command} ")


def test_jobs_of_a_sweep_find_the_users_configs_and_package(tmp_path: Path) -> None:
    """Options may stand between overrides, and each job gets them."""
    (tmp_path / "mylab.py").write_text("class Focal:\n    def __init__(self): ...\n")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    config = "# @package _global_\ndefaults: [/experiment/language/tiny]\n"
    config += "objective: {_target_: mylab.Focal}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(config)
    given = ("experiment=mine", "--config-dir", "conf", "tokenizer.path=/nope", "-m", "seed=1,2")
    done = nvmm("train", *given, "data.train.shards=x.tar", cwd=tmp_path)
    assert done.returncode == 2
    assert "experiment=mine" not in done.stderr and "mylab" not in done.stderr
    assert "tokenizer.path=/nope does not exist" in done.stderr
