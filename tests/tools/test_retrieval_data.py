"""The command that writes retrieval shards: a refusal is a line, not a traceback."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from nvmm.commands import shard
from nvmm.data.shards.dataset import Dataset


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
    shard.main()


def test_it_writes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{n}", "label": n % 2} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["classes", "--from", tmp_path / "a.jsonl", "--to", tmp_path / "to"]
    command += ["--instruction", "Which?", "--samples-per-shard", 2]
    run(monkeypatch, *command)
    assert "6 samples in 3 shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"to has 3 shards .* --replace"):
        run(monkeypatch, *command)
    run(monkeypatch, *command[:-1], 9, "--replace")
    assert len(Dataset(f"{tmp_path}/to/train-*.tar", build=dict)) == 6
    (tmp_path / "to" / "tr-x.tar").write_bytes(b"")
    for name in ("train-more", "tr"):
        with pytest.raises(ValueError, match=r"NAME-\*\.tar would match both"):
            run(monkeypatch, *command, "--name", name)
    run(monkeypatch, *command, "--name", "test")


@pytest.mark.parametrize(
    ("command", "line", "says"),
    [
        ("classes", '{"text": "a"}', r"a\.jsonl: record 1 has no label"),
        ("classes", "{", r"a\.jsonl:1: no JSON"),
        ("triplets", '{"anchor": "a"}', r"row 1: needs texts anchor"),
        ("triplets", "", "there is no record to write"),
        ("classes", '{"text": 5, "label": 1}', "row 1: text 5 of label 1 is no example"),
        ("classes", '{"text": "a", "label": true}', "row 1: text 'a' of label True is no example"),
        ("classes", '{"text": "a", "label": [1]}', "row 1: text 'a' of label .* is no example"),
        ("beir", "", "Not a directory"),
    ],
)
def test_a_refusal_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, line: str, says: str
) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    more = ["--instruction", "x"] if command == "classes" else []
    with pytest.raises((ValueError, OSError), match=says):
        run(monkeypatch, command, "--from", tmp_path / "a.jsonl", "--to", tmp_path / "to", *more)
    assert not list((tmp_path / "to").glob("*"))


def test_mbeir_says_which_negatives_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = [{"did": f"1:{n}", "txt": f"text {n}", "modality": "text"} for n in range(3)]
    query = {"qid": "1:1", "query_txt": "which", "query_modality": "text"}
    query |= {"pos_cand_list": ["1:0"], "neg_cand_list": ["1:1"]}
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(c) + "\n" for c in candidates))
    (tmp_path / "q.jsonl").write_text(json.dumps(query) + "\n")
    (tmp_path / "mined.jsonl").write_text('{"query_id": "1:1", "ids": ["1:2"]}\n')
    (tmp_path / "i.tsv").write_text(
        "dataset_id\tquery_modality\tcand_modality\tprompt_1\n1\ttext\ttext\tFind.\n"
    )
    command = ["mbeir", "--from", tmp_path / "q.jsonl", "--pool", tmp_path / "pool.jsonl"]
    command += ["--instructions", tmp_path / "i.tsv", "--images", tmp_path]

    def written(name: str, *options: object) -> list[str]:
        run(monkeypatch, *command, "--to", tmp_path / name, *options)
        with tarfile.open(tmp_path / name / "train-00000.tar") as shard:
            [record] = [shard.extractfile(member) for member in shard if member.isfile()]
            return list(json.load(record)["negative_ids"])

    said = "the neg_cand_list of 1 queries is left out"
    assert written("none") == [] and said in capsys.readouterr().out
    assert written("own", "--num-negatives", 1) == ["1:1"]
    assert said not in capsys.readouterr().out
    mined = ("--negatives", tmp_path / "mined.jsonl")
    assert written("mined", "--num-negatives", 1, *mined) == ["1:2"]
    assert said in capsys.readouterr().out
    for options in (mined, ("--num-negatives", -1)):
        with pytest.raises(ValueError, match=r"--num-negatives -?[01] must be at least"):
            written("refused", *options)
