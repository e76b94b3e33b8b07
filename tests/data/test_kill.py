"""Kill -9 at any moment: what a run has trained on is what an uninterrupted run trains on.

A run is killed again and again (in the step, in a loader process, in the save, at a random moment)
and goes on with another number of ranks and of loader processes. What its metrics.jsonl says in
the end, step by step, must be what one undisturbed rank says.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvmm.data.loader import Data
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from tests import tiny as tiny_config
from tests.data.conftest import template as dialect
from tests.data.conftest import vqa
from tests.ranks import run_ranks

GLOBAL_BATCH_SIZE = 4
WINDOW = 24
BAD = 7
"""Of every so many samples of the first dataset one has a damaged json."""


def write(folder: Path) -> list[dict[str, Any]]:
    """Text-only shards of three datasets, and a blend of them."""
    rng = random.Random(0)
    for name, count in (("a", 60), ("b", 23), ("c", 11)):
        samples = []
        for number in range(count):
            answer = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 24)))
            members = {**vqa(answer=answer), "__key__": f"{name}{number:03d}"}
            if name == "a" and number % BAD == 3:
                members["json"] = b"{"
            samples.append(members)
        write_shards(folder, name, samples, samples_per_shard=8)
    entries = (("a", {"weight": 3}), ("b", {"weight": 2}), ("c", {"weight": 1, "epochs": 2}))
    return [{"name": n, "shards": f"{folder}/{n}-*.tar", **more} for n, more in entries]


def make_data(folder: Path, tokenizer: str, workers: int, pack: bool) -> Data:
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    entries = json.loads((folder / "blend.json").read_text())
    return Data(
        64,
        workers,
        Dataset(None, build),
        blend=entries,
        window=WINDOW,
        max_bad_fraction=0.5,
        log_samples=True,
        tokenizer=Tokenizer(tokenizer),
        seed=5,
        pack=pack,
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(trainer: Any, moment: str, steps: int, seconds: float) -> None:
    """Make this process die: `steps` steps from now, at the given moment of a step."""
    done = {"steps": 0, "saves": 0}
    if moment == "anywhere":
        threading.Thread(target=lambda: (time.sleep(seconds), kill()), daemon=True).start()
        return
    train_step, save, publish = trainer.train_step, trainer.save, trainer.checkpoint._publish

    def step(*args: Any, **kwargs: Any) -> Any:
        done["steps"] += 1
        if moment == "step" and done["steps"] > steps:
            kill()
        return train_step(*args, **kwargs)

    def saving(*args: Any) -> Any:
        done["saves"] += 1
        return save(*args)

    def publishing(*args: Any) -> None:
        # the data are written; what makes them a checkpoint is not
        if moment == "save" and done["saves"] > steps:
            kill()
        publish(*args)
        if moment == "saved" and done["saves"] > steps:
            kill()

    trainer.train_step, trainer.save = step, saving
    trainer.checkpoint._publish = publishing


class DeadlyDataset(Dataset):
    """Kills the process that reads its samples (a loader's, where there are any) at the n-th."""

    left = 0

    def members(self, number: int) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            kill()
        return super().members(number)


def fit(
    rank: int,
    world_size: int,
    init: str,
    folder: Path,
    tokenizer: str,
    max_steps: int,
    workers: int,
    pack: bool,
    death: tuple[int, str, int, float] | None,
    global_batch_size: int = GLOBAL_BATCH_SIZE,
) -> list[str]:
    config = tiny_config.config(tiny_config.language()) | {"parallel": {}}
    config["optim"] |= {"decay_steps": 100}
    Parallel().initialize(seed=config["seed"], rank=rank, world_size=world_size, init_method=init)
    data = make_data(folder, tokenizer, workers, pack)
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    ramp = folder / "ramp.json"
    trainer = build_trainer(
        config, data, run_dir, log=rank == 0, max_steps=max_steps,
        global_batch_size=global_batch_size, micro_batch_size=1,
        batch_ramp=json.loads(ramp.read_text()) if ramp.exists() else [],
    )  # fmt: skip
    trainer.checkpoint.save_interval = 2
    if death is not None and death[0] == rank:
        _, moment, steps, seconds = death
        if moment == "loader":
            for component in data.components:
                component.dataset.__class__, component.dataset.left = DeadlyDataset, 3 * steps + 1
        else:
            arm(trainer, moment, steps, seconds)
    trainer.fit()
    return []


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def prepare(tmp_path: Path, name: str, entries: list[dict[str, Any]]) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "blend.json").write_text(json.dumps(entries))
    return folder


def suffer(
    folder: Path,
    tokenizer: str,
    max_steps: int,
    kills: int,
    moments: list[str],
    layouts: list[tuple[int, int]],
    packing: Callable[[int], bool],
) -> None:
    """Start, kill, go on with the next layout; after so many kills go on to the end."""
    rng = random.Random(1)
    for attempt in range(kills + 1):
        world_size, workers = layouts[attempt % len(layouts)]
        death = None
        if attempt < kills:
            moment = moments[attempt % len(moments)]
            saving = moment in ("save", "saved")
            rank = 0 if saving else rng.randrange(world_size)
            death = (rank, moment, rng.randint(0, 0 if saving else 2), rng.uniform(0.0, 1.0))
        arguments = (folder, tokenizer, max_steps, workers, packing(attempt), death)
        if death is None:
            run_ranks(fit, world_size, *arguments, timeout=600)
            return
        with pytest.raises(
            RuntimeError, match=r"died without|killed by|unexpectedly|gloo|onnection"
        ):
            run_ranks(fit, world_size, *arguments, timeout=600)


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine["sample_ids"] == other["sample_ids"], f"step {mine['step']}"
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), f"step {mine['step']}"
        assert mine["datasets"] == other["datasets"], f"step {mine['step']}"


def assert_consumed_whole_windows(folder: Path, tokenizer: str) -> None:
    """All windows but the open one hold exactly the blend's samples, whatever packed them."""
    seen = [i for record in records(folder) for i in record["sample_ids"]]
    seen = [-2 - i if i < -1 else i for i in seen]
    assert max(Counter(seen).values()) == 1, "repeated"
    whole = len(seen) // WINDOW * WINDOW
    order = make_data(folder, tokenizer, 0, pack=False).order(1)
    slots = [i for k in range(whole + WINDOW) for pack in order.batch(k) for i in pack.samples]
    assert set(slots[:whole]) <= set(seen), "lost"
    assert set(seen) <= set(slots)


def prepare_pair(
    tmp_path: Path, tokenizer: str, steps: int, pack: bool, ramp: tuple[dict[str, int], ...] = ()
) -> tuple[Path, list[Any]]:
    """The folder of a run to be killed, and the records of one that was left in peace."""
    entries = write(tmp_path / "shards")
    peace, war = prepare(tmp_path, "peace", entries), prepare(tmp_path, "war", entries)
    for folder in (peace, war):
        (folder / "ramp.json").write_text(json.dumps(ramp))
    run_ranks(fit, 1, peace, tokenizer, steps, 0, pack, None)
    return war, records(peace)


def test_four_kills_change_nothing(tmp_path: Path, tiny: Tokenizer) -> None:
    path, steps = tiny.path, 12
    war, expected = prepare_pair(tmp_path, path, steps, pack=False)
    moments = ["step", "save", "loader", "saved"]
    layouts = [(2, 0), (1, 0), (2, 1), (1, 0)]
    suffer(war, path, steps, 4, moments, layouts, lambda attempt: False)
    assert_same_run(records(war), expected)
    datasets = expected[-1]["datasets"]
    assert sum(counts["samples"] + counts["bad"] for counts in datasets.values()) == 4 * steps
    bad = [-2 - i for record in expected for i in record["sample_ids"] if i < -1]
    assert {i % BAD for i in bad} == {3} and len(bad) == datasets["a"]["bad"] > 0


def test_batch_size_and_packing_may_change(tmp_path: Path, tiny: Tokenizer) -> None:
    """Through trainer and checkpoint: every part reads on where the one before it ended."""
    folder = prepare(tmp_path, "changing", write(tmp_path / "shards"))
    expected: list[list[int]] = []
    position = None
    for steps, pack, size in ((3, False, 4), (5, True, 2), (7, False, 3)):
        run_ranks(fit, 1, folder, tiny.path, steps, 0, pack, None, size)
        order = make_data(folder, tiny.path, 0, pack).order(size, position)
        for step in range(len(expected), steps):
            expected.append(sorted(i for p in order.batch(step) for i in p.samples))
        position = order.position(steps)
    found = [record["sample_ids"] for record in records(folder)]
    assert [sorted(-2 - i if i < -1 else i for i in ids) for ids in found] == expected
    assert len(expected[0]) == 4 and len(expected[3]) > 2, "rows of several samples"
    assert_consumed_whole_windows(folder, tiny.path)


def test_a_run_of_bad_samples_alone_stops_and_says_why(tmp_path: Path, tiny: Tokenizer) -> None:
    write_shards(tmp_path, "a", [{"__key__": f"{n:02d}", "json": b'{"messages": [{}]}'}
                                 for n in range(30)])  # fmt: skip
    entries = [{"name": "a", "shards": f"{tmp_path}/a-*.tar"}]
    folder = prepare(tmp_path, "bad", entries)
    with pytest.raises(RuntimeError, match=r"12 of 12 samples .* the last is .*:\d\d: role None"):
        run_ranks(fit, 1, folder, tiny.path, 9, 0, False, None)


def die_with_loaders(rank: int, world_size: int, init: str, folder: Path, tokenizer: str) -> None:
    data = make_data(folder, tokenizer, 2, pack=False)
    batches = data.batches(split="train", global_batch_size=4, micro_batch_size=1)
    next(batches)
    loaders = [p.pid for p in psutil.Process().children(recursive=True)]
    (folder / "loaders.json").write_text(json.dumps(loaders))
    kill()


def test_loaders_do_not_outlive_a_killed_rank(tmp_path: Path, tiny: Tokenizer) -> None:
    folder = prepare(tmp_path, "war", write(tmp_path / "shards"))
    with pytest.raises(RuntimeError, match="died without"):
        run_ranks(die_with_loaders, 1, folder, tiny.path)
    left = json.loads((folder / "loaders.json").read_text())
    assert len(left) >= 2
    end = time.monotonic() + 120
    while any(map(psutil.pid_exists, left)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [pid for pid in left if psutil.pid_exists(pid)]


MOMENTS = ["step", "anywhere", "loader", "save", "anywhere", "saved", "anywhere"]
LAYOUTS = [(2, 0), (1, 3), (4, 0), (1, 0), (2, 3), (4, 1)]
"""Ranks and loader processes of each; their number and that of the moments have no divisor."""


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_thirty_kills_change_nothing(tmp_path: Path, tiny: Tokenizer, pack: bool) -> None:
    path, steps = tiny.path, 120
    war, expected = prepare_pair(tmp_path, path, steps, pack)
    suffer(war, path, steps, 30, MOMENTS, LAYOUTS, lambda attempt: pack)
    assert_same_run(records(war), expected)


@pytest.mark.slow
def test_kills_within_a_batch_ramp(tmp_path: Path, tiny: Tokenizer) -> None:
    ramp = ({"global_batch_size": 12, "steps": 8}, {"global_batch_size": 8, "steps": 9})
    war, expected = prepare_pair(tmp_path, tiny.path, 30, False, ramp)
    assert [len(expected[step]["sample_ids"]) for step in (7, 8, 16, 17)] == [12, 8, 8, 4]
    suffer(war, tiny.path, 30, 10, MOMENTS, LAYOUTS, lambda attempt: False)
    assert_same_run(records(war), expected)


@pytest.mark.slow
def test_kills_with_packing_switched_on_and_off(tmp_path: Path, tiny: Tokenizer) -> None:
    war = prepare(tmp_path, "war", write(tmp_path / "shards"))
    suffer(war, tiny.path, 60, 12, MOMENTS, LAYOUTS, lambda attempt: attempt % 2 == 1)
    assert [record["step"] for record in records(war)] == list(range(1, 61))
    assert_consumed_whole_windows(war, tiny.path)
