"""MMC4's lines and pictures become samples that the form of interleaved documents reads."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvmm.commands import shard


def picture(level: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(data, kind)
    return data.getvalue()


def info(name: str, place: int, **more: Any) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": place, "raw_url": f"http://x/{name}", **more}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["shard.py", "mmc4", *arguments])
    shard.main()


def read(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                samples.setdefault(key, {})[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return list(samples.values())


def test_pictures_that_cannot_be_had_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(picture(1))
    (images / "b.jpg").write_bytes(picture(2, "JPEG"))
    (images / "broken.png").write_bytes(picture(3)[:40])
    documents = [
        {"url": "u", "text_list": ["s0", "s1"], "similarity_matrix": [[0.1]], "image_info": [
            info("gone.png", 0), info("b.jpg", 1), info("a.png", 0), info("broken.png", 1),
        ]},
        {"text_list": ["alone"], "image_info": [info("gone.png", 0)]},
        {"text_list": ["one"], "image_info": [info("a.png", 0)]},
    ]  # fmt: skip
    lines = tmp_path / "docs_0.jsonl"
    lines.write_text("\n".join(map(json.dumps, documents)))
    run(monkeypatch, "--json", str(lines), "--images", str(images), "--to", str(tmp_path / "out"))
    first, second = read(tmp_path / "out")
    assert (first["0.jpg"], first["1.png"]) == (picture(2, "JPEG"), picture(1))
    record = json.loads(first["json"])
    assert record["text_list"] == ["s0", "s1"] and "similarity_matrix" not in record
    assert [i["matched_text_index"] for i in record["image_info"]] == [1, 0]
    assert second["png"] == picture(1)
    out = capsys.readouterr().out
    assert "2 pictures missing and 1 damaged of 6" in out
    assert "document 2 has no picture left of 1" in out


def test_pictures_in_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = base64.b64encode(picture(7)).decode()
    infos = [info("a", 0, image_base64=encoded), info("b", 0, image_base64="%%"), info("c", 0)]
    lines = tmp_path / "docs.jsonl"
    lines.write_text(json.dumps({"text_list": ["s"], "image_info": infos}))
    run(monkeypatch, "--json", str(tmp_path / "*.jsonl"), "--to", str(tmp_path / "out"))
    [sample] = read(tmp_path / "out")
    assert sample["png"] == picture(7)
    assert encoded[:20] not in sample["json"].decode()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "document 1 is none of MMC4: it needs text_list and image_info"),
        ({"text_list": ["s"], "image_info": [3]}, "image_info must hold objects, got 3"),
        ({"text_list": ["s"], "image_info": [info("../x.png", 0)]}, "lies outside"),
        ({"text_list": ["s"], "image_info": [info("no.png", 0)]}, "all 1 are left out"),
    ],
)
def test_what_is_none_of_mmc4_is_refused(
    record: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        run(
            monkeypatch,
            *("--json", str(tmp_path / "d.jsonl"), "--images", str(tmp_path)),
            *("--to", str(tmp_path / "out")),
        )
    with pytest.raises(ValueError, match="matches no file"):
        run(monkeypatch, "--json", str(tmp_path / "none-*"), "--to", str(tmp_path / "out"))
