"""The command that writes shards: missing pictures, earlier shards, what it says in the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from tests.data.conftest import image_bytes


def test_missing_pictures_and_earlier_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call after another: stop, skip, refuse what is there, replace it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(8, 8))
    records = [{"id": n, "image": "gone.png" if n in (3, 5) else "a.png"} for n in range(7)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, {"id": 7}]))
    command = ["llava", "--json", tmp_path / "r.jsonl", "--images", tmp_path / "images"]
    command += ["--to", tmp_path / "to", "--samples-per-shard", 2]
    skipping = [*command, "--on-missing", "skip"]

    def run(arguments: list[Any]) -> str:
        monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
        shard.main()
        return capsys.readouterr().out

    with pytest.raises(ValueError, match=r"record 3 \(id 3\): image gone.png is not a file"):
        run(command)
    assert list((tmp_path / "to").iterdir()) == []
    done = run(skipping)
    assert "6 samples in 3 shards" in done
    assert "5 with pictures (5 pictures), 1 without" in done
    assert "2 of 8 records left out:\n  record 3 (id 3): image gone.png" in done
    with pytest.raises(
        ValueError, match=r"3 shards train-00000.tar ... train-00002.tar; .*--replace"
    ):
        run(skipping)
    assert "6 samples in 1 shards" in run([*skipping, "--samples-per-shard", 9, "--replace"])
    assert [path.name for path in (tmp_path / "to").glob("*.tar")] == ["train-00000.tar"]
    assert "5 with pictures; members: .json 6, .png 5" in run(["index", tmp_path / "to" / "*.tar"])
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "gone.png"}) + "\n")
    with pytest.raises(ValueError, match=r"no record to write: all 1 are left out; .* gone\.png"):
        run([*skipping, "--replace"])
    twice = ["--files", f"image={tmp_path}", "--files", f"image={tmp_path / 'images'}"]
    with pytest.raises(ValueError, match="--files names a key twice"):
        run(["jsonl", *command[1:3], *command[5:7], *twice])
    assert [path.name for path in (tmp_path / "to").glob("*.tar")] == ["train-00000.tar"]
