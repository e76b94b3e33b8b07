"""A user's LLaVA-style JSON to shards to samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.batch import IMAGE
from nvmm.data.prepare import json_records
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from tests.data.conftest import image_bytes
from tests.data.samples.test_instruct import builder


def talk(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes"}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.b.JPG").write_bytes(image_bytes(64, 32, kind="jpg"))
    (folder / "c.png").write_bytes(image_bytes(32, 32))
    return folder


RECORDS: list[dict[str, Any]] = [
    {"id": "x/1", "image": "sub/a.b.JPG", "conversations": talk("<image>\nWide?")},
    {"id": 2, "image": ["c.png", "sub/a.b.JPG"], "conversations": talk("<image> <image>")},
    {"id": 3, "conversations": talk("Text?")},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_become_samples(tmp_path: Path, images: Path, tiny: Tokenizer, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    lines = "\n".join(map(json.dumps, RECORDS)) + "\n"
    path.write_text(lines if suffix == ".jsonl" else json.dumps(RECORDS))
    write_shards(
        tmp_path / "to", "train", json_records.samples(json_records.read_records(path), images)
    )
    dataset = Dataset(str(tmp_path / "to" / "*.tar"), lambda **options: builder(**options))
    bound = dataset.bind(tokenizer=tiny)
    assert [
        [*bound[i].text.media] and bound[i].text.media[IMAGE].items.tolist() for i in range(3)
    ] == [
        [0, 0, 0],
        [0, 1, 1, 1],
        [],
    ]
    assert json.loads(bound.members(0)["json"])["id"] == "x/1"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../secret.png", r"record 0 \(id 9\): image \.\./secret\.png lies outside"),
        ("/etc/passwd", "lies outside"),
        ("sub/../../secret.png", "lies outside"),
        ("missing.png", "is not a file"),
        ("movie.mp4", "must be one of png, jpg, jpeg, jfif, webp, gif"),
        ("a.heic", r"must be one of .*\.heic: such pictures are not read"),
    ],
)
def test_refuses_bad_paths(tmp_path: Path, images: Path, image: str, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(8, 8))
    with pytest.raises(ValueError, match=message):
        list(json_records.samples([{"id": 9, "image": image, "conversations": []}], images))


def test_refuses_what_is_no_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected a list of objects"):
        json_records.read_records(path)
    path.write_text('{"a": 1}\n{"a": 2}')
    with pytest.raises(ValueError, match=r"not valid JSON .* use \.jsonl"):
        json_records.read_records(path)
