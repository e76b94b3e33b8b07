"""The quickstart's data: strings of real handwritten digits, written as webdataset shards.

The digits are scikit-learn's `load_digits` (UCI optical recognition of handwritten digits, 1,797
images of 8x8); layouts, questions and the training augmentation are synthetic.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from nvmm.data.prepare.once import once
from nvmm.data.samples.chat import IMAGE_MARKER, ImageTags, Variant
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.io.progress import watch

BLANK = "<|blank|>"
"""The token that stands for an image patch without a digit where the task is given as text."""

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
TILE_SIZE = 32
FORMAT = 1
"""A number that is increased when the data made from the same arguments change."""


@dataclass(frozen=True)
class Amounts:
    """The number of samples of each part, and the seed."""

    text: int = 30_000
    single: int = 10_000
    strings: int = 40_000
    validation: int = 400
    test: int = 1_000
    seed: int = 1234


@dataclass(frozen=True)
class Form:
    """The form of the samples of `text` and `strings`; the default is the quickstart's.

    tags: the tags of tiles in `text` (`nvmm.data.samples.chat.ImageTags.variant`).
    max_images: with more than 1 the number of a sample's images varies from 1 on, and a question
        names the image that it is about. In training each image is asked about, in random order.
    """

    tags: Variant = "1d"
    max_images: int = 1

    def __post_init__(self) -> None:
        ImageTags(self.tags)
        if self.max_images < 1:
            raise ValueError(f"max_images={self.max_images} must be at least 1")


@dataclass(frozen=True)
class Digits:
    """Digit images of one split: pixels uint8 [n, 10, 10] with a black frame, n labels."""

    pixels: np.ndarray
    labels: tuple[int, ...]


def load_splits() -> dict[str, Digits]:
    """Load train (1,257 images), validation (180) and test (360); no image is in two of them."""
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
    """Draw one digit as a grey image of size x size; `augment` distorts it a little."""
    angle = shear = shift_x = shift_y = 0.0
    scale_x = scale_y = 1.0
    if augment:
        angle, shear = rng.uniform(-0.22, 0.22), rng.uniform(-0.2, 0.2)
        scale_x, scale_y = 1 + rng.uniform(-0.15, 0.2), 1 + rng.uniform(-0.15, 0.2)
        shift_x, shift_y = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)
        pixels = np.minimum(pixels * rng.uniform(0.75, 1.1), 255).astype(np.uint8)
    # The matrix maps a pixel of the result to one of the source, both in [-1, 1]; 0.85 crops the
    # frame. Pillow wants it in pixels.
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
    """Draw the chosen digits on black, in reading order, in one row or (one in five) two."""
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
    """Return question and answer of one kind about a string."""
    if kind == "read":
        return "Read the number.", "".join(map(str, labels))
    if kind == "count":
        return "How many digits are there?", str(len(labels))
    place = rng.randrange(len(labels))
    return f"Which digit is number {place + 1}?", str(labels[place])


def choose_kind(rng: random.Random) -> str:
    """Draw a kind of question; reading is asked most, as it teaches most."""
    return rng.choices(KINDS, weights=(80, 12, 8))[0]


def ask_in_turn(strings: list[list[int]], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return (question, answer, kind) about every image of a sample, in random order."""
    turns = []
    for place in rng.sample(range(len(strings)), len(strings)):
        kind = choose_kind(rng)
        question, answer = ask(strings[place], kind, rng)
        turns.append((f"Image {place + 1}: {question}", answer, kind))
    return turns


def conversation(images: str, turns: list[tuple[str, str, str]]) -> dict[str, object]:
    """Return a sample in LLaVA's form, with `images` before the first question."""
    messages = []
    for question, answer, _ in turns:
        messages.append({"from": "human", "value": f"{images}{question}"})
        messages.append({"from": "gpt", "value": answer})
        images = ""
    return {"conversations": messages}


def text_sample(rng: random.Random, form: Form = Form()) -> dict[str, object]:
    """Return the task as text: each tile's 2x2 slots hold digits instead of image features."""
    tags = ImageTags(form.tags)
    if form.max_images == 1:
        labels, block = text_image(rng, tags)
        kind = choose_kind(rng)
        return conversation(f"{block}\n", [(*ask(labels, kind, rng), kind)])
    images = [text_image(rng, tags) for _ in range(rng.randint(1, form.max_images))]
    turns = ask_in_turn([labels for labels, _ in images], rng)
    return conversation("".join(f"{block}\n" for _, block in images), turns)


def text_image(rng: random.Random, tags: ImageTags) -> tuple[list[int], str]:
    """Return the digits of a string, and the text that stands for its tiled image."""
    # 1. Digits take halves of tiles, in order; a tile more or less than digits leaves blanks.
    count = rng.randint(1, MAX_DIGITS)
    labels = [rng.randrange(10) for _ in range(count)]
    if rng.random() < 0.3:
        tiles = rng.randint(max(1, (count + 1) // 2), MAX_DIGITS)
    else:
        tiles = max(1, min(MAX_DIGITS, count + rng.randint(-1, 1)))
    halves = [BLANK] * (2 * tiles)
    for label, place in zip(labels, sorted(rng.sample(range(2 * tiles), count)), strict=True):
        halves[place] = str(label)
    # 2. Each half is written to its two slots. A digit may fill its tile, or show in the upper or
    # lower slot alone, as digits in images do.
    text = tags.image_start
    for tile in range(tiles):
        left, right = halves[2 * tile], halves[2 * tile + 1]
        if left == BLANK and rng.random() < 0.5:
            left = right
        if right == BLANK and rng.random() < 0.5:
            right = left
        slots = [left, right, left, right]
        for slot, value in ((rng.choice((0, 2)), left), (rng.choice((1, 3)), right)):
            if rng.random() >= 0.5 and value != BLANK:
                slots[slot] = BLANK
        number = 0 if tiles == 1 else tile + 1
        text += tags.tag(number, (tiles, 1), TILE_SIZE) + "".join(slots)
    # 3. The thumbnail is too small to read, so it is blank.
    if tiles > 1:
        text += tags.tag(0, (tiles, 1), TILE_SIZE) + BLANK * 4
    return labels, text + tags.image_end


def draw_image(
    digits: Digits, rng: random.Random, *, count: int, augment: bool
) -> tuple[list[int], bytes]:
    """Draw a string of digits; return its digits, and its image as PNG bytes."""
    chosen = [rng.randrange(len(digits.labels)) for _ in range(count)]
    buffer = io.BytesIO()
    draw_string(digits, chosen, rng, augment).save(buffer, "PNG", compress_level=1)
    return [digits.labels[number] for number in chosen], buffer.getvalue()


def image_sample(
    digits: Digits, rng: random.Random, *, count: int, kind: str, augment: bool
) -> tuple[dict[str, object], bytes]:
    """Return a question with its answer, and its image as PNG bytes."""
    labels, image = draw_image(digits, rng, count=count, augment=augment)
    question, answer = ask(labels, kind, rng)
    return {"question": question, "answer": answer, "kind": kind}, image


def images_sample(
    digits: Digits, rng: random.Random, *, counts: list[int], train: bool
) -> tuple[dict[str, object], list[bytes]]:
    """Return several images, with a question about each in training, about one elsewhere."""
    images = [draw_image(digits, rng, count=count, augment=train) for count in counts]
    image_files = [data for _, data in images]
    turns = ask_in_turn([labels for labels, _ in images], rng)
    if train:
        return conversation(f"{IMAGE_MARKER}\n" * len(images), turns), image_files
    question, answer, kind = turns[0]
    return {"question": question, "answer": answer, "kind": kind}, image_files


def _samples(
    part: str, split: str, amount: int, digits: Digits, seed: int, form: Form
) -> Iterator[dict[str, bytes | str]]:
    """Yield the samples of one part and split, for `write_shards`."""
    rng = random.Random(f"{seed}/{part}/{split}")
    for number in range(amount):
        members: dict[str, bytes | str] = {"__key__": f"{number:06d}"}
        if part == "text":
            record = text_sample(rng, form)
        elif part == "strings" and form.max_images > 1:
            counts = [_count(rng) for _ in range(rng.randint(1, form.max_images))]
            record, images = images_sample(digits, rng, counts=counts, train=split == "train")
            members |= {f"{place}.png": image for place, image in enumerate(images)}
        else:
            count = _count(rng) if part == "strings" else 1
            kind = "read" if part == "single" else choose_kind(rng)
            record, members["png"] = image_sample(
                digits, rng, count=count, kind=kind, augment=split == "train"
            )
        members["json"] = json.dumps(record, separators=(",", ":")).encode("utf-8")
        yield members


def _count(rng: random.Random) -> int:
    """Draw the number of digits of a string: one in twenty has a single digit."""
    return rng.randint(2, MAX_DIGITS) if rng.random() >= 0.05 else 1


def train_tokenizer(folder: str | Path, seed: int = 1234) -> Path:
    """Train the quickstart's tokenizer: tags, digits and frequent words are one token each."""
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
    form: Form = Form(),
) -> bool:
    """Write the data set, its card and its tokenizer; return False if it was there already.

    folder/{text,single,strings}/{train,validation,test}-*.tar, folder/tokenizer, folder/README.md.
    The same arguments give the same bytes.
    """
    folder = Path(folder)
    settings = {"format": FORMAT, **asdict(amounts), **asdict(form)}
    return once(folder, settings, partial(_write, folder, amounts, form))


def _write(folder: Path, amounts: Amounts, form: Form) -> None:
    splits = load_splits()
    for part, split, amount in _parts(amounts):
        stream = _samples(part, split, amount, splits[split], amounts.seed, form)
        stream = watch(stream, amount, f"{part}/{split}")
        write_shards(folder / part, split, stream, samples_per_shard=SAMPLES_PER_SHARD)
    train_tokenizer(folder / "tokenizer")
    rows = "\n".join(f"| {part}/{split} | {n} |" for part, split, n in _parts(amounts))
    images = ", ".join(f"{split} {len(digits.labels)}" for split, digits in splits.items())
    card = _CARD.format(rows=rows, images=images, seed=amounts.seed, **asdict(form))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _parts(amounts: Amounts) -> list[tuple[str, str, int]]:
    """Return (part, split, number of samples) of everything that is written."""
    return [
        ("text", "train", amounts.text),
        ("single", "train", amounts.single),
        ("strings", "train", amounts.strings),
        ("strings", "validation", amounts.validation),
        ("strings", "test", amounts.test),
    ]


_CARD = """# Handwritten digit strings

Made by `tools/quickstart_data.py` of nvmm (seed {seed}); the same arguments give the same bytes.

## Real data
The digits: 1,797 images of 8x8 written by 43 people, *Optical Recognition of Handwritten Digits*
(E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49), licence
CC BY 4.0, as shipped with scikit-learn (`sklearn.datasets.load_digits`). They are split by
image: {images}. No image is in two splits; writers are not told apart, so one writer may be.

## Synthetic data
- Layout: digits are enlarged to 24 to 32 pixels and set in one row or (one string in five) two,
  with random gaps and margins. 5 % of the strings have one digit, the others 2 to 6 alike often.
- Questions: "Read the number." (80 %), "Which digit is number k?" (12 %), "How many digits are
  there?" (8 %). Answers follow from the labels.
- Training images only: each digit is rotated up to 0.22 rad, sheared, scaled, shifted and
  dimmed. Validation and test digits are shown as they are.
- `text`: the same task without images. Digits stand as text in the four slots of each tile (tags:
  {tags}). It stands in for the language pretraining of a real system, in this task's own format.
- Images in a sample of `text` and `strings`: at most {max_images}.

## Parts
| part | samples |
|---|---|
{rows}

`text` and `single` (one digit, one tile) prepare, `strings` is the task. Recipes are chosen on
`strings/validation`; `strings/test` is for reporting.

## Format
Webdataset tar shards. A sample is `KEY.json`, either `question`, `answer` and `kind`, or
`conversations`, and, but for `text`, `KEY.png` (8-bit grey; `KEY.0.png`, `KEY.1.png`, ... where a
sample may have several). `tokenizer/` is a byte-level BPE in
the Hugging Face format, where every digit and tile tag is one token.
"""
