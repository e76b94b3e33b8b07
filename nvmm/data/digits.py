"""The quickstart's data: strings of real handwritten digits, written as webdataset shards.

The digits are scikit-learn's `load_digits` (UCI optical recognition of handwritten digits, 1,797
pictures of 8x8); layouts, questions and the training augmentation are synthetic.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nvmm.data.shards import write_shards
from nvmm.data.tokenizer import train_byte_level_bpe

BLANK = "<|blank|>"
"""Stands for a picture patch without a digit where the task is given as text."""

MAX_DIGITS = 6
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_pad|>",
    BLANK,
    "<Image>",
    "</Image>",
    *(f"<tile_{k}>" for k in range(1, MAX_DIGITS + 1)),
    "<tile_global_thumbnail>",
)
KINDS = ("read", "digit", "count")
SAMPLES_PER_SHARD = 2000
FORMAT = 1
"""Raised when the data made from the same arguments change."""


@dataclass(frozen=True)
class Amounts:
    """Number of samples of each part, and the seed."""

    text: int = 30_000
    single: int = 10_000
    strings: int = 40_000
    validation: int = 400
    test: int = 1_000
    seed: int = 1234


@dataclass(frozen=True)
class Digits:
    """Digit pictures of one split: pixels uint8 [n, 10, 10] with a black frame, n labels."""

    pixels: np.ndarray
    labels: tuple[int, ...]


def load_splits() -> dict[str, Digits]:
    """train (1,257 pictures), validation (180) and test (360): no picture is in two of them."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.round(raw.images * (255 / 16)).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    order = np.random.RandomState(1234).permutation(len(pixels))
    bounds = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
    return {
        split: Digits(pixels[order[a:b]], tuple(int(x) for x in raw.target[order[a:b]]))
        for split, (a, b) in bounds.items()
    }


def draw_digit(pixels: np.ndarray, size: int, rng: random.Random, augment: bool) -> Image.Image:
    """One digit as a grey picture of size x size; `augment` distorts it a little."""
    angle = shear = shift_x = shift_y = 0.0
    scale_x = scale_y = 1.0
    if augment:
        angle, shear = rng.uniform(-0.22, 0.22), rng.uniform(-0.2, 0.2)
        scale_x, scale_y = 1 + rng.uniform(-0.15, 0.2), 1 + rng.uniform(-0.15, 0.2)
        shift_x, shift_y = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)
        pixels = np.minimum(pixels * rng.uniform(0.75, 1.1), 255).astype(np.uint8)
    # maps a pixel of the result to one of the source, both in [-1, 1]; 0.85 crops the frame
    row_x = (0.85 * math.cos(angle) * scale_x, 0.85 * (shear - math.sin(angle) * scale_x))
    row_y = (0.85 * math.sin(angle) * scale_y, 0.85 * math.cos(angle) * scale_y)
    half, ratio = len(pixels) / 2, len(pixels) / size
    coefficients = []
    for (a, b), shift in ((row_x, 0.85 * shift_x), (row_y, 0.85 * shift_y)):
        coefficients += [a * ratio, b * ratio, half * (1 + shift - a - b)]
    return Image.fromarray(pixels).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


def draw_string(
    digits: Digits, chosen: list[int], rng: random.Random, augment: bool
) -> Image.Image:
    """The chosen digits on a black ground, in reading order, one row or (one in five) two."""
    size = rng.randint(24, 32)
    two = len(chosen) > 1 and rng.random() < 0.2
    top = (len(chosen) + 1) // 2 if two else len(chosen)
    rows = [chosen[:top], chosen[top:]] if two else [chosen]
    margin_x, margin_y, gap = rng.randint(0, 8), rng.randint(0, 6), rng.randint(0, 8)
    width = top * (size + gap) + 2 * margin_x
    height = len(rows) * (size + 4) + 2 * margin_y
    canvas = Image.new("L", (width, height))
    for r, row in enumerate(rows):
        for c, number in enumerate(row):
            x = margin_x + c * (size + gap) + rng.randint(0, gap)
            y = margin_y + r * (size + 4) + rng.randint(0, 4)
            canvas.paste(draw_digit(digits.pixels[number], size, rng, augment), (x, y))
    return canvas


def ask(labels: list[int], kind: str, rng: random.Random) -> tuple[str, str]:
    """Question and answer of one kind about a string."""
    if kind == "read":
        return "Read the number.", "".join(map(str, labels))
    if kind == "count":
        return "How many digits are there?", str(len(labels))
    place = rng.randrange(len(labels))
    return f"Which digit is number {place + 1}?", str(labels[place])


def choose_kind(rng: random.Random) -> str:
    """A kind of question; reading is asked most, as it teaches most."""
    return rng.choices(KINDS, weights=(80, 12, 8))[0]


def text_sample(rng: random.Random) -> dict[str, object]:
    """The task as text: in each tile's 2x2 slots stand digits instead of picture features."""
    count = rng.randint(1, MAX_DIGITS)
    labels = [rng.randrange(10) for _ in range(count)]
    if rng.random() < 0.3:
        tiles = rng.randint(max(1, (count + 1) // 2), MAX_DIGITS)
    else:
        tiles = max(1, min(MAX_DIGITS, count + rng.randint(-1, 1)))
    halves = [BLANK] * (2 * tiles)
    for label, place in zip(labels, sorted(rng.sample(range(2 * tiles), count)), strict=True):
        halves[place] = str(label)
    text = "<Image>"
    for tile in range(tiles):
        left, right = halves[2 * tile], halves[2 * tile + 1]
        # a digit may fill its tile, or show in the upper or lower slot only
        if left == BLANK and rng.random() < 0.5:
            left = right
        if right == BLANK and rng.random() < 0.5:
            right = left
        slots = [left, right, left, right]
        for slot, value in ((rng.choice((0, 2)), left), (rng.choice((1, 3)), right)):
            if rng.random() >= 0.5 and value != BLANK:
                slots[slot] = BLANK
        tag = "<tile_global_thumbnail>" if tiles == 1 else f"<tile_{tile + 1}>"
        text += tag + "".join(slots)
    if tiles > 1:
        text += "<tile_global_thumbnail>" + BLANK * 4
    question, answer = ask(labels, choose_kind(rng), rng)
    human = {"from": "human", "value": f"{text}</Image>\n{question}"}
    return {"conversations": [human, {"from": "gpt", "value": answer}]}


def image_sample(
    digits: Digits, rng: random.Random, *, count: int, kind: str, augment: bool
) -> tuple[dict[str, object], bytes]:
    """A picture as PNG bytes, and its question."""
    chosen = [rng.randrange(len(digits.labels)) for _ in range(count)]
    labels = [digits.labels[number] for number in chosen]
    buffer = io.BytesIO()
    draw_string(digits, chosen, rng, augment).save(buffer, "PNG", compress_level=1)
    question, answer = ask(labels, kind, rng)
    return {"question": question, "answer": answer, "kind": kind}, buffer.getvalue()


def _samples(
    part: str, split: str, amount: int, digits: Digits, seed: int
) -> Iterator[dict[str, bytes | str]]:
    rng = random.Random(f"{seed}/{part}/{split}")
    for number in range(amount):
        members: dict[str, bytes | str] = {"__key__": f"{number:06d}"}
        if part == "text":
            record = text_sample(rng)
        else:
            count = 1
            if part == "strings" and rng.random() >= 0.05:
                count = rng.randint(2, MAX_DIGITS)
            kind = "read" if part == "single" else choose_kind(rng)
            record, members["png"] = image_sample(
                digits, rng, count=count, kind=kind, augment=split == "train"
            )
        members["json"] = json.dumps(record, separators=(",", ":")).encode("utf-8")
        yield members


def train_tokenizer(folder: str | Path, seed: int = 1234) -> Path:
    """The quickstart's tokenizer: every tag and digit is one token, so is every frequent word."""
    rng = random.Random(f"{seed}/tokenizer")
    texts = ["system\nuser\nassistant\n"] * 100
    for _ in range(500):
        labels = [rng.randrange(10) for _ in range(MAX_DIGITS)]
        texts += ["\n".join(ask(labels, kind, rng)) for kind in KINDS]
    return train_byte_level_bpe(
        folder,
        texts,
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def build(
    folder: str | Path,
    amounts: Amounts = Amounts(),
    progress: Callable[[str, Iterator[dict[str, bytes | str]], int], Iterator] | None = None,
) -> bool:
    """Write the data set, its card and its tokenizer; False if it was there already.

    folder/{text,single,strings}/{train,validation,test}-*.tar, folder/tokenizer, folder/README.md.
    The same amounts give the same bytes. `progress(name, samples, total)` may watch the samples.
    """
    folder = Path(folder)
    stamp = folder / "complete.json"
    wanted = {"format": FORMAT, **asdict(amounts)}
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return False
    stamp.unlink(missing_ok=True)
    splits = load_splits()
    for part, split, amount in _parts(amounts):
        for old in (folder / part).glob(f"{split}-*.tar"):
            old.unlink()
        stream = _samples(part, split, amount, splits[split], amounts.seed)
        if progress is not None:
            stream = progress(f"{part}/{split}", stream, amount)
        write_shards(folder / part, split, stream, samples_per_shard=SAMPLES_PER_SHARD)
    train_tokenizer(folder / "tokenizer")
    (folder / "README.md").write_text(_card(amounts, splits), encoding="utf-8")
    stamp.write_text(json.dumps(wanted, indent=2) + "\n")
    return True


def _parts(amounts: Amounts) -> list[tuple[str, str, int]]:
    return [
        ("text", "train", amounts.text),
        ("single", "train", amounts.single),
        ("strings", "train", amounts.strings),
        ("strings", "validation", amounts.validation),
        ("strings", "test", amounts.test),
    ]


def _card(amounts: Amounts, splits: dict[str, Digits]) -> str:
    rows = "\n".join(f"| {part}/{split} | {n} |" for part, split, n in _parts(amounts))
    pictures = ", ".join(f"{split} {len(digits.labels)}" for split, digits in splits.items())
    return _CARD.format(rows=rows, pictures=pictures, seed=amounts.seed)


_CARD = """# Handwritten digit strings

Made by `tools/quickstart_data.py` of nvmm (seed {seed}); the same arguments give the same bytes.

## What is real
The digits: 1,797 pictures of 8x8 written by 43 people, *Optical Recognition of Handwritten Digits*
(E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49), licence
CC BY 4.0, as shipped with scikit-learn (`sklearn.datasets.load_digits`). They are split by
picture: {pictures}. No picture is in two splits; writers are not told apart, so one writer may be.

## What is synthetic
- Layout: digits are enlarged to 24 to 32 pixels and set in one row or (one string in five) two,
  with random gaps and margins. 5 % of the strings have one digit, the others 2 to 6 alike often.
- Questions: "Read the number." (80 %), "Which digit is number k?" (12 %), "How many digits are
  there?" (8 %). Answers follow from the labels.
- Training pictures only: each digit is rotated up to 0.22 rad, sheared, scaled, shifted and
  dimmed. Validation and test digits are shown as they are.
- `text`: the same task without pictures. Digits stand as text in the four slots of tagged tiles.
  It stands in for the language pretraining of a real system, in this task's own format.

## Parts
| part | samples |
|---|---|
{rows}

`text` and `single` (one digit, one tile) prepare, `strings` is the task. Recipes are chosen on
`strings/validation`; `strings/test` is for reporting.

## Format
Webdataset tar shards. A sample is `KEY.json`, either `question`, `answer` and `kind`, or
`conversations`, and, but for `text`, `KEY.png` (8-bit grey). `tokenizer/` is a byte-level BPE in
the Hugging Face format, where every digit and tile tag is one token.
"""
