"""BEIR's and M-BEIR's layouts are read alike."""

from pathlib import Path
from typing import Any

import pytest

from nvmm.data.prepare.layouts import BeirFolder, MBeirFiles
from nvmm.data.prepare.mbeir import Item
from tests.data.prepare.test_mbeir import POOL, QUERIES, ROWS, write


@pytest.fixture
def mbeir(tmp_path: Path) -> dict[str, str]:
    write(tmp_path / "pool", POOL)
    write(tmp_path / "queries", QUERIES)
    (tmp_path / "instructions").write_text("\n".join(ROWS))
    names = ("pool", "queries", "instructions")
    return {"folder": "pictures"} | {name: str(tmp_path / name) for name in names}


def test_mbeir(mbeir: dict[str, str], tmp_path: Path) -> None:
    data = MBeirFiles(**mbeir)
    assert data.documents["1:3"] == Item("Both.", "pictures/im/3.jpg", "image,text")
    assert data.questions["1:8"].image is None
    # Without qrels the queries name what is relevant to them; the first one says what they seek.
    assert data.relevant == {"1:7": {"1:3": 1, "1:2": 1}, "1:8": {"1:1": 1}}
    assert data.targets == {"1:7": "image,text", "1:8": "text"}
    assert data.prompts == {"1:7": "Find both.", "1:8": "Find words."}
    assert data.modalities["1:2"] == "image"
    (tmp_path / "qrels").write_text("1:7 0 1:2 1 7\n1:7 0 1:3 0 7\n")
    judged = MBeirFiles(**mbeir, qrels=str(tmp_path / "qrels"))
    assert judged.prompts == {"1:7": "Find a picture."}


def test_beir(tmp_path: Path) -> None:
    documents = [{"_id": "d", "title": "A", "text": "b", "modality": "image"}]
    write(tmp_path / "corpus.jsonl", documents)
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "c"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t2\n")
    data = BeirFolder(str(tmp_path), "dev")
    assert data.documents == {"d": Item("A b", None, "text")}
    assert data.questions == {"q": Item("c", None, "text")}
    assert data.relevant == data.judgements == {"q": {"d": 2}}
    assert data.modalities == {"d": "image"}
    assert data.prompts is None


@pytest.mark.parametrize(
    ("changes", "read", "message"),
    [
        ({"pool": "gone"}, "documents", "gone cannot be read"),
        ({"queries": None}, "questions", r"job\.data\.queries is not given"),
        ({"instructions": None}, "prompts", r"job\.data\.instructions is not given"),
        ({"qrels": "gone"}, "relevant", "gone cannot be read"),
    ],
)
def test_what_is_missing_is_named(
    mbeir: dict[str, str], changes: dict[str, Any], read: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(MBeirFiles(**(mbeir | changes)), read)


def test_judgements_of_others_are_refused(mbeir: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("1:7 0 9:9 1 7\n")
    with pytest.raises(ValueError, match=r"1 of their candidates are not in it: \['9:9'\]"):
        assert MBeirFiles(**mbeir, qrels=str(tmp_path / "qrels")).targets
