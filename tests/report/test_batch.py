"""What a person is shown of a micro-batch, on the quickstart's real digits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from nvmm.batch import ATTENDED_IMAGE, IMAGE, Batch
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.prepare import digits
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from nvmm.report.batch import Segment, segments, to_html, to_text
from tests.data.conftest import template as dialect

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    digits.build(folder, digits.Amounts(text=2, single=2, strings=8, validation=2, test=2))
    return folder


@pytest.fixture(scope="module")
def data(quickstart: Path) -> Data:
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    shards = [str(quickstart / part / "train-*.tar") for part in ("strings", "text")]
    tokenizer = Tokenizer(str(quickstart / "tokenizer"))
    return Data(64, 0, Dataset(shards, build), tokenizer=tokenizer)


def inspect(data: Data, *numbers: int, packed: bool = False) -> tuple[Batch, list[Segment]]:
    samples = [data.train[number] for number in numbers]
    batch = collate(
        samples,
        pad_id=data.tokenizer.pad_id,
        pad_multiple=8,
        segment_multiple=4,  # that of two context-parallel ranks
        packed=packed,
    )
    return batch, segments(batch, data.tokenizer, [sample.source for sample in samples])


@pytest.mark.parametrize("packed", [False, True])
def test_segments_are_the_samples(data: Data, packed: bool) -> None:
    batch, (first, second) = inspect(data, 0, 9, packed=packed)
    sample = data.train[0]
    assert (first.start, first.stop) == (0, len(sample.text.tokens))
    padded = -(-first.stop // 4) * 4
    assert (second.row, second.start) == ((0, padded) if packed else (1, 0))
    assert first.first_position == second.first_position == 0
    assert first.num_targets + second.num_targets == batch.num_tokens
    assert second.source.endswith("000001") and "/text/train-00000.tar" in second.source
    for segment, number in ((first, 0), (second, 9)):
        ids = data.train[number].text.tokens.tolist()
        text = data.tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(stretch.text for stretch in segment.stretches) == text
        assert segment.stretches[-2].kind == "target"
        assert segment.stretches[-2].text.endswith("<|im_end|>")


def test_tiles_have_their_tags_and_spans(data: Data) -> None:
    batch, (segment,) = inspect(data, 0)
    media = batch.media[IMAGE]
    assert [tile.place for tile in segment.tiles] == media.tiles.tolist()
    assert [tile.start for tile in segment.tiles] == media.positions.tolist()
    for tile in segment.tiles:
        expected = f"<tile_{tile.place}>" if tile.place else "<tile_global_thumbnail>"
        assert tile.tag == expected
        assert (batch.tokens[0, tile.start : tile.stop] == media.placeholder_id).all()
    assert inspect(data, 9)[1][0].tiles == []


@pytest.mark.parametrize("attended", ["all", "regular"])
def test_tiles_of_cross_attention(quickstart: Path, attended: str) -> None:
    build = partial(
        InstructBuilder,
        dialect(),
        ImageTags(),
        tokens_per_tile=4,
        tile_size=32,
        attended=attended,
    )
    shards = [str(quickstart / "strings" / "train-*.tar")]
    own = Data(64, 0, Dataset(shards, build), tokenizer=Tokenizer(str(quickstart / "tokenizer")))
    number = next(n for n in range(8) if len(own.train[n].text.media[ATTENDED_IMAGE].tiles) > 1)
    batch, (segment,) = inspect(own, number)
    tiles = {tile.place: tile for tile in segment.tiles}
    tag_size = len(own.tokenizer.encode("<tile_1>"))
    assert tiles[1].tag == "<tile_1>"
    assert tiles[1].keys == 4 + (0 if attended == "all" else tag_size)
    assert tiles[1].stop - tiles[1].start == (tag_size if attended == "all" else 0)
    assert tiles[0].keys == (4 if attended == "all" else 0)
    plain = to_text(batch, [segment], color=False)
    assert f"{tiles[1].keys} keys" in plain
    assert ("{image 0 thumbnail: 4 placeholders}" in plain) == (attended == "regular")
    assert "image 0 tile 1" in to_html(batch, [segment], "tiles")


def test_text_shows_mask_shift_and_borders(data: Data) -> None:
    batch, found = inspect(data, 0, 9, packed=True)
    plain = to_text(batch, found, color=False)
    answer = found[0].stretches[-2].text
    assert f"assistant\n[[{answer}]]" in plain
    assert f"pack borders (cu_seqlens) {batch.cu_seqlens.tolist()}" in plain  # type: ignore[union-attr]
    assert "{image 0 thumbnail: 4 placeholders}" in plain
    assert "\033" not in plain
    colored = to_text(batch, found)
    assert f"\033[1;32m{answer}\033[0m" in colored and "[[" not in colored
    # the label at a place is the token of the next
    lines = found[0].lines
    shifted = [(a.label, b.token) for a, b in itertools.pairwise(lines) if a.weight]
    assert shifted and all(label == token for label, token in shifted)
    everything = to_text(batch, found, color=False, every=True)
    assert "    ..." in plain and "    ..." not in everything
    assert len(everything.splitlines()) > len(plain.splitlines())


def test_html_is_self_contained(data: Data) -> None:
    batch, found = inspect(data, 0)
    page = to_html(batch, found, "a <title>")
    assert page.count("data:image/png;base64,") == len(found[0].tiles)
    assert "a &lt;title&gt;" in page and "&lt;tile_global_thumbnail&gt;" in page
    assert "http" not in page
    assert f'<span class="target">{found[0].stretches[-2].text[:1]}' in page


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/inspect_batch.py", "experiment=nvlm_d/quickstart", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(quickstart: Path, tmp_path: Path) -> None:
    paths = [
        f"data.train.shards=[{quickstart}/strings/train-*.tar]",
        f"tokenizer.path={quickstart}/tokenizer",
    ]
    page = tmp_path / "batch.html"
    done = command(*paths, "sample=3,5", "data.pack=true", "--no-color", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "1 packed row" in done.stdout and "sample 5 (" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    missing = command(*paths, "sample=99")
    assert missing.returncode == 2 and "sample 99 of 8" in missing.stderr
