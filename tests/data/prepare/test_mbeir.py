"""M-BEIR's files become samples of retrieval."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.prepare import mbeir

POOL = [
    {"did": "1:1", "txt": "a red dress", "img_path": None, "modality": "text"},
    {"did": "1:2", "txt": None, "img_path": "im/2.jpg", "modality": "image"},
    {"did": "1:3", "txt": '"both" ', "img_path": "im/3.jpg", "modality": "image,text"},
    {"did": "1:4", "txt": "Fine?", "img_path": "", "modality": "text"},
]
QUERIES = [
    {
        "qid": "1:7",
        "query_txt": "like this",
        "query_img_path": "im/2.jpg",
        "query_modality": "image,text",
        "pos_cand_list": ["1:3", "1:2"],
        "neg_cand_list": ["1:1", "1:4"],
    },
    {
        "qid": "1:8",
        "query_txt": "dress",
        "query_img_path": None,
        "query_modality": "text",
        "pos_cand_list": ["1:1"],
        "neg_cand_list": [],
    },
]
ROWS = [
    "dataset_id\tquery_modality\tcand_modality\tname\tprompt_1\tprompt_2",
    "1\timage,text\timage\tx\tFind a picture.\tShow one.",
    "1\timage,text\timage,text\tx\tFind both.\t",
    "1\ttext\ttext\tx\tFind words.\tSay it.",
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "im").mkdir()
    for number in (2, 3):
        (tmp_path / "im" / f"{number}.jpg").write_bytes(bytes([number]))
    (tmp_path / "i.tsv").write_text("\n".join(ROWS))
    return {
        "queries": mbeir.read_queries(write(tmp_path / "q.jsonl", QUERIES)),
        "pool": mbeir.read_pool(write(tmp_path / "p.jsonl", POOL)),
        "instructions": mbeir.read_instructions(tmp_path / "i.tsv"),
        "folder": tmp_path,
    }


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("a dog", "A dog."),
        ('  "a dog!" ', "A dog!"),
        ("What?\r", "What?"),
        ("ünter", "Ünter."),
        ("", ""),
        (None, ""),
        (' "" ', ""),
    ],
)
def test_texts_are_formatted_as_uniir_does(text: str | None, formatted: str) -> None:
    assert mbeir.format_string(text) == formatted


def test_a_query_becomes_a_sample_with_its_pictures(files: dict[str, Any]) -> None:
    first, second = mbeir.samples(**files, num_negatives=1, seed=3)
    record = json.loads(first["json"])
    assert record["query"] == "Like this." and first[record["query_image"]] == b"\2"
    assert record["positive_id"] in ("1:2", "1:3") and record["positive_ids"] == ["1:3", "1:2"]
    picture = b"\2" if record["positive_id"] == "1:2" else b"\3"
    assert first[record["positive_image"]] == picture
    assert len(record["negatives"]) == 1 and record["negative_images"] == [None]
    assert record["negative_ids"][0] in ("1:1", "1:4")
    words = json.loads(second["json"])
    assert (words["query_image"], words["negatives"]) == (None, [])
    assert words["instruction"] in ("Find words.", "Say it.")
    assert set(second) == {"__key__", "json"}
    assert [first, second] == list(mbeir.samples(**files, num_negatives=1, seed=3))
    drawn = {
        json.loads(next(mbeir.samples(**files, seed=seed))["json"])["positive_id"]
        for seed in range(9)
    }
    assert drawn == {"1:2", "1:3"}


def test_mined_negatives_take_the_place_of_the_lists(files: dict[str, Any]) -> None:
    mined = {"1:7": ["1:3", "1:4", "1:1"]}
    first, second = mbeir.samples(**files, num_negatives=2, mined=mined)
    record = json.loads(first["json"])
    assert record["negative_ids"] == ["1:4", "1:1"], "in order, without positives"
    assert record["negatives"] == ["Fine?", "A red dress."]
    assert json.loads(second["json"])["negatives"] == []


def test_what_the_set_cannot_have_is_named(files: dict[str, Any], tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            list(mbeir.samples(**(files | changes)))

    refused(r"no instruction of \(dataset_id, modalities\)", instructions={})
    refused(r"query 1:7: candidates \['1:[23]'\] are not in the pool", pool={})
    (tmp_path / "im" / "2.jpg").unlink()
    refused(r"2\.jpg cannot be read \(No such file")
    for odd, message in (
        ("../q.jpg", "lies outside"),
        ("i.tsv", "must be one of png"),
        ("t.txt", "a pic"),
    ):
        (tmp_path / "t.txt").write_text("no picture")
        pool = {name: replace(item, image=odd) for name, item in files["pool"].items()}
        refused(message, pool=pool, queries={"1:8": files["queries"]["1:8"]})
    for wrong in ({"modality": "image"}, {"modality": "video"}, {"txt": ""}):
        with pytest.raises(ValueError, match="1:1 has"):
            mbeir.read_pool(write(tmp_path / "w.jsonl", [POOL[0] | wrong]))
    for field, value in (("did", 5), ("txt", 5), ("img_path", ["a.png"])):
        with pytest.raises(ValueError, match=r"w\.jsonl: .*5 is no text|needs txt and img_path"):
            mbeir.read_pool(write(tmp_path / "w.jsonl", [POOL[0] | {field: value}]))
    with pytest.raises(ValueError, match="did '1:1' is no text, or that of another line"):
        mbeir.read_pool(write(tmp_path / "w.jsonl", [POOL[0], POOL[0]]))
    with pytest.raises(ValueError, match="1:7 needs lists of ids, has"):
        mbeir.read_queries(write(tmp_path / "w.jsonl", [QUERIES[0] | {"neg_cand_list": "1:1"}]))
    with pytest.raises(ValueError, match="record 1 has no did"):
        mbeir.read_pool(write(tmp_path / "w.jsonl", [{"txt": "a"}]))
    (tmp_path / "qrels.txt").write_text("1:7 0 1:2 1 8\n1:7 0 1:3 0 8\n")
    assert mbeir.read_qrels(tmp_path / "qrels.txt") == {"1:7": {"1:2": 1}}
    # A byte order mark is no part of the first query's id, or of the first column's name.
    (tmp_path / "qrels.txt").write_text("1:7 0 1:2 1 8\r\n", encoding="utf-8-sig")
    assert mbeir.read_qrels(tmp_path / "qrels.txt") == {"1:7": {"1:2": 1}}
    (tmp_path / "i.tsv").write_text("\r\n".join(ROWS), encoding="utf-8-sig")
    assert mbeir.read_instructions(tmp_path / "i.tsv") == files["instructions"]
    (tmp_path / "qrels.txt").write_text("1:7 1:2\n")
    with pytest.raises(ValueError, match=r"qrels\.txt:1: needs qid"):
        mbeir.read_qrels(tmp_path / "qrels.txt")
