"""The command that goes on with a run: the one that was given, with the run's directory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from nvmm.parallel import environment


def resume_command(overrides: Sequence[str], run_dir: Path, world_size: int) -> str:
    """Return the command that resumes a run, quoted for a shell.

    overrides: those of the run; by them its command is known. `run.id` and `run.dir`
    lead back to the directory by themselves; other commands get its `run.dir`. On several nodes it
    is the command of the first one.
    """
    words = given(overrides) or _made(overrides, world_size)
    words = [word for word in words if not word.startswith("resume=")]
    named = any(word.startswith(("run.id=", "run.dir=")) for word in words)
    if not named or environment.sweep_job() is not None:
        words = [word for word in words if not word.startswith(("run.id=", "run.dir="))]
        words.append(f"run.dir={run_dir}")
    return shlex.join(words)


def given(overrides: Sequence[str]) -> list[str] | None:
    """Return the words of the command that started the ranks; None where they cannot be told.

    Under torchrun that is the command of its agent, this process's parent. A launcher that starts
    torchrun by itself gives its own.
    """
    if (text := environment.launcher_command()) is not None:
        return shlex.split(text)
    if environment.under_torchrun():
        try:
            words = psutil.Process().parent().cmdline()
        except (psutil.Error, AttributeError):
            return None
    else:
        words = list(sys.orig_argv)
    # A console script is known by its name; the interpreter before it is its own affair.
    if len(words) > 1 and Path(words[1]).name in ("nvmm", "torchrun"):
        words = [Path(words[1]).name, *words[2:]]
    of_task = [text for text in overrides if not text.startswith("-")]
    return words if of_task and set(of_task) <= set(words) else None


def _made(overrides: Sequence[str], world_size: int) -> list[str]:
    """Return a command of this many ranks on one machine."""
    if world_size == 1:
        return ["nvmm", "train", *overrides]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(world_size)]
    return [*launcher, "-m", "nvmm", "train", *overrides]
