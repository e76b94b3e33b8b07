"""The quickstart's data: truth of the answers, splits, tilings, and reproducible bytes."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from nvmm.data.loader import Data
from nvmm.data.prepare import digits
from nvmm.data.samples.chat import ImageTags, Variant
from nvmm.data.samples.images import choose_grid
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from tests.data.conftest import template as dialect

AMOUNTS = digits.Amounts(text=300, single=60, strings=300, validation=20, test=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    assert digits.build(path, AMOUNTS)
    return path


def records(folder: Path, part: str) -> list[dict]:
    dataset = Dataset(str(folder / f"{part}-*.tar"), build=dict)
    return [json.loads(dataset.members(i)["json"]) for i in range(len(dataset))]


def test_splits_share_no_image() -> None:
    splits = digits.load_splits()
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    seen = [{pixels.tobytes() for pixels in split.pixels} for split in splits.values()]
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))


def test_upright_digits_are_drawn_faithfully() -> None:
    split = digits.load_splits()["test"]
    drawn = digits.draw_digit(split.pixels[0], 28, random.Random(0), augment=False)
    source = Image.fromarray(split.pixels[0])
    frame = (0.75, 0.75, 9.25, 9.25)  # the middle 85 %
    expected = source.resize((28, 28), Image.Resampling.BILINEAR, box=frame)
    assert np.corrcoef(np.asarray(drawn).ravel(), np.asarray(expected).ravel())[0, 1] > 0.995


def test_augmentation_differs_each_time() -> None:
    split = digits.load_splits()["train"]
    rng = random.Random(0)
    drawn = {digits.draw_digit(split.pixels[0], 28, rng, augment=True).tobytes() for _ in range(9)}
    assert len(drawn) == 9


@pytest.mark.parametrize(
    ("kind", "answers"),
    [("read", {"407"}), ("count", {"3"}), ("digit", {"4", "0", "7"})],
)
def test_answers_are_true(kind: str, answers: set[str]) -> None:
    rng = random.Random(0)
    found = set()
    for _ in range(50):
        question, answer = digits.ask([4, 0, 7], kind, rng)
        found.add(answer)
        if kind == "digit":
            place = int(question.removesuffix("?").rsplit(" ", 1)[1])
            assert answer == "407"[place - 1]
    assert found == answers


def test_text_samples_hold_their_answer_in_order() -> None:
    rng = random.Random(5)
    for _ in range(300):
        human, gpt = digits.text_sample(rng)["conversations"]  # type: ignore[misc]
        block, question = human["value"].split("</Image>\n")
        tiles = block.removeprefix("<Image>").split("<tile_")[1:]
        shown = "".join(
            left + right for left, right in (_halves(tile.split(">", 1)[1]) for tile in tiles)
        )
        if question == "Read the number.":
            assert _is_subsequence(gpt["value"], shown)


def _halves(slots: str) -> tuple[str, str]:
    values = slots.replace(digits.BLANK, "_")
    assert len(values) == 4
    return values[0].strip("_") or values[2].strip("_"), values[1].strip("_") or values[3].strip(
        "_"
    )


def _is_subsequence(short: str, long: str) -> bool:
    stream = iter(long)
    return all(char in stream for char in short)


def test_images_yield_one_to_six_tiles(folder: Path) -> None:
    dataset = Dataset(str(folder / "strings" / "train-*.tar"), build=dict)
    counts = set()
    for number in range(len(dataset)):
        image = Image.open(io.BytesIO(dataset.members(number)["png"]))
        cols, rows = choose_grid(*image.size, tile_size=32)
        counts.add(cols * rows)
    assert counts == {1, 2, 3, 4, 5, 6}


def test_parts(folder: Path) -> None:
    strings = records(folder, "strings/train")
    assert len(strings) == 300
    kinds = [record["kind"] for record in strings]
    assert kinds.count("read") > kinds.count("digit") > kinds.count("count") > 10
    assert {len(record["answer"]) for record in strings if record["kind"] == "read"} == {
        1,
        2,
        3,
        4,
        5,
        6,
    }
    assert all(len(record["answer"]) == 1 for record in records(folder, "single/train"))
    assert len(records(folder, "strings/validation")) == 20
    assert len(records(folder, "strings/test")) == 40
    card = (folder / "README.md").read_text()
    assert "CC BY 4.0" in card
    assert "| strings/train | 300 |" in card


def test_same_amounts_same_bytes(folder: Path, tmp_path: Path) -> None:
    digits.build(tmp_path, AMOUNTS)
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and ".nvmm-index" not in path.parts
    )
    assert len(files) > 6
    for path in files:
        mine, other = ((root / path).read_bytes() for root in (folder, tmp_path))
        assert hashlib.sha256(mine).digest() == hashlib.sha256(other).digest(), path


def test_complete_data_are_kept_and_changed_arguments_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "SAMPLES_PER_SHARD", 2)
    few = digits.Amounts(text=2, single=2, strings=6, validation=1, test=1)
    assert digits.build(tmp_path, few)
    shards = sorted(path.name for path in (tmp_path / "strings").glob("train-*"))
    assert len(shards) == 3
    assert not digits.build(tmp_path, few)
    fewer = digits.Amounts(text=2, single=2, strings=1, validation=1, test=1)
    assert digits.build(tmp_path, fewer)
    assert [path.name for path in (tmp_path / "strings").glob("train-*")] == ["train-00000.tar"]


def test_every_sample_builds_within_the_configured_length(folder: Path) -> None:
    tokenizer = Tokenizer(str(folder / "tokenizer"))
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    for part in ("text", "single", "strings"):
        dataset = Dataset(str(folder / part / "train-*.tar"), build)
        bound = Data(10_000, 0, dataset, tokenizer=tokenizer).train
        longest = max(len(bound[i].text.tokens) for i in range(len(bound)))
        assert longest <= 64, part


@pytest.mark.parametrize("tags", get_args(Variant))
def test_text_announces_tiles_as_its_form_says(tags: str) -> None:
    drawn = [digits.text_sample(random.Random(n), digits.Form(tags)) for n in range(40)]
    plain = [digits.text_sample(random.Random(n), digits.Form("none")) for n in range(40)]
    marks = {
        "none": "",
        "1d": "<tile_2>",
        "2d_grid": "<tile_x1_y0>",
        "2d_bbox": "<box>(32,0),(64,32)",
    }
    found = [sample["conversations"][0]["value"] for sample in drawn]  # type: ignore[index]
    assert any(marks[tags] in text for text in found)
    for text, sample in zip(found, plain, strict=True):
        without = re.sub(r"<tile_\w+>|<box>.*?</box>", "", text)
        assert without == sample["conversations"][0]["value"]  # type: ignore[index]


def test_several_images_are_asked_about_by_number() -> None:
    split, rng = digits.load_splits()["test"], random.Random(3)
    record, images = digits.images_sample(split, rng, counts=[2, 3, 1], train=True)
    turns = record["conversations"]
    assert len(images) == 3
    assert turns[0]["value"].startswith("<image>\n" * 3 + "Image ")  # type: ignore[index]
    asked = re.findall(r"Image (\d):", json.dumps(turns))
    assert sorted(asked) == ["1", "2", "3"]
    lengths = {"1": 2, "2": 3, "3": 1}
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):  # type: ignore[index]
        image = re.search(r"Image (\d): ", human["value"])
        if human["value"].endswith("Read the number."):
            assert len(gpt["value"]) == lengths[image[1]]
        assert gpt["value"].isdigit()
    record, _ = digits.images_sample(split, rng, counts=[2, 3], train=False)
    assert record.keys() == {"question", "answer", "kind"}
    assert re.match(r"Image [12]: ", str(record["question"]))


def test_forms_are_checked_and_kept_with_the_data(tmp_path: Path) -> None:
    few = digits.Amounts(text=2, single=0, strings=4, validation=0, test=1)
    assert digits.build(tmp_path, few)
    assert digits.build(tmp_path, few, form=digits.Form(max_images=2))
    assert not digits.build(tmp_path, few, form=digits.Form(max_images=2))
    names = set(Dataset(str(tmp_path / "strings/train-*.tar"), build=dict).members(0))
    assert "0.png" in names and "png" not in names
    with pytest.raises(ValueError, match=r"tags\.variant=3d must be one of"):
        digits.Form("3d")
    with pytest.raises(ValueError, match="max_images=0 must be at least 1"):
        digits.Form(max_images=0)
