"""A modality that nvmm has never heard of goes from a file to the loss, in every layout."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvmm.batch import IMAGE, Batch
from nvmm.data.loader import Data
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import ONE_RANK, Layout, build_trainer, compare, run
from nvmm.proof.synthetic import SyntheticData, SyntheticTokenizer, synthetic_steps
from tests import tiny
from tests.models.tones import BINS, FRAMES, TONES, ToneBuilder
from tests.ranks import run_ranks

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = [
    Layout("TP2+SP", 2, TP2 | {"sequence_parallel": True}),
    Layout("PP2xVPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    Layout("CP2", 2, {"context_parallel_size": 2}),
    Layout("DP2", 2, {"overlap_grad_reduce": True}),
]


@dataclasses.dataclass(frozen=True)
class Letters(SyntheticTokenizer):
    pad_id: int = 0


def sound(seed: int, windows: int) -> bytes:
    values = np.random.default_rng(seed).integers(-(2**15), 2**15, windows * BINS * 2 * FRAMES)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(values.astype("<i2").tobytes())
    return out.getvalue()


def model() -> dict[str, Any]:
    """The tiny decoder with an encoder of tones and no pictures."""
    parts = tiny.multimodal()
    transformer = parts["vision"]["transformer"] | {"hidden_size": 32, "num_attention_heads": 2}
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": parts["language"],
        "encoders": {
            "tones": {
                "encoder": {
                    "_target_": "tests.models.tones.ToneEncoder",
                    "_partial_": True,
                    "transformer": transformer,
                },
                "connector": parts["connector"] | {"downsample": 1},
            }
        },
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_shards(
        folder,
        "t",
        [
            {
                "__key__": str(number),
                "wav": sound(number, number % 3),
                "json": json.dumps({"text": "abcdefgh"[: 3 + number % 4]}).encode(),
            }
            for number in range(24)
        ],
    )
    return folder


def world_trainer(config: dict[str, Any], init: str, batches: list[list[Batch]] = []) -> Any:  # noqa: B006
    Parallel().initialize(seed=1, rank=0, world_size=1, init_method=init)
    return build_trainer(config, SyntheticData(batches), Path(tempfile.mkdtemp()))


def steps(config: dict[str, Any], shards: Path) -> list[list[Batch]]:
    """Two steps of four micro-batches, read by the loader."""
    data = loader(shards)
    parallel = Parallel(**config.get("parallel", {}))
    batches = data.batches(
        split="train",
        global_batch_size=8,
        micro_batch_size=2,
        pad_multiple=max(4, parallel.sequence_multiple),
    )
    return [next(batches) for _ in range(2)]


def loader(shards: Path) -> Data:
    dataset = Dataset(str(shards / "t-*.tar"), ToneBuilder)
    return Data(64, 0, dataset, tokenizer=Letters())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    weights = tmp_path_factory.mktemp("reference")
    make = functools.partial(steps, shards=shards)
    return run(tiny.config(model()), ONE_RANK, make_steps=make, weights=weights), weights


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_equals_one_rank(
    layout: Layout, reference: tuple[Any, Path], shards: Path
) -> None:
    expected, weights = reference
    make = functools.partial(steps, shards=shards)
    result = run(tiny.config(model()), layout, make_steps=make, reference=weights)
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)
    names = expected.gradients[0].keys()
    assert {"tones.weight", "tones_connector.linear_fc1.weight"} <= names
    assert float(expected.gradients[0]["tones.weight"].abs().max()) > 0


def test_two_sounds_have_two_losses_and_are_counted(shards: Path) -> None:
    data = loader(shards)
    [batch, *_] = next(data.batches(split="train", global_batch_size=8, micro_batch_size=8))
    assert batch.media[TONES].values.dtype == torch.float32
    counts = data.count([batch], ["tones"])
    assert counts["train/tones.tiles"] == len(batch.media[TONES].values)
    assert counts["train/tones.items"] == len(set(batch.media[TONES].texts.tolist()))
    [losses] = run_ranks(_losses, 1, batch)
    assert losses[0] != losses[1]
    assert losses[2] > 0, "the encoder reports its FLOPs"


def _losses(rank: int, world: int, init: str, batch: Batch) -> tuple[float, float, float]:
    chunk = world_trainer(tiny.config(model()), init).chunks[0].eval()
    media = batch.media[TONES]
    louder = batch.replace(media={TONES: dataclasses.replace(media, values=media.values * 2)})
    with torch.no_grad():
        losses = [float((chunk(b) * b.loss_mask).sum()) for b in (batch, louder)]
    return losses[0], losses[1], chunk.flops(batch)["tones"]


@pytest.mark.parametrize("own", ["tones", "nothing"])
def test_media_that_a_model_does_not_read_are_refused(own: str, shards: Path) -> None:
    """At the first batch, naming both sides, whichever way the data come."""
    config = tiny.config(model() if own == "tones" else tiny.language())
    images = synthetic_steps(tiny.config(tiny.multimodal()), 1, 4)
    reads = r"it reads tones \(sequence\)" if own == "tones" else "it reads no media"
    with pytest.raises(
        RuntimeError, match=rf"give image \(sequence\), which \w+Model does not read: {reads}"
    ):
        run_ranks(_train, 1, config, images)
    if own == "nothing":
        batches = steps({}, shards)
        with pytest.raises(
            RuntimeError, match=r"give tones \(sequence\), which LanguageModel does"
        ):
            run_ranks(_train, 1, config, batches)


def _train(rank: int, world: int, init: str, config: Any, batches: list[list[Batch]]) -> None:
    trainer = world_trainer(config, init, batches)
    trainer.train_step(0, next(trainer.batches("train", 0)))


def test_a_model_checks_what_it_is_given_too() -> None:
    [batch, *_] = synthetic_steps(tiny.config(tiny.multimodal()), 1, 4)[0]
    assert IMAGE in batch.media
    with pytest.raises(RuntimeError, match=r"model\._target_=LanguageModel does not read"):
        run_ranks(_forward, 1, batch)


def _forward(rank: int, world: int, init: str, batch: Batch) -> None:
    world_trainer(tiny.config(tiny.language()), init).chunks[0](batch)
