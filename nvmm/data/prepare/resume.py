"""Shards that are written in steps, so that a killed call goes on where it was.

to/.train.part/settings.json        what the shards depend on
to/.train.part/train-00000.tar      whole shards
to/.train.part/state.json           how many of them count, and where the samples go on
to/train-00000.tar                  all of them, in the end
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nvmm.data.shards.dataset import existing_shards
from nvmm.io import files

Sample = Mapping[str, bytes | str]
Resumed = Iterator[tuple[Sample, Callable[[], Any]]]
"""Samples, each with a function that returns where the stream goes on behind it, as JSON."""


def from_start(stream: Callable[[], Iterable[Sample]]) -> Callable[[Any], Resumed]:
    """Return a stream that goes on behind n samples by making them again, and leaving them out."""

    def make(state: Any) -> Resumed:
        done = state or 0
        for number, sample in enumerate(itertools.islice(stream(), done, None), done + 1):
            yield sample, partial(int, number)

    return make


def part_folder(folder: str | Path, name: str) -> Path:
    """Return where the shards of a call that has not ended lie."""
    return Path(folder) / f".{name}.part"


def write_steps(
    folder: str | Path,
    name: str,
    make: Callable[[Any], Resumed],
    settings: Mapping[str, Any],
    *,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Write samples to `folder/name-00000.tar`, ..., going on where an earlier call stopped.

    Nothing has its name before all shards are complete; those of the name that are there already
    are replaced then. The bytes are those of a call that was not stopped.

    make: returns the samples behind a state; None: from the beginning.
    settings: what the samples depend on, as JSON.

    Raises ValueError where an earlier call had other settings.
    """
    from webdataset.writer import TarWriter

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    part = part_folder(folder, name)
    part.mkdir(parents=True, exist_ok=True)
    _agree(part, dict(settings))
    with files.lock(part / "lock", required=False):
        state = _read(part / "state.json") or {"shards": 0, "behind": None, "complete": False}
        samples = iter(()) if state["complete"] else make(state["behind"])
        while True:
            group = itertools.islice(samples, samples_per_shard)
            first = next(group, None)
            if first is None:
                break
            with (
                files.publish(part / f"{name}-{state['shards']:05d}.tar") as path,
                open(path, "wb") as file,
                TarWriter(file, encoder=False, mtime=0) as tar,
            ):
                for sample, reached in itertools.chain([first], group):
                    tar.write(dict(sample))
                    behind = reached
                # It speaks of the stream as it is before the next sample is asked for.
                place = json.loads(json.dumps(behind()))
            state = {"shards": state["shards"] + 1, "behind": place, "complete": False}
            files.write(part / "state.json", json.dumps(state))
        if not state["shards"]:
            shutil.rmtree(part)
            return []
        files.write(part / "state.json", json.dumps({**state, "complete": True}))
        return _move(part, Path(folder), name, state["shards"])


def _move(part: Path, folder: Path, name: str, count: int) -> list[Path]:
    """Give complete shards their names. A call that is killed here does the rest when repeated."""
    names = [f"{name}-{number:05d}.tar" for number in range(count)]
    for path in existing_shards(folder, name):
        if path.name not in names:
            path.unlink()
    for shard in names:
        if (part / shard).is_file():
            (part / shard).replace(folder / shard)
    shutil.rmtree(part)
    return [folder / shard for shard in names]


def _agree(part: Path, settings: dict[str, Any]) -> None:
    """Keep the settings that there are shards of; raise ValueError naming those that differ now."""
    path, settings = part / "settings.json", json.loads(json.dumps(settings))
    before = _read(path)
    if before is None or not (part / "state.json").is_file():
        files.write(path, json.dumps(settings, indent=1))
        return
    differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    if differing:
        listed = ", ".join(f"{key}={before.get(key)}" for key in differing)
        raise ValueError(
            f"{part} has shards of an unfinished call with {listed}; give the same, or delete the"
            " folder to start anew"
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
