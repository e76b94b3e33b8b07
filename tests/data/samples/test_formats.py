"""Every YAML of configs/data that a user gives shards to: it composes, and trains a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from nvmm.config import compose
from nvmm.config.check import check, config_dir, to_plain
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import write_shards
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from tests.data.conftest import image_bytes
from tests.data.samples.test_sounds import noise, wave
from tests.ranks import run_ranks

JPG = image_bytes(40, 30, kind="jpg")
QUESTION = {"question": "Which?", "answers": ["red", "blue"]}
TURNS = [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}]
CONVERSATION = {
    "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}],
    "contexts": ["It is red.", "It is old."],
}
HEARD = {
    "0.wav": wave(noise(0.5, 8000, 1), 8000),
    "json": {"sound": "0.wav", "prompt": "What?", "answer": "A dog.", "options": ["a dog"]},
}
RANKED = {"question": "Which?", "passages": ["red"], "relevant": [0]}
RECORDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys([f"audio_flamingo_{stage}" for stage in ("pretrain", "sft", "chat")], HEARD),
    "captions": {"jpg": JPG, "txt": b"A bus."},
    "chatqa": {"json": CONVERSATION},
    "chatqa2_stage3": {"json": CONVERSATION},
    "chatqa_stage2": {"json": CONVERSATION},
    "dialogues": {
        "json": {"messages": CONVERSATION["messages"][:1], "positive": "red", "negatives": ["x"]}
    },
    "instruct": {"jpg": JPG, "json": QUESTION},
    "interleaved": {"jpg": JPG, "json": {"texts": ["a", None], "images": [None, "u"]}},
    "llava": {"jpg": JPG, "json": {"conversations": TURNS}},
    "llava_pretraining": {"jpg": JPG, "json": {"conversations": TURNS}},
    "long_text": {},  # written with the tokenizer
    "multiple_choice": {"jpg": JPG, "json": {"question": "?", "choices": ["a"], "answer": 0}},
    "ocr": {"jpg": JPG, "json": {"words": ["a"], "boxes": [[0, 0, 9, 9]]}},
    "preference": {"json": {"prompt": "Which?", "chosen": "red", "rejected": "blue"}},
    "rankrag_stage2": {"json": CONVERSATION},
    "retrieval": {"json": {"query": "one", "positive": "two", "negatives": ["three"]}},
    "reward": {"json": {"prompt": "Which?", "response": "red", "helpfulness": 3}},
    "sound_chat": {
        "sound.wav": HEARD["0.wav"],
        "json": {
            "sound": "sound.wav",
            "conversations": [{"from": "human", "value": "<sound>What?"}, TURNS[1]],
        },
    },
    "sounds": HEARD,
    "text": {"txt": b"Once upon a time."},
    "topics": {"txt": b"Once upon a time."},
    "vila": {"jpg": JPG, "json": {"conversations": TURNS}},
    "vila_align": {"jpg": JPG, "json": {"caption": "A bus."}},
    "vila_demo": {"jpg": JPG, "json": {"caption": "A bus."}},
    "vila_interleaved": {"jpg": JPG, "txt": b"A bus."},
    "vila_sft": {"jpg": JPG, "json": {"conversations": TURNS}},
    "vqa": {"jpg": JPG, "json": QUESTION | {"weights": [1, 2]}},
}
"""A sample of each format. One of configs/data that is missing here fails the test."""
BY_FORM = {
    "nvmm.data.samples.contexts.Ranking": {"json": RANKED},
    "nvmm.data.samples.contexts.ListRanking": {"json": RANKED},
}
"""A sample of the parts of a blend that have a form of their own."""
LANGUAGE = ["experiment=language/tiny", "tokenizer=quickstart"]
EMBEDDER = ["experiment=nv_embed/tiny", "tokenizer=quickstart"]
SMALL_TILES = ["data.train.build.tokens_per_tile=4", "data.train.build.tile_size=32"]
MULTIMODAL = ["experiment=nvlm_d/quickstart", *SMALL_TILES]
EXPERIMENTS: dict[str, list[str]] = {
    **dict.fromkeys(("retrieval", "dialogues"), EMBEDDER),
    **dict.fromkeys(("chatqa", "chatqa2_stage3", "chatqa_stage2", "rankrag_stage2"), LANGUAGE),
    **dict.fromkeys(("long_text", "topics"), LANGUAGE),
    **{name: ["experiment=audio_flamingo/tiny"] for name in RECORDS if "audio_flamingo" in name},
    "sounds": ["experiment=audio_flamingo/tiny"],
    "sound_chat": ["experiment=audio_flamingo3/tiny"],
    "vila_demo": ["experiment=vila_demo/interleaved", "tokenizer=quickstart"],
    "preference": ["experiment=preference/tiny", "tokenizer=quickstart"],
    "reward": ["experiment=nemotron4/reward_tiny", "tokenizer=quickstart"],
}
"""What reads a format, where it is no multimodal model."""
STORAGE = "data.train.storage={_target_:nvmm.data.shards.storage.Storage,retries:2}"


def composed(name: str, folder: Path) -> dict[str, Any]:
    """A small model on this format: the quickstart's, its tiles as small, unless it reads others.

    The shards of a blend are those of this format, or of the form that a part has.
    """
    overrides = [
        *EXPERIMENTS.get(name, MULTIMODAL),
        f"data={name}",
        STORAGE,
        "parallel=single",
        "init_from=null",
        f"tokenizer.path={folder / 'tokenizer'}",
        f"data.train.shards={folder / name}-*.tar",
        "data.sequence_length=384",
        "data.on_error=stop",
        "data.num_workers=0",
        "trainer.validation_interval=null",
    ]
    config = to_plain(compose.composed("train", overrides))
    if config["data"].get("blend") is not None:
        config["data"]["train"]["shards"] = None
    for part in config["data"].get("blend") or []:
        form = (part.get("build") or {}).get("form", {}).get("_target_")
        part["shards"] = f"{folder / (form if form in BY_FORM else name)}-*.tar"
        part.pop("samples", None)
        if "passes" in part:
            part["passes"] = 1  # of three samples
    assert check(config) == []
    return config


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


def write(folder: Path, name: str, record: dict[str, Any]) -> None:
    members = {
        kind: value if isinstance(value, bytes) else json.dumps(value).encode()
        for kind, value in record.items()
    }
    write_shards(folder, name, [{"__key__": f"{number}", **members} for number in range(3)])


def tokenizer(folder: Path) -> None:
    """The quickstart's tokenizer, with a BOS token, as ChatQA's and VILA's templates want one."""
    train_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    names = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}
    path.write_text(json.dumps(names))


@pytest.mark.slow
def test_every_format_trains_a_step(tmp_path: Path) -> None:
    theirs = {path.stem for path in (config_dir() / "data").glob("*.yaml")}
    assert {name for name in theirs if not name.startswith("quickstart")} == set(RECORDS)
    tokenizer(tmp_path / "tokenizer")
    words = Tokenizer(str(tmp_path / "tokenizer"))
    row = words.encode("Which digit is it?")
    long = {"tokens": row, "spans": [{"source": "a", "start": 0}], "begins": words.decode(row)}
    for name, record in (RECORDS | BY_FORM).items():
        write(tmp_path, name, {"json": long} if name == "long_text" else record)
    configs = {name: composed(name, tmp_path) for name in RECORDS}
    [losses] = run_ranks(train_each, 1, configs, tmp_path)
    assert losses.keys() == RECORDS.keys()
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values()), losses
