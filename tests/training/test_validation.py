"""Validation: one loss at any batch size and layout, without dropout, and nothing left behind."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.loader import Data
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from tests import tiny
from tests.data.conftest import template, vqa
from tests.ranks import run_ranks
from tests.training.test_trainer import PP2, TP2, _fit

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
HELD_OUT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 8 texts to train on and 7 held out, all of different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    train_tokenizer(folder / "tokenizer")
    for name, count in (("train", 8), ("held", HELD_OUT)):
        texts = ("".join(str((i * j) % 10) for j in range(1, 3 + 2 * i)) for i in range(count))
        samples = [{**vqa(answer=text), "__key__": f"{i:02d}"} for i, text in enumerate(texts)]
        write_shards(folder, name, samples, samples_per_shard=4)
    return folder


def _validate(
    rank: int,
    world_size: int,
    init: str,
    folder: Path,
    layout: dict[str, Any],
    sizes: list[tuple[int, int]],
    dropout: float,
) -> list[float]:
    """Train two steps, validate with each batch size after both; losses in order."""
    Parallel(**layout).initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    build = partial(InstructBuilder, template(), ImageTags(), tokens_per_tile=4, tile_size=32)
    train, held_out = (Dataset(f"{folder}/{name}-*.tar", build) for name in ("train", "held"))
    data = Data(64, 0, train, held_out, tokenizer=Tokenizer(str(folder / "tokenizer")))
    model = tiny.language()
    model["transformer"] |= {"hidden_dropout": dropout, "attention_dropout": dropout}
    config = tiny.config(model, learning_rate=1e-2 if dropout == 0 else 1e-12)
    config |= {"parallel": layout}
    options = {"global_batch_size": 4, "micro_batch_size": 2}
    trainer = build_trainer(config, data, folder, **options)
    batches = trainer.batches("train", 0)
    losses = []
    for step in range(2):
        trainer.train_step(step, next(batches))
        for trainer.global_batch_size, trainer.micro_batch_size in sizes:
            losses.append(trainer.validate(step)["loss"])
            assert all(chunk.training for chunk in trainer.chunks)
        trainer.global_batch_size, trainer.micro_batch_size = 4, 2
    return losses


SIZES = [(4, 2), (2, 1), (6, 3), (8, 4), (2 * HELD_OUT, HELD_OUT)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The two losses of one rank, all samples in one batch."""
    return run_ranks(_validate, 1, folder, {}, [(HELD_OUT, HELD_OUT)], 0.0)[0]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (2, OVERLAP),
        pytest.param(2, TP2, marks=pytest.mark.slow),
        pytest.param(2, PP2, marks=pytest.mark.slow),
    ],
    ids=["one", "dp2", "overlap", "tp2", "pp2"],
)
def test_one_loss_at_any_batch_size_and_layout(
    world_size: int, layout: dict[str, Any], folder: Path, expected: list[float]
) -> None:
    """The last global batch is incomplete in most of them; each sample counts once."""
    losses = run_ranks(_validate, world_size, folder, layout, SIZES, 0.0)[0]
    assert losses[: len(SIZES)] == pytest.approx([expected[0]] * len(SIZES), rel=1e-5)
    assert losses[len(SIZES) :] == pytest.approx([expected[1]] * len(SIZES), rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-2


def test_nothing_is_dropped(folder: Path) -> None:
    """The rate is so low that the weights stay: dropout alone could change the loss."""
    dropped = run_ranks(_validate, 1, folder, {}, [(4, 2)], 0.3)[0]
    whole = run_ranks(_validate, 1, folder, {}, [(4, 2)], 1e-12)[0]
    assert dropped == whole


def test_overlapped_gathers_are_complete_in_a_checkpoint(tmp_path: Path) -> None:
    checksums = []
    for name, layout in (("plain", {}), ("overlapped", OVERLAP)):
        run_ranks(_fit, 2, tmp_path / name, 2, layout)
        path = tmp_path / name / "checkpoints/step_00000002/weights.json"
        checksums.append(json.loads(path.read_text()))
    assert checksums[0] == checksums[1]
