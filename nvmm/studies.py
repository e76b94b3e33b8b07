"""Variants of a comparison: chains of commands, each run once, resumed, and measured.

A command keeps `command.json` in its folder: its arguments, whether it is done, and the time,
processor time and memory of every attempt. A command that is done is not run again; one that was
interrupted is started with the same arguments, and `nvmm.train` then goes on from its newest
checkpoint. Commands of several variants in one folder, such as a first stage that they share, run
once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nvmm.io.files import lock, write

_Steps = TypeVar("_Steps")
_POLL_SECONDS = 0.5
_SHOWN_LINES = 15
# nvmm.report looks for scores there.
_SCORES = Path("evaluation/heldout/last")


@dataclass(frozen=True)
class Command:
    """One process of this interpreter.

    folder: folder of `command.json` and `log.txt`. arguments: the words after `python`. complete:
    returns, after a clean exit, whether the work is done; a training that was told to stop exits
    cleanly too.
    """

    folder: Path
    arguments: tuple[str, ...]
    complete: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Variant:
    """A variant of a comparison: commands that follow each other, under a name and a seed."""

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
"""Overrides of training in a variant: one process, no validation, the newest checkpoint alone."""


def command(folder: Path, *arguments: str) -> Command:
    """Return a command without warnings, whose record is in `folder`."""
    return Command(folder, ("-W", "ignore", *arguments))


def train(folder: Path, *overrides: str) -> Command:
    """Return the command `nvmm.train` with `folder` as its run directory."""
    arguments = ("-m", "nvmm.train", *overrides, f"run.dir={folder}")
    return replace(command(folder, *arguments), complete=partial(_trained, folder))


def evaluate(folder: Path, *overrides: str) -> Command:
    """Return the command `nvmm.evaluate` of `folder`'s newest checkpoint, on held-out questions."""
    output = folder / _SCORES
    arguments = ("-m", "nvmm.evaluate", f"checkpoint={folder}", f"output={output}")
    return command(output, *arguments, "benchmark=heldout", *overrides)


def parser(
    description: str | None, steps: type, to: Path, *, seeds: int | None = None, jobs: int = 2
) -> argparse.ArgumentParser:
    """Return the options of a study: --NAME-steps of each stage, --to, and with seeds --seeds and
    --jobs.

    steps: a dataclass with a field a stage, None for the experiment's own number; `steps_given`
        reads it.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(steps):
        made.add_argument(f"--{field.name.replace('_', '-')}-steps", type=int)
    if seeds is not None:
        made.add_argument("--seeds", type=at_least_one, default=seeds, help=f"how many ({seeds})")
        made.add_argument("--jobs", type=at_least_one, default=jobs, help="processes at a time")
    made.add_argument("--to", type=Path, default=to, help=f"its folder ({to})")
    return made


def at_least_one(text: str) -> int:
    """Return a number of the command line; argparse refuses one below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def steps_given(steps: type[_Steps], options: argparse.Namespace) -> _Steps:
    """Return the stages' numbers of steps, as `parser` has read them."""
    names: Mapping[str, Any] = steps.__dataclass_fields__  # type: ignore[attr-defined]
    return steps(**{name: getattr(options, f"{name}_steps") for name in names})


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an error does, so that `run` stops its commands."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(variants: Sequence[Variant], jobs: int) -> None:
    """Run every variant to its end, `jobs` commands at a time.

    Raises ValueError when a folder holds a command of other arguments, RuntimeError with the end of
    its log when a command fails or is interrupted; the other commands are then stopped.
    """
    processes = _Processes()

    def run_variant(variant: Variant) -> None:
        for command in variant.commands:
            with _locked(command.folder, processes):
                _run_command(command, f"{variant.name}, seed {variant.seed}", processes)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_variant, variant) for variant in variants]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure(folder: Path) -> dict[str, float]:
    """Return the numbers of a run directory that was trained and evaluated by these commands.

    Rates are medians, and numbers per sample means, over the steps without the first tenth.
    `cpu_seconds` and `peak_memory_bytes` are those of the training process, start-up included.
    """
    summary = json.loads((folder / "summary.json").read_text())
    scores = json.loads((folder / _SCORES / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // 10 :]  # The first steps warm up.
    attempts = _read(folder)["attempts"]
    return {
        "exact_match": scores["score"],
        **{f"exact_match_{kind}": group["score"] for kind, group in scores["kinds"].items()},
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


def spent(folder: Path) -> dict[str, float]:
    """Return the seconds and processor seconds of all commands below a folder, together."""
    commands = [json.loads(path.read_text()) for path in folder.rglob("command.json")]
    attempts = [attempt for command in commands for attempt in command["attempts"]]
    return {name: sum(attempt[name] for attempt in attempts) for name in ("seconds", "cpu_seconds")}


def save(path: Path, results: Mapping[str, Any], **settings: Any) -> None:
    """Write results with the settings, machine, commit and date that they were made with."""
    from nvmm.training.summary import machine
    from nvmm.version import revision

    record = {
        "results": results,
        "settings": settings,
        "machine": machine(),
        "git_revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write(path, json.dumps(record, indent=2) + "\n")


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean and, of several values, the sample standard deviation: `0.573 ± 0.021`."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(text.ljust(w) for text, w in zip(line, widths, strict=True))} |"
        for line in lines
    )


def _run_command(command: Command, label: str, processes: _Processes) -> None:
    """Run a command unless it is done, and keep its record; the caller holds its folder's lock."""
    # 1. Refuse a folder that belongs to another command, and leave one that is done.
    record = _read(command.folder) or {"arguments": list(command.arguments), "attempts": []}
    if record["arguments"] != list(command.arguments):
        raise ValueError(
            f"{command.folder} holds a command of other arguments, {' '.join(record['arguments'])};"
            f" wanted are {' '.join(command.arguments)}: remove the folder or name another"
        )
    if record.get("done"):
        return
    # 2. The record is written before the start, so that an interrupted command keeps its folder.
    path = command.folder / "command.json"
    write(path, json.dumps(record, indent=2) + "\n")
    number = len(record["attempts"]) + 1
    print(f"{time.strftime('%H:%M:%S')} {label}: {command.folder}, attempt {number}", flush=True)
    status, attempt = processes.run(command)
    record["attempts"].append(attempt)
    record["done"] = status == 0 and command.complete()
    write(path, json.dumps(record, indent=2) + "\n")
    # 3. A failure shows the end of its log.
    if not record["done"]:
        log = command.folder / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        ending = f"exit status {status}" if status else "it was told to stop"
        raise RuntimeError("\n  ".join([f"{label}: {ending}; the end of {log}:", *lines]))


class _Processes:
    """The processes that run now; once stopped, none is started any more."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Command) -> tuple[int, dict[str, float]]:
        """Run a command; return its exit status, and the resources that it and its children used.

        Raises RuntimeError when processes were stopped before.
        """
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
            # wait4 gives the resources of this child, which Popen.wait does not.
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
    """Allow one command at a time in a folder, over threads and other calls of a tool."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Polling, unlike waiting, sees that the others were stopped.
        while True:
            processes.raise_if_stopped()
            with contextlib.suppress(BlockingIOError):
                stack.enter_context(lock(folder / "lock", wait=False))
                break
            time.sleep(_POLL_SECONDS)
        yield


def _trained(folder: Path) -> bool:
    """Return whether the training in `folder` took its last step."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    return bool(steps >= config["trainer"]["max_steps"])


def _read(folder: Path) -> dict[str, Any]:
    """Return the record of a folder's command, empty where none has been started."""
    path = folder / "command.json"
    return json.loads(path.read_text()) if path.exists() else {}
