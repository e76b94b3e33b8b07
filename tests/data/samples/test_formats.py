"""Every YAML of configs/data that a user gives shards to: it composes, and trains a step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from nvmm.config import compose
from nvmm.config.check import check, config_dir, to_plain
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.shards.dataset import write_shards
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from tests.data.conftest import image_bytes
from tests.ranks import run_ranks

JPG = image_bytes(40, 30, kind="jpg")
QUESTION = {"question": "Which?", "answers": ["red", "blue"]}
TURNS = [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}]
RECORDS: dict[str, dict[str, Any]] = {
    "captions": {"jpg": JPG, "txt": b"A bus."},
    "instruct": {"jpg": JPG, "json": QUESTION},
    "interleaved": {"jpg": JPG, "json": {"texts": ["a", None], "images": [None, "u"]}},
    "llava": {"jpg": JPG, "json": {"conversations": TURNS}},
    "llava_pretraining": {"jpg": JPG, "json": {"conversations": TURNS}},
    "multiple_choice": {"jpg": JPG, "json": {"question": "?", "choices": ["a"], "answer": 0}},
    "ocr": {"jpg": JPG, "json": {"words": ["a"], "boxes": [[0, 0, 9, 9]]}},
    "retrieval": {"json": {"query": "one", "positive": "two", "negatives": ["three"]}},
    "text": {"txt": b"Once upon a time."},
    "vila_align": {"jpg": JPG, "json": {"caption": "A bus."}},
    "vila_interleaved": {
        "jpg": JPG,
        "json": {"text_list": ["a", "b"], "image_info": [{"matched_text_index": 1}]},
    },
    "vila_sft": {"jpg": JPG, "json": {"conversations": TURNS}},
    "vqa": {"jpg": JPG, "json": QUESTION | {"weights": [1, 2]}},
}

OF_AN_EXPERIMENT = {"dialogues", "preference", "reward", "topics", "vila"}
"""Those that only experiments of another objective have, and what the others of VILA inherit."""


def composed(name: str, folder: Path) -> dict[str, Any]:
    """The quickstart's model on this format, its tiles as small as the model's; or an embedder."""
    own = [
        "experiment=nvlm_d/quickstart",
        f"data={name}",
        "data.train.build.tokens_per_tile=4",
        "data.train.build.tile_size=32",
        "data.train.storage={_target_:nvmm.data.shards.storage.Storage,retries:2}",
    ]
    if name == "retrieval":
        own = ["experiment=nv_embed/tiny", "tokenizer=quickstart"]
    files = [f"data.train.shards={folder / name}-*.tar"]
    if name.startswith("vila"):
        # The quickstart's tokenizer has no BOS, and Vicuna's system message is long.
        own += ["data.train.build.template.bos=false", "data.train.build.template.system=null"]
    if name in ("vila_interleaved", "vila_sft"):
        files = [f"data.blend=[{{name: a, shards: '{folder / name}-*.tar'}}]"]
    overrides = [
        *own,
        *files,
        "parallel=single",
        "init_from=null",
        f"tokenizer.path={folder / 'tokenizer'}",
        "data.sequence_length=128",
        "data.num_workers=0",
        "trainer.validation_interval=null",
    ]
    config = compose.composed("train", overrides)
    assert check(config) == []
    return to_plain(config)


def train_each(
    rank: int, world_size: int, init: str, configs: dict[str, dict[str, Any]], folder: Path
) -> dict[str, float]:
    """Loss of one step of each config."""
    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    losses = {}
    for name, config in configs.items():
        tokenizer = instantiate(config["tokenizer"], _convert_="all")
        data = instantiate(config["data"], _convert_="all")(tokenizer=tokenizer, seed=1)
        run_dir = folder / "runs" / name
        run_dir.mkdir(parents=True)
        sizes = {"global_batch_size": 2, "micro_batch_size": 2}
        plain = {key: config[key] for key in ("model", "objective", "optim", "backend", "seed")}
        build_trainer(plain, data, run_dir, max_steps=1, log=True, **sizes).fit()
        losses[name] = json.loads((run_dir / "metrics.jsonl").read_text())["loss"]
    return losses


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[str], None]:
    def write(name: str) -> None:
        members = {
            kind: value if isinstance(value, bytes) else json.dumps(value).encode()
            for kind, value in RECORDS[name].items()
        }
        write_shards(tmp_path, name, [{"__key__": f"{number}", **members} for number in range(3)])

    return write


@pytest.mark.slow
def test_every_format_trains_a_step(tmp_path: Path, shards: Callable[[str], None]) -> None:
    theirs = {path.stem for path in (config_dir() / "data").glob("*.yaml")}
    others = {name for name in theirs if not name.startswith("quickstart")} - OF_AN_EXPERIMENT
    assert others == set(RECORDS)
    train_tokenizer(tmp_path / "tokenizer")
    for name in RECORDS:
        shards(name)
    configs = {name: composed(name, tmp_path) for name in RECORDS}
    [losses] = run_ranks(train_each, 1, configs, tmp_path)
    assert losses.keys() == RECORDS.keys()
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values()), losses
