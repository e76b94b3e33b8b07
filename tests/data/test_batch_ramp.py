"""A run whose batches grow: the plain run's samples, and the same bits over a resume anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.config.batch_sizes import BatchSizes
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from nvmm.proof.miniature import double
from tests import tiny as tiny_config
from tests.data.test_kill import make_data, prepare, records, write
from tests.ranks import run_ranks

RAMP = [{"global_batch_size": 2, "steps": 3}, {"global_batch_size": 4, "tokens": 2 * 4 * 64}]
"""Steps 0 to 2, then 3 and 4 (rows of 64 tokens), then 8 samples a step."""
SIZES = [2, 2, 2, 4, 4, 8, 8, 8]
STEPS = len(SIZES)
TP2 = {"tensor_model_parallel_size": 2}


def fit(
    rank: int,
    world_size: int,
    init: str,
    folder: Path,
    tokenizer: str,
    max_steps: int,
    layout: dict[str, Any],
    pack: bool = False,
) -> list[str]:
    config = double(tiny_config.config(tiny_config.language())) | {"parallel": layout}
    config["optim"] |= {"warmup_steps": 0, "warmup_tokens": 256, "decay_tokens": 2048}
    Parallel(**layout).initialize(
        seed=config["seed"], rank=rank, world_size=world_size, init_method=init
    )
    data = make_data(folder, tokenizer, 0, pack)
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    trainer = build_trainer(
        config, data, run_dir, log=rank == 0, max_steps=max_steps,
        global_batch_size=8, batch_ramp=RAMP, micro_batch_size=1,
    )  # fmt: skip
    trainer.fit()
    return []


def weights(folder: Path) -> Any:
    return json.loads((folder / f"run/checkpoints/step_{STEPS:08d}/weights.json").read_text())


@pytest.mark.parametrize("pack", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumes_in_every_stage_have_the_bits_of_one_run(
    tmp_path: Path, tiny: Tokenizer, pack: bool
) -> None:
    entries = write(tmp_path / "shards")
    whole, parts = prepare(tmp_path, "whole", entries), prepare(tmp_path, "parts", entries)
    run_ranks(fit, 1, whole, tiny.path, STEPS, {}, pack)
    # 1. Sample k comes where it does with one batch size, and steps have the ramp's sizes.
    order = make_data(whole, tiny.path, 0, pack).order(1)
    place = 0
    for record, size in zip(records(whole), SIZES, strict=True):
        packs = [pack for k in range(place, place + size) for pack in order.batch(k)]
        ids = [-2 - i if i < -1 else i for i in record["sample_ids"]]
        assert sorted(ids) == sorted(i for pack in packs for i in pack.samples)
        place += size
    # 2. The schedule runs over tokens: 128 a step, then 256, 512.
    rates = [record["learning_rate"] / 1e-3 for record in records(whole)]
    assert rates[:2] == [0.5, 1.0]
    # 3. Stops in the middle of each stage.
    for stop in (1, 4, 6, STEPS) if not pack else (4, STEPS):
        run_ranks(fit, 1, parts, tiny.path, stop, {}, pack)
    for name in ("loss", "grad_norm", "learning_rate", "sample_ids", "datasets"):
        assert [r[name] for r in records(parts)] == [r[name] for r in records(whole)], name
    assert weights(parts) == weights(whole)


def test_a_ramp_goes_on_at_other_layouts(tmp_path: Path, tiny: Tokenizer) -> None:
    entries = write(tmp_path / "shards")
    whole, parts = prepare(tmp_path, "whole", entries), prepare(tmp_path, "parts", entries)
    run_ranks(fit, 1, whole, tiny.path, STEPS, {})
    for stop, world_size, layout in ((2, 2, {}), (4, 2, TP2), (STEPS, 1, {})):
        run_ranks(fit, world_size, parts, tiny.path, stop, layout)
    for found, expected in zip(records(parts), records(whole), strict=True):
        assert found["sample_ids"] == expected["sample_ids"]
        assert found["learning_rate"] == expected["learning_rate"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


def refused(rank: int, world_size: int, init: str, folder: Path, tokenizer: str) -> str:
    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    config = tiny_config.config(tiny_config.language()) | {"parallel": {}}
    data = make_data(folder, tokenizer, 0, False)
    sizes = BatchSizes.read(8, [{"global_batch_size": 3, "steps": 1}], 64)
    with pytest.raises(ValueError, match=r"trainer\.batch_ramp\[0\]\.global_batch_size=3 must be"):
        data.batches(split="train", global_batch_size=sizes, micro_batch_size=1, size=2)
    try:
        build_trainer(config, data, folder, batch_ramp=[{"global_batch_size": 3, "steps": 1}])
    except ValueError as error:
        return str(error)
    return "accepted"


def test_each_stage_must_divide(tmp_path: Path, tiny: Tokenizer) -> None:
    folder = prepare(tmp_path, "odd", write(tmp_path / "shards"))
    for says in run_ranks(refused, 2, folder, tiny.path):
        assert says.startswith("trainer.batch_ramp[0].global_batch_size=3 must be a multiple of")
        assert "data parallel size 2" in says
