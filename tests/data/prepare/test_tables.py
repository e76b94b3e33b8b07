"""Parquet files and `datasets` folders, written by the real libraries, to shards to samples."""

from __future__ import annotations

import datetime
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image

from nvmm.batch import IMAGE
from nvmm.data.prepare import json_records
from nvmm.data.prepare.tables import folder_rows, parquet_rows, samples
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.data.shards.storage import expand
from tests.data.conftest import image_bytes
from tests.data.samples.test_decode import sound
from tests.data.samples.test_instruct import builder

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "shard.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_datasets_folder(tmp_path: Path, tiny: Tokenizer) -> None:
    import datasets

    images = [Image.open(io.BytesIO(image_bytes(40 + number, 32, number))) for number in range(5)]
    table = {
        "image": images,
        "question": [f"Which {number}?" for number in range(5)],
        "answers": [["7", str(number)] for number in range(5)],
        "seen": [datetime.date(2026, 1, 1 + number) for number in range(5)],
    }
    saved = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "test": 1}
    )
    done = run("hf", "--from", tmp_path / "saved", "--split", "train", "--to", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert "5 samples in 1 shards" in done.stdout

    dataset = Dataset(str(tmp_path / "shards" / "*.tar"), lambda **options: builder(**options))
    bound = dataset.bind(tokenizer=tiny)
    assert len(bound) == 5
    members = bound.members(4)
    record = json.loads(members["json"])
    assert record == {"question": "Which 4?", "answers": ["7", "4"], "seen": "2026-01-05"}
    assert Image.open(io.BytesIO(members["png"])).tobytes() == images[4].tobytes()
    assert set(bound[2].text.media[IMAGE].items.tolist()) == {0}
    for split, message in (("dev", "--split dev is none of train, test"), (None, "None is none")):
        with pytest.raises(ValueError, match=message):
            list(folder_rows(tmp_path / "saved", split))
    assert [row["question"] for row in folder_rows(tmp_path / "saved", "test")] == ["Which 3?"]

    with pytest.raises(ValueError, match="--split test is not there; it holds one split"):
        list(folder_rows(tmp_path / "saved" / "train", "test"))
    saved.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    rows = list(folder_rows(tmp_path / "hub", "train"))
    assert [row["answers"] for row in rows] == table["answers"]
    with pytest.raises(ValueError, match="nor Parquet files of split test"):
        list(folder_rows(tmp_path / "hub", "test"))


def test_parquet(tmp_path: Path) -> None:
    from pyarrow import parquet

    rows: dict[str, Any] = {
        "pages": [
            [image_bytes(8, 8), image_bytes(9, 9, kind="jpg")],
            [image_bytes(8, 8, kind="webp")],
        ],
        "speech": [sound("FLAC"), None],
        "text": ["a", "b"],
    }
    for number in range(2):
        part = {name: [values[number]] for name, values in rows.items()}
        parquet.write_table(pyarrow.table(part), tmp_path / f"part-{number}.parquet")
    found = list(samples(parquet_rows(expand(str(tmp_path / "part-*.parquet")))))
    assert [sorted(sample) for sample in found] == [
        ["0.png", "1.jpg", "__key__", "json", "speech.flac"],
        ["__key__", "json", "webp"],
    ]
    assert found[0]["1.jpg"] == rows["pages"][0][1]
    assert json.loads(found[1]["json"]) == {"speech": None, "text": "b"}


def test_refusals(tmp_path: Path) -> None:
    outside = {"image": {"bytes": None, "path": "/etc/passwd"}}
    with pytest.raises(ValueError, match="row 0, column image: /etc/passwd is not embedded"):
        list(samples([outside]))
    with pytest.raises(ValueError, match="row 0, column x: 4 bytes of no known format"):
        list(samples([{"x": b"\x80\x04K\x01"}]))
    with pytest.raises(ValueError, match=r"neither state\.json"):
        list(folder_rows(tmp_path))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(ValueError, match=r"\.\./secret\.arrow lies outside"):
        list(folder_rows(tmp_path))
    with pytest.raises(ValueError, match=r"name=\.\./up must be a file name"):
        write_shards(tmp_path, "../up", [])
    with pytest.raises(ValueError, match="name= must be a file name"):
        write_shards(tmp_path, "", [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", "PAR1 and no more"),
        ("state.json", "{"),
        ("state.json", "{}"),
        ("state.json", '{"_data_files": [{"filename": "odd.arrow"}]}'),
        ("dataset_dict.json", "[]"),
        ("dataset_dict.json", '{"splits": null}'),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "odd.arrow").write_text("no table")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/(odd|{name[:4]}).* damaged"):
        list(folder_rows(tmp_path))


def test_records_with_several_kinds_of_files(tmp_path: Path) -> None:
    for folder in ("images", "sounds"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(8, 8))
    (tmp_path / "sounds" / "a.OGG").write_bytes(sound("OGG"))
    (tmp_path / "sounds" / "evil.pkl").write_bytes(b"")
    folders = {"image": tmp_path / "images", "sound": tmp_path / "sounds"}
    record = {"image": "a.png", "sound": "a.OGG", "caption": "x"}
    [found] = json_records.samples([record], folders)
    assert sorted(found) == ["__key__", "json", "png", "sound.ogg"]
    with pytest.raises(ValueError, match=r"sound evil\.pkl must be one of png"):
        list(json_records.samples([{"sound": "evil.pkl"}], folders))

    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    arguments = ["jsonl", "--json", tmp_path / "a.jsonl", "--to", tmp_path / "to"]
    files = [f"--files={key}={folder}" for key, folder in folders.items()]
    assert "1 samples in 1 shards" in run(*arguments, *files).stdout
    refused = run(*arguments, f"--files=image={tmp_path / 'sounds'}")
    assert refused.returncode == 2
    assert f"image a.png is not a file in {tmp_path / 'sounds'}\n" in refused.stderr


def hub(folder: Path, *names: str) -> Path:
    """Parquet files of one row, which tells the file's name."""
    from pyarrow import parquet

    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([{"question": name}]), folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "chosen", "options"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0], {}),
        (["train-00000-of-00001.parquet", "train_extra-00000-of-00001.parquet"], [0], {}),
        (["train.parquet", "train2.parquet"], [0], {}),
        (["default/train/0000.parquet", "default/train/0001.parquet",
          "default/test/0000.parquet"], [0, 1], {}),
        (["en/train-00000-of-00001.parquet", "en2/train-00000-of-00001.parquet"], [0],
         {"config": "en"}),
        (["train/part-00000-ab.parquet", "test/part-00000-ab.parquet"], [0], {}),
    ],
)  # fmt: skip
def test_splits_and_configs_are_exact(
    tmp_path: Path, names: list[str], chosen: list[int], options: dict[str, str]
) -> None:
    folder = hub(tmp_path, *names)
    rows = [row["question"] for row in folder_rows(folder, "train", **options)]
    assert rows == [names[number] for number in chosen]
    with pytest.raises(ValueError, match=r"has (splits|configs) .*; name one by --(split|config)"):
        list(folder_rows(folder))
    with pytest.raises(ValueError, match=r"of split trai; it has .*train|has configs en, en2"):
        list(folder_rows(folder, "trai"))
    with pytest.raises(ValueError, match="--config fr is none of"):
        list(folder_rows(folder, "train", "fr"))


PNG = image_bytes(8, 8)
FILE = {"bytes": PNG, "path": "a.png"}


@pytest.mark.parametrize(
    ("row", "members", "record"),
    [
        ({"images": [FILE, None]}, ["png"], {"images": ["image 0", None]}),
        ({"images": [FILE, {"bytes": None, "path": None}]}, ["png"], {"images": ["image 0", None]}),
        ({"image": FILE | {"width": 4}}, ["png"], {"image": {"width": 4, "file": "image 0"}}),
        ({"image": FILE, "more": [FILE, FILE]}, ["0.png", "1.png", "2.png"], {}),
        (
            {"messages": [{"content": "what", "image": FILE}, {"content": "7", "image": None}]},
            ["png"],
            {
                "messages": [
                    {"content": "what", "image": "image 0"},
                    {"content": "7", "image": None},
                ]
            },
        ),
        (
            {"pages": {"image": [PNG], "id": [3]}},
            ["png"],
            {"pages": {"image": ["image 0"], "id": [3]}},
        ),
        ({"images": [[PNG], [None]]}, ["png"], {"images": [["image 0"], [None]]}),
        ({"a/b": PNG, "": PNG}, ["0.png", "1.png"], {}),
    ],
)
def test_pictures_anywhere_in_a_row(
    tmp_path: Path, row: Any, members: list[str], record: Any
) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    [found] = samples(parquet_rows([tmp_path / "a.parquet"]))
    assert sorted(found) == sorted(["__key__", "json", *members])
    assert all(found[member] == PNG for member in members)
    assert json.loads(found["json"]) == record


def test_members_stay_in_their_sample(tmp_path: Path) -> None:
    rows = [
        {"a/b": b"fLaC1", "c.d": b"fLaC2", "": b"fLaC3", "_e": b"fLaC4", "q": str(i)}
        for i in range(2)
    ]
    write_shards(tmp_path, "t", samples(rows))
    dataset = Dataset(str(tmp_path / "t-*.tar"), build=dict)
    assert len(dataset) == 2
    assert sorted(set(dataset.members(1)) - {"__url__", "__key__"}) == [
        *("a_b.flac", "c_d.flac", "e.flac", "file.flac", "json")
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": list(PNG[:9])}, r"image names files that are not read \(137\)"),
        ({"meta": {"img_path": "a b.png"}}, r"meta names files that are not read \(a b\.png\)"),
        ({"text": "half \ud800"}, "half a character"),
    ],
)
def test_what_is_no_json_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(samples([row]))


def test_columns_that_are_not_read(tmp_path: Path) -> None:
    row = {"question": "q", "features": b"\x80\x04K\x01", "nested": [{"x": b"abc"}]}
    with pytest.raises(ValueError, match=r"row 0, column features: 4 bytes .*--unread features"):
        list(samples([row]))
    with pytest.raises(ValueError, match="row 0, column nested: 3 bytes of no known format"):
        list(samples([row], ["features"]))
    [found] = samples([row], ["features", "nested"])
    assert json.loads(found["json"]) == {"question": "q"}
    with pytest.raises(ValueError, match="--unread feature is none of the columns question"):
        list(samples([row], ["feature"]))
    with pytest.raises(ValueError, match="row 0: image names files that are not read"):
        list(samples([{"image": "a.png"}]))
    with pytest.raises(ValueError, match="row 0, column x: 0 bytes of no known format"):
        list(samples([{"x": b""}]))
    with pytest.raises(ValueError, match=r"two files are called a1\.flac"):
        list(samples([{"a": [sound("FLAC")] * 2, "a1": sound("FLAC")}]))
