"""A user's LLaVA-style JSON to shards to samples."""

from __future__ import annotations

import base64
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


RECORD = {"id": 1, "image": "c.png", "question": "q", "answer": "7"}


def line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.json", b"\xef\xbb\xbf[" + line(RECORD) + b"]", 1),
        ("a.jsonl", b"\xef\xbb\xbf" + line(RECORD), 1),
        ("a.jsonl", line(RECORD | {"note": "a\u2028b\u2029c\u0085d"}) * 2, 2),
        ("a.jsonl", line(RECORD).replace(b"\n", b"\r\n") * 2 + b"\r\n", 2),
    ],
)
def test_json_as_other_systems_write_it(
    tmp_path: Path, images: Path, name: str, content: bytes, count: int
) -> None:
    (tmp_path / name).write_bytes(content)
    found = list(json_records.samples(json_records.read_records(tmp_path / name), images))
    assert ["png" in sample for sample in found] == [True] * count


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_other_encodings_name_the_file(tmp_path: Path, name: str) -> None:
    for content in (json.dumps([RECORD]).encode("utf-16"), b'{"a": "\xe9t\xe9"}', b"[" * 100_000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}.* in UTF-8"):
            json_records.read_records(tmp_path / name)


@pytest.mark.parametrize("image", [123, [123], {"path": "c.png"}, True, ["c.png", 0]])
def test_odd_names_are_of_a_record(images: Path, image: Any) -> None:
    with pytest.raises(ValueError, match=r"record 0 \(id 1\): image must be a file name"):
        list(json_records.samples([RECORD | {"image": image}], images))


@pytest.mark.parametrize("image", [None, "", [], [None], float("nan")])
def test_no_name_is_no_picture(images: Path, image: Any) -> None:
    [found] = json_records.samples([RECORD | {"image": image}], images)
    assert sorted(found) == ["__key__", "json"]


def test_linked_folders_and_pictures(tmp_path: Path, images: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "sub").symlink_to(images / "sub")
    (tmp_path / "linked" / "one.png").symlink_to(images / "c.png")
    records = [{"image": ["sub/a.b.JPG", "sub/../one.png"]}]
    [found] = json_records.samples(records, tmp_path / "linked")
    assert found["0.jpg"] == (images / "sub" / "a.b.JPG").read_bytes()
    assert found["1.png"] == (images / "c.png").read_bytes()


def test_the_plural_is_read(images: Path) -> None:
    record = {"images": ["c.png", "sub/a.b.JPG"], "messages": []}
    [found] = json_records.samples([record], images)
    assert sorted(found) == ["0.png", "1.jpg", "__key__", "json"]


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"image": "c.png"}, "image"),
        ({"images": ["c.png"]}, "images"),
        ({"images": [{"path": "c"}]}, "images"),
        ({"video": "c"}, "video"),
        ({"screenshot": "c.png"}, "screenshot"),
        ({"pages": ["c.png", "d.png"]}, "pages"),
        ({"sound": "a.wav"}, "sound"),
        ({"messages": [{"role": "user", "content": "q", "image": "c.png"}]}, "messages"),
        (
            {
                "messages": [
                    {"content": [{"type": "image_url", "image_url": {"url": "http://x/c.png"}}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_a_key_that_names_files_is_read_or_unread(record: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"record 0 .*: {key} names files .*--unread {key}"):
        list(json_records.samples([record], {}))
    [found] = json_records.samples([record], {}, unread=[key])
    assert json.loads(found["json"]) == record


def test_texts_that_look_like_files_are_texts(images: Path) -> None:
    record: dict[str, Any] = {"id": "a.png", "answer": "b.png", "url": "http://x/c.png"}
    record |= {"image_url": "http://x/c.png", "size": 3, "file_name": "c.png", "image": "c.png"}
    record["messages"] = [{"role": "user", "content": [{"type": "image"}]}]
    [found] = json_records.samples([record], images)
    assert json.loads(found["json"]) == record
    with pytest.raises(ValueError, match="image cannot be both read and unread"):
        list(json_records.samples([record], images, unread=["image"]))


def test_pictures_in_base64_become_members(images: Path) -> None:
    data = (images / "c.png").read_bytes()
    text = base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    record = {"picture": text, "messages": [{"role": "user", "content": [part]}]}
    [found] = json_records.samples([record], {})
    assert (found["0.png"], found["1.png"]) == (data, data)
    kept = json.loads(found["json"])
    assert kept["picture"] == "image 0"
    assert kept["messages"][0]["content"][0]["image_url"] == {"url": "image 1"}


def test_base64_of_every_kind(images: Path) -> None:
    def read(text: str) -> dict[str, Any]:
        [found] = json_records.samples([{"picture": text}], {})
        return found

    noisy = bytes(range(256)) * 2
    for kind in ("png", "jpg", "bmp", "tiff", "webp", "gif"):
        data = image_bytes(32, 32, kind=kind)
        plain = base64.b64encode(data).decode()
        safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
        for text in (
            plain,
            safe,
            f"data:image/x;charset=utf-8;base64,{plain}",
            f"DATA:;base64,{safe}",
        ):
            assert [data] == [
                found for name, found in read(text).items() if name not in ("__key__", "json")
            ]
    for head in (b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypavif", b"ID3\4", b"%PDF-1.7"):
        with pytest.raises(ValueError, match=r"column picture: 5.. bytes of no known format"):
            read(base64.b64encode(head + noisy).decode())
    with pytest.raises(ValueError, match="column picture: a data URL whose base64 is damaged"):
        read("data:image/png;base64,iVBORw0KGgoAA")
    with pytest.raises(ValueError, match="column picture: a file in base64 stands within a text"):
        read(f"See ![](data:image/png;base64,{base64.b64encode(noisy).decode()})")
    words = "many words without a comma or a stop " * 4
    assert json.loads(read(words)["json"]) == {"picture": words}


def test_keys_of_no_record_are_typing_errors(images: Path) -> None:
    with pytest.raises(ValueError, match="--unread vidoe is no key of any record"):
        list(json_records.samples(RECORDS, images, unread=["vidoe"]))
    with pytest.raises(ValueError, match="--files imgae is no key of any record"):
        list(json_records.samples(RECORDS, {"image": images, "imgae": images}))
