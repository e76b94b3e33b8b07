"""The index on disk: what it says of samples, when it is built anew, token counts."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvmm.batch import IMAGE, Sample, Text
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.forms import MultipleChoice
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, builder_digest, write_shards
from nvmm.data.shards.index import open_index
from tests.data.conftest import chat, image_bytes, vqa
from tests.data.conftest import template as dialect
from tests.data.samples.test_instruct import builder

ROOT = Path(__file__).parents[3]


def shards_of(folder: Path, samples: list[dict[str, Any]], per_shard: int = 2) -> list[str]:
    paths = write_shards(folder, "s", samples, samples_per_shard=per_shard)
    return [str(path) for path in paths]


def rotated(width: int, height: int) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    image = Image.open(io.BytesIO(image_bytes(width, height)))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


MIXED = [
    {**vqa(png=image_bytes(100, 32)), "__key__": "a"},
    {**vqa("How many digits are there?", "3"), "__key__": "b"},
    {**chat(("human", "<image> <image>?"), ("gpt", "No"), _0_jpg=image_bytes(64, 48, kind="jpg"),
            _1_png=image_bytes(20, 90)), "__key__": "dir/c"},
    {**vqa(jpg=rotated(96, 32)), "__key__": "d"},
    {**vqa(answer="long " * 40, png=image_bytes(180, 32)), "__key__": "e"},
]  # fmt: skip


def test_columns(tmp_path: Path) -> None:
    index = open_index(shards_of(tmp_path, MIXED))
    assert len(index) == 5
    assert [index.key(n) for n in range(5)] == ["a", "b", "dir/c", "d", "e"]
    assert index.columns["shard"].tolist() == [0, 0, 1, 1, 2]
    assert index.image_sizes(0) == [(100, 32)]
    assert index.image_sizes(1) == []
    assert index.image_sizes(2) == [(64, 48), (20, 90)]
    assert index.columns["text"].tolist() == [len(members["json"]) for members in MIXED]
    assert [part.tolist() for part in index.shard_sizes()] == [[0, 2, 4], [2, 2, 1]]
    rough = index.estimates(np.arange(5))
    assert rough[4] > rough[0] > rough[1] > 0
    pixels = {0: 100 * 32, 1: 0, 2: 64 * 48 + 20 * 90, 3: 96 * 32, 4: 180 * 32}
    for number in (4, 2, 0, 1, 3):
        text = len(MIXED[number]["json"])
        assert index.estimates(np.array([number]))[0] == text // 4 + 1 + pixels[number] // 784
    assert index.estimates(np.array([3, 0, 3])).tolist() == rough[[3, 0, 3]].tolist()
    assert isinstance(index.columns["start"], np.memmap)
    assert len(pickle.dumps(index)) < 1000, "workers map the same pages"


def test_processes_build_the_same(tmp_path: Path) -> None:
    from nvmm.data.shards import index as module

    shards = shards_of(tmp_path / "a", MIXED)
    alone = open_index(shards)
    again = shards_of(tmp_path / "b", MIXED)
    before, module._FEW_BYTES = module._FEW_BYTES, 0
    try:
        several = open_index(again, workers=2)
    finally:
        module._FEW_BYTES = before
    for name, column in alone.columns.items():
        assert np.array_equal(column, several.columns[name]), name


def test_a_changed_shard_is_indexed_anew(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, MIXED)
    first = open_index(shards)
    built = (first.path / "index.json").stat().st_mtime_ns
    assert (open_index(shards).path / "index.json").stat().st_mtime_ns == built
    shards_of(tmp_path, [*MIXED[:1], *MIXED[2:], MIXED[1]])
    assert [open_index(shards[:2]).key(n) for n in range(4)] == ["a", "dir/c", "d", "e"]
    status = os.stat(shards[0])
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert (open_index(shards).path / "index.json").stat().st_mtime_ns > built
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved)  # with its times: the index moves along
    copied = [str(moved / Path(shard).name) for shard in shards]
    stamp = (moved / first.path.relative_to(tmp_path) / "index.json").stat().st_mtime_ns
    assert (open_index(copied).path / "index.json").stat().st_mtime_ns == stamp


def test_a_sample_that_is_not_the_indexed_one_is_bad(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, MIXED[:2])
    dataset = Dataset(shards, build=lambda members: members)
    assert len(dataset) == 2
    other = [{**MIXED[0], "__key__": "x"}, MIXED[1]]
    shards_of(tmp_path, other)
    with pytest.raises(ValueError, match=r"s-00000\.tar:a: the file changed after it was indexed"):
        dataset.members(0)


def test_shards_that_cannot_hold_their_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = shards_of(tmp_path / "data", MIXED)
    index = open_index(shards, str(tmp_path / "kept"))
    assert index.path.is_relative_to(tmp_path / "kept")
    assert not (tmp_path / "data" / ".nvmm-index").exists()

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with monkeypatch.context() as inner:
        inner.setattr(
            "nvmm.data.shards.index._build", lambda path, *rest: shutil.copytree(index.path, path)
        )
        temporary = open_index(shards)
    assert not temporary.path.is_relative_to(tmp_path / "data")
    assert temporary.key(2) == "dir/c"
    assert "is not kept (read-only); name a folder with data.train.index_dir" in caplog.text


def test_damage_is_refused_or_passed_over(tmp_path: Path, tiny: Tokenizer) -> None:
    shards = shards_of(tmp_path, MIXED, per_shard=3)
    whole = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(whole[: whole.index(b"dir/c.1.png") + 600])
    dataset = Dataset(shards, build=lambda: Plain(tokenizer=tiny, sequence_length=8))
    with pytest.raises(ValueError, match=r"s-00000\.tar:.*truncated or damaged"):
        len(dataset.bind())
    tolerant = dataset.bind(skip_damage=True)
    keys = [tolerant.members(n)["__key__"] for n in range(len(tolerant))]
    assert keys == ["a", "b", "dir/c", "d", "e"]
    assert "1.png" not in tolerant.members(2) and "0.jpg" in tolerant.members(2)
    [line] = tolerant.index.damage
    assert "truncated" in line


@pytest.mark.parametrize("template", ["chatml", "pretraining"])
def test_counted_tokens_are_those_of_the_built_sample(
    tmp_path: Path, tiny: Tokenizer, template: str
) -> None:

    build = builder(tiny, template=dialect(template), sequence_length=48)
    dataset = Dataset(shards_of(tmp_path, MIXED), build)
    expected = []
    for number in range(5):
        sample = dataset[number]
        media = sample.text.media.get(IMAGE)
        expected.append([len(sample.text.tokens), 0 if media is None else len(media.values)])
    assert dataset.lengths.tolist() == expected
    assert expected[4][0] == 48, "text was cut"
    assert dataset.lengths.flags.writeable is False or isinstance(dataset.lengths, np.memmap)


class Plain(Builder):
    """A builder that cannot measure and refuses sample b."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def __call__(self, members: dict[str, Any]) -> Sample:
        self.calls += 1
        if members["__key__"] == "b":
            raise ValueError("refused")
        return Sample((Text(torch.zeros(len(members["json"])), torch.zeros(3)),))


def test_other_builders_are_measured_by_building(tmp_path: Path, tiny: Tokenizer) -> None:
    build = Plain(tokenizer=tiny, sequence_length=8)
    dataset = Dataset(shards_of(tmp_path, MIXED), build)
    expected = [[len(m["json"]), 0] for m in MIXED]
    expected[1] = [-1, -1]
    assert dataset.lengths.tolist() == expected
    other = Dataset(dataset.patterns, build)
    build.calls = 0
    digest = builder_digest(build)
    assert other.index.lengths(digest) is not None
    assert other.lengths.tolist() == expected and build.calls == 0


def test_a_builder_s_fault_is_said_while_counting(
    tmp_path: Path,
    tiny: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bad samples are named; counts of bad ones alone are not kept, or they outlive the repair."""
    build = Plain(tokenizer=tiny, sequence_length=8)
    dataset = Dataset(shards_of(tmp_path, MIXED), build)
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "__call__", lambda self, members: self.missing)
        with pytest.raises(ValueError, match=r"5 of 5 .*: .*:a: AttributeError: 'Plain' object"):
            _ = dataset.lengths
    assert dataset.index.lengths(builder_digest(build)) is None
    assert (dataset.lengths[:, 0] >= 0).tolist() == [True, False, True, True, True]
    assert "1 of 5 samples cannot be built, the first: " in caplog.text
    assert ":b: ValueError: refused" in caplog.text


def test_a_damaged_index_is_built_anew(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, MIXED)
    path = open_index(shards).path / "index.json"
    for content in ("", "[]", "{}", path.read_text()[:-9]):
        path.write_text(content)
        assert open_index(shards).key(4) == "e"


def test_a_digest_depends_on_what_counts(make_shards: Callable[..., str], tiny: Tokenizer) -> None:
    same = {builder_digest(builder(tiny)) for _ in range(2)}
    others = {
        builder_digest(builder(tiny, sequence_length=65)),
        builder_digest(builder(tiny, max_tiles=2)),
        builder_digest(Plain(tokenizer=tiny, sequence_length=64)),
    }
    assert len(same) == 1 and len(same | others) == 4
    plain = Plain(tokenizer=tiny, sequence_length=64)
    plain.calls = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Plain\.calls=<object object at .* no stable text form"):
        builder_digest(plain)


def test_json_alone_says_what_was_indexed(tmp_path: Path) -> None:
    index = open_index(shards_of(tmp_path, MIXED))
    facts = json.loads((index.path / "index.json").read_text())
    assert facts["num_samples"] == 5 and facts["samples_per_shard"] == [2, 2, 1]
    assert facts["shards"] == ["s-00000.tar", "s-00001.tar", "s-00002.tar"]
    assert facts["damage"] == []


def test_the_command_indexes_and_counts(make_shards: Callable[..., str], tiny: Tokenizer) -> None:
    pattern = make_shards(9)
    command = [sys.executable, "tools/shard.py", "index"]
    config = ["experiment=nvlm_d/quickstart", f"tokenizer.path={tiny.path}"]
    blend = f"data.blend=[{{name: a, shards: '{pattern}'}}]"
    for arguments, expected in (
        ([pattern], f"9 samples in 3 shards: {Path(pattern).parent}/.nvmm-index/"),
        (["--config", *config, "data.train.shards=null", blend], "a: 9 samples, 0 bad, "),
    ):
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected), done.stdout
    [index] = (Path(pattern).parent / ".nvmm-index").glob("*/index.json")
    assert len(list(index.parent.glob("lengths-*"))) == 1


def test_token_counts_outlive_an_older_index(tmp_path: Path, tiny: Tokenizer) -> None:
    shards = shards_of(tmp_path, MIXED)
    dataset = Dataset(shards, lambda **options: builder(**options)).bind(tokenizer=tiny)
    counted = dataset.lengths.tolist()
    path = dataset.index.path
    facts = json.loads((path / "index.json").read_text())
    del facts["kinds"]
    (path / "index.json").write_text(json.dumps(facts | {"version": 1}))
    again = open_index(shards)
    digest = builder_digest(dataset.build)
    assert again.kinds == {"0.jpg": 1, "0.png": 1, "jpg": 1, "json": 5, "png": 2}
    kept = again.lengths(digest)
    assert kept is not None and kept.tolist() == counted
    shards_of(tmp_path, MIXED[::-1])
    assert open_index(shards).lengths(digest) is None, "of other samples they are not kept"


def test_a_default_that_came_later_keeps_the_digest(tiny: Tokenizer) -> None:
    plain = builder(tiny)
    assert "unread" not in vars(plain)
    assert builder_digest(builder(tiny, unread=[])) == builder_digest(plain)
    assert builder_digest(builder(tiny, unread=[".txt"])) != builder_digest(plain)
    assert repr(MultipleChoice("x")) == "MultipleChoice(instruction='x')"
    assert repr(MultipleChoice("x")) != repr(MultipleChoice("x", "number"))


@pytest.mark.parametrize(
    ("options", "says", "sees"),
    [
        ({}, "5 samples, 4 with pictures (5 pictures)", True),
        (
            {"fields": {"image": ".png"}, "unread": [".jpg"]},
            "5 samples, 2 with pictures (2 pictures); not read by build.unread: .jpg 1; NOT READ:"
            " .0.jpg 1, .0.png 1: samples that have one are bad",
            True,
        ),
        (
            {"unread": [".*png", ".*jpg"]},
            "5 samples, 0 with pictures (0 pictures); not read by build.unread: .0.jpg 1, .0.png 1,"
            " .jpg 1, .png 2",
            False,
        ),
    ],
)
def test_contents(tmp_path: Path, tiny: Tokenizer, options: Any, says: str, sees: bool) -> None:
    dataset = Dataset(shards_of(tmp_path, MIXED), lambda **more: builder(**options, **more))
    assert dataset.bind(tokenizer=tiny).contents() == (says, sees)
