"""Arms of a comparison: chains of commands, each run once, resumed, and measured.

A command keeps `command.json` in its folder: its arguments, whether it is done, and the time,
processor time and memory of every attempt. What is done is not run again; what was interrupted is
started with the same arguments, and `nvmm.train` then goes on from its newest checkpoint. Commands
of several arms in one folder, such as a first stage that they share, run once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

_POLL_SECONDS = 0.5
_SHOWN_LINES = 15
# Where nvmm.report looks for it.
_SCORES = Path("evaluation/heldout/last")


@dataclass(frozen=True)
class Command:
    """One process of this interpreter.

    folder: where `command.json` and `log.txt` are kept; arguments: what follows `python`;
    complete: asked after a clean exit, whether the work is whole (a training that was told to stop
    exits cleanly too).
    """

    folder: Path
    arguments: tuple[str, ...]
    complete: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Arm:
    """Commands that follow each other; `name` and `seed` tell the arm's results apart."""

    name: str
    seed: int
    commands: tuple[Command, ...]


ALONE = (
    "parallel=single",
    "data.validation=null",
    "trainer.validation_interval=null",
    "checkpoint.save_interval=200",
    "checkpoint.keep_last=1",
)
"""Overrides of training in an arm: one process, no validation, the newest checkpoint alone."""


def train(folder: Path, *overrides: str) -> Command:
    """`nvmm.train` with `folder` as its run directory."""
    arguments = ("-W", "ignore", "-m", "nvmm.train", *overrides, f"run.dir={folder}")
    return Command(folder, arguments, partial(_trained, folder))


def evaluate(folder: Path, *overrides: str) -> Command:
    """`nvmm.evaluate` of the newest checkpoint of the run in `folder`, on held-out questions."""
    output = folder / _SCORES
    arguments = ("-W", "ignore", "-m", "nvmm.evaluate", f"checkpoint={folder}", f"output={output}")
    return Command(output, (*arguments, "benchmark=heldout", *overrides))


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an error does, so that `run` stops its commands."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(arms: Sequence[Arm], jobs: int) -> None:
    """Bring every arm to its end, `jobs` commands at a time.

    Raises ValueError when a folder holds a command of other arguments, RuntimeError with the end of
    its log when a command fails or is interrupted; the other commands are then stopped.
    """
    processes = _Processes()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run_arm, arm, processes) for arm in arms]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure(folder: Path) -> dict[str, float]:
    """Numbers of one run directory that was trained and evaluated by `train` and `evaluate`.

    Per second and per step they are medians over the steps, without the first tenth. `cpu_seconds`
    and `peak_memory_bytes` are those of the training process, start-up included.
    """
    summary = json.loads((folder / "summary.json").read_text())
    scores = json.loads((folder / _SCORES / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // 10 :]
    attempts = _read(folder)["attempts"]
    return {
        "exact_match": scores["score"],
        **{f"exact_match_{kind}": part["score"] for kind, part in scores["kinds"].items()},
        "questions": scores["num_samples"],
        "samples": summary["samples_seen"],
        "steps": summary["steps"],
        "num_parameters": summary["num_parameters"],
        "samples_per_second": statistics.median(line["samples_per_second"] for line in lines),
        "tokens_per_sample": statistics.mean(
            line["num_tokens"] / line["num_samples"] for line in lines
        ),
        "tiles_per_sample": statistics.mean(
            line["media"]["image"]["tiles"] / line["num_samples"] for line in lines
        ),
        "cpu_seconds": sum(attempt["cpu_seconds"] for attempt in attempts),
        "seconds": sum(attempt["seconds"] for attempt in attempts),
        "peak_memory_bytes": max(attempt["peak_memory_bytes"] for attempt in attempts),
    }


def save(path: Path, found: Mapping[str, Any], **settings: Any) -> None:
    """Write results with the settings, machine, commit and date that they were made with."""
    from nvmm.training.summary import git_revision, machine

    record = {
        "results": found,
        "settings": settings,
        "machine": machine(),
        "git_revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values, their sample standard deviation: `0.573 ± 0.021`."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(text.ljust(w) for text, w in zip(line, widths, strict=True))} |"
        for line in lines
    )


def _run_arm(arm: Arm, processes: _Processes) -> None:
    for command in arm.commands:
        with _locked(command.folder, processes):
            _run_command(command, f"{arm.name}, seed {arm.seed}", processes)


def _run_command(command: Command, label: str, processes: _Processes) -> None:
    record = _read(command.folder) or {"arguments": list(command.arguments), "attempts": []}
    if record["arguments"] != list(command.arguments):
        raise ValueError(
            f"{command.folder} holds a command of other arguments, {' '.join(record['arguments'])};"
            f" wanted are {' '.join(command.arguments)}: remove the folder or name another"
        )
    if record.get("done"):
        return
    _write(command.folder, record)
    number = len(record["attempts"]) + 1
    print(f"{time.strftime('%H:%M:%S')} {label}: {command.folder}, attempt {number}", flush=True)
    status, attempt = processes.run(command)
    record["attempts"].append(attempt)
    record["done"] = status == 0 and command.complete()
    _write(command.folder, record)
    if not record["done"]:
        log = command.folder / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        ending = f"exit status {status}" if status else "it was told to stop"
        raise RuntimeError("\n  ".join([f"{label}: {ending}; the end of {log}:", *lines]))


class _Processes:
    """The commands that run now; once stopped, none is started any more."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Command) -> tuple[int, dict[str, float]]:
        """Exit status, and what the process and its children took."""
        begin = time.monotonic()
        with (command.folder / "log.txt").open("ab") as log:
            with self._lock:
                self.raise_if_stopped()
                process = subprocess.Popen(
                    [sys.executable, *command.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                self._running.add(process)
            # wait4 gives the resources of this child; Popen.wait would not
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.remove(process)
        return process.returncode, {
            "seconds": time.monotonic() - begin,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "load": os.getloadavg()[1],
        }

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise RuntimeError("stopped before its start")

    def stop(self) -> None:
        """Ask every running command to end; a training then saves where it is."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


@contextlib.contextmanager
def _locked(folder: Path, processes: _Processes) -> Iterator[None]:
    """One command at a time in a folder, over threads and other calls of a tool."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        while True:
            processes.raise_if_stopped()
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL_SECONDS)
        yield


def _trained(folder: Path) -> bool:
    """Whether the training in `folder` took its last step."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    return bool(steps >= config["trainer"]["max_steps"])


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "command.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / "command.json"
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial_path, path)
