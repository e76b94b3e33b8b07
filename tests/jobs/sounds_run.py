"""Shards of small sounds, a CLAP encoder in small, and their jobs on ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.samples.test_sounds import wave

RATE = 4000
FRONT_END = {
    "_target_": "nvmm.data.samples.sounds.FrontEnd",
    **{"rate": RATE, "window": 0.25, "hop": 0.125, "most_windows": 3, "fft": 128, "frame_hop": 20},
    **{"bins": 16, "fmax": 2000.0},
}
LABELS = ("hum", "whistle", "click")


def tone(number: int, seconds: float = 0.3) -> bytes:
    """A sound of its number: two sines and a little noise."""
    t = np.arange(round(seconds * RATE)) / RATE
    rng = np.random.default_rng(number)
    first, second = rng.uniform(100, 1800, 2)
    values = np.sin(2 * np.pi * first * t) + np.sin(2 * np.pi * second * t)
    return wave((0.2 * values + 0.05 * rng.normal(size=len(t))).astype(np.float32), RATE)


def sample(number: int, task: str, file: str | None, data: bytes | None = None) -> dict[str, Any]:
    record = {
        **{"sound": "0.wav", "prompt": "What is heard?", "answer": LABELS[number % 3]},
        **{"task": task, "options": list(LABELS), "kind": task},
        **({"file": file} if file else {}),
    }
    data = tone(number) if data is None else data
    return {"__key__": f"k{number}", "json": json.dumps(record).encode(), "0.wav": data}


def write_sets(folder: Path, bad: dict[int, bytes] | None = None) -> tuple[str, str]:
    """Write train (18 sounds: 12 of task a, of 8 files; 6 of task b) and test (6); return both.

    Test 0 is of a file of train, test 5 of a task that train has not. bad: test number -> sound.
    """
    from nvmm.data.shards.dataset import write_shards

    train = [sample(n, "a", f"{n % 8}.wav") for n in range(12)]
    train += [sample(n, "b", None) for n in range(12, 18)]
    tasks = ["a", "a", "a", "b", "b", "c"]
    test = [
        sample(100 + n, task, "3.wav" if n == 0 else None, (bad or {}).get(n))
        for n, task in enumerate(tasks)
    ]
    write_shards(folder, "train", train, samples_per_shard=7)
    write_shards(folder, "test", test, samples_per_shard=4)
    return str(folder / "train-*.tar"), str(folder / "test-*.tar")


def run(
    rank: int,
    world: int,
    init: str,
    jobs: list[tuple[dict[str, Any], Path]],
    dies: tuple[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Run jobs on this rank; it is killed after it wrote so many parts to a folder of a name."""
    import signal

    from nvmm.jobs.parts import Parts
    from nvmm.parallel import setup

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    write, made = Parts.write, 0

    def write_and_die(self: Parts, part: int, rows: Any) -> None:
        nonlocal made
        write(self, part, rows)
        made += dies is not None and self.folder.name == dies[0]
        if dies is not None and made == dies[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    Parts.write = write_and_die  # type: ignore[method-assign]
    setup.Parallel().initialize(seed=0, rank=rank, world_size=world, init_method=init)
    return [run_one(options, output) for options, output in jobs]


def run_one(options: dict[str, Any], output: Path) -> dict[str, Any]:
    """Run a job on a rank that is initialised."""
    from hydra.utils import instantiate

    summary: dict[str, Any] = instantiate(options, _convert_="all").run(
        {"job": options}, None, output
    )
    return summary


def run_damaged(
    rank: int, world: int, init: str, options: dict[str, Any], output: Path
) -> list[dict[str, bytes] | int]:
    """Run a job, damage a shard and remove another, run it twice more: contents and new rows."""
    run(rank, world, init, [(options, output)])
    found: list[dict[str, bytes] | int] = [contents(output)]
    shards = sorted((output / "shards").glob("*.tar"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    shards[1].unlink()
    for _ in range(2):
        found += [run_one(options, output)["written"], contents(output)]
    return found


def run_refused(
    rank: int, world: int, init: str, jobs: list[dict[str, Any]], output: Path
) -> list[str]:
    """Return what each job is refused with."""
    run(rank, world, init, [])
    found = []
    for options in jobs:
        try:
            found.append(f"ran: {run_one(options, output)}")
        except Exception as error:
            found.append(str(error.__cause__ or error))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the files of an output, without locks and indices."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    hidden = (name for name in names if not any(part.startswith(".") for part in name.parts))
    return {str(name): (folder / name).read_bytes() for name in hidden}


def encoding(shards: str, encoder: Path, **more: Any) -> dict[str, Any]:
    return {
        "_target_": "nvmm.jobs.encode_sounds.EncodeSounds",
        **{"shards": shards, "encoder": str(encoder), "front_end": FRONT_END},
        **{"batch_size": 4, "part_size": 4, **more},
    }


def few_shot(train: str, asked: str, folder: Path, **more: Any) -> dict[str, Any]:
    """folder: has the vectors of both, under their shards' names."""
    name = Path(asked).name.partition("-")[0]
    return {
        "_target_": "nvmm.jobs.few_shot.FewShot",
        **{"shards": asked, "vectors": str(folder / name)},
        **{"train": train, "train_vectors": str(folder / "train")},
        **{"num_samples": 4, "part_size": 2, **more},
    }
