"""Completion as a shell does it: a line that ends in Tab, and what the shell would put there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = """
eval "$(nvmm completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
_nvmm
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH that has the console command."""
    script = tmp_path / "bin" / "nvmm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m nvmm "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


def completed(path: str, line: str, cwd: Path = ROOT) -> list[str]:
    """What bash would put in the place of the last word, behind its last =."""
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", ASK, "bash", line]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_keys(path: str) -> None:
    assert completed(path, "nvmm ver") == ["verify-parallel"]
    # Bash breaks words at = by itself: what stands before it is not repeated.
    assert completed(path, "nvmm train experiment=nvlm_d/sft_7b") == [
        "nvlm_d/sft_7b",
        "nvlm_d/sft_7b_lora",
    ]
    assert completed(path, "nvmm train experiment=nvlm_d/sft_7b trainer.max_s") == [
        "trainer.max_steps="
    ]


@pytest.mark.slow
def test_bash_completes_parsers_and_a_users_groups(path: str, tmp_path: Path) -> None:
    assert completed(path, "nvmm convert adapter --trust") == ["--trust-config"]
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    (tmp_path / "conf" / "optim" / "adaptive.yaml").write_text("defaults: [adamw]\n")
    line = "nvmm train --config-dir conf optim=ad"
    assert completed(path, line, tmp_path) == ["adamw", "adaptive"]
    assert completed(path, "nvmm report ") == []


ASK_ZSH = """
autoload -Uz compinit && compinit -u -D
eval "$(nvmm completion zsh)"
[[ $_comps[nvmm] == _nvmm ]] || exit 1
compadd() { print -l -- "$@" }
words=(nvmm train experiment=nvlm_d/sft_7b) CURRENT=3
_nvmm
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_completes_whole_words(path: str) -> None:
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["zsh", "-fc", ASK_ZSH], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    words = [f"experiment=nvlm_d/sft_7b{end}" for end in ("", "_lora")]
    assert done.stdout.split() == ["-Q", "-S", "--", *words]
