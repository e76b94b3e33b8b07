import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image

from nvmm.batch import IMAGE, TextMedia
from nvmm.data.samples.decode import Limits
from nvmm.data.samples.images import tile_image
from nvmm.data.samples.record import Record
from nvmm.evaluation.images import image_fields
from nvmm.report.page import stages, write_report

PNG = base64.b64encode(b"\x89PNG image").decode()
TILE = base64.b64encode(b"\x89PNG tile").decode()
THUMBNAIL = base64.b64encode(b"\x89PNG thumbnail").decode()


def make_run(path, *, name="nvlm_d/tiny", init_from=None, num_steps=20, learning_rate=0.1):
    path.mkdir(parents=True)
    config = {
        "run": {"name": name},
        "init_from": init_from and str(init_from),
        "optim": {"learning_rate": learning_rate},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "overrides.yaml").write_text(yaml.safe_dump(["experiment=nvlm_d/tiny", "seed=<3>"]))
    rows = [
        {
            "step": step,
            "loss": None if step == 5 else 4.0 / step,
            "grad_norm": 1.0,
            "learning_rate": learning_rate,
            "tokens_per_second": 100.0 + step,
        }
        for step in range(1, num_steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "validation.jsonl").write_text('{"step": 10, "validation_loss": 0.7}\n')
    (path / "summary.json").write_text(
        json.dumps(
            {
                "steps": num_steps,
                "train_seconds": 285.2,
                "num_parameters": 912345,
                "git_revision": "abc123",
                "heldout_exact_match": {"overall": 0.75, "read": 0.5},
            }
        )
    )
    return path


def add_predictions(path, lines, benchmark="heldout", checkpoint="step_00000020"):
    folder = path / "evaluation" / benchmark / checkpoint
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def prediction(**changes):
    return {
        "sample_id": 3,
        "source": "test-000.tar/3",
        "kind": "read",
        "question": "Read the number.",
        "answers": ["17"],
        "prediction": "17",
        "score": 1.0,
    } | changes


class Page(HTMLParser):
    """Checks that tags nest, and gathers attributes and text."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data

    def named(self, tag, css=None):
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and (css is None or css in (attrs.get("class") or "").split())
        ]


def read(path):
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_the_page_is_self_contained_and_has_every_part(tmp_path):
    run = make_run(tmp_path / "run")
    add_predictions(
        run,
        [
            prediction(image=PNG, tiles=[TILE, TILE, THUMBNAIL], grid=[2, 1]),
            prediction(kind="count", question="How many?", prediction="4", score=0.0, image=PNG),
        ],
    )
    page = read(run)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe"}
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    source = (run / "report.html").read_text()
    assert "http" not in source and "@import" not in source and "url(" not in source
    # loss linear and logarithmic, learning rate, throughput, gradient norm
    assert len(page.named("svg")) == 5
    for expected in ("75.0 %", "4 min 45 s", "912k", "abc123", "seed=<3>", "learning_rate: 0.1"):
        assert expected in page.text


def test_an_image_is_drawn_with_its_tiles(tmp_path):
    run = make_run(tmp_path / "run")
    add_predictions(run, [prediction(image=PNG, tiles=[TILE] * 6 + [THUMBNAIL], grid=[3, 2])])
    page = read(run)
    images = [(attrs["alt"], attrs["src"]) for attrs in page.named("img")]
    prefix = "data:image/png;base64,"
    assert images == [
        ("image", prefix + PNG),
        *[(f"tile {i}", prefix + TILE) for i in range(1, 7)],
        ("thumbnail", prefix + THUMBNAIL),
    ]
    assert page.named("div", "mosaic")[0]["style"] == "--cols:3"
    assert "3 x 2 tiles" in page.text and "✓ right" in page.text


def test_an_image_of_one_tile_has_no_thumbnail(tmp_path):
    run = make_run(tmp_path / "run")
    add_predictions(run, [prediction(image=PNG, tiles=[TILE], grid=[1, 1])])
    page = read(run)
    assert [attrs["alt"] for attrs in page.named("img")] == ["image", "tile"]
    assert "thumbnail" not in [attrs.get("alt") for attrs in page.named("img")]


def test_accuracy_is_counted_per_kind(tmp_path):
    run = make_run(tmp_path / "run")
    scores = {"read": [1, 1, 0, 1], "count": [0, 1]}
    add_predictions(
        run,
        [prediction(kind=kind, score=float(s)) for kind, each in scores.items() for s in each],
    )
    text = read(run).text
    assert re.search(r"overall66\.7 %6", text)
    assert re.search(r"read75\.0 %4", text)
    assert re.search(r"count50\.0 %2", text)


def test_without_predictions_the_summary_gives_the_accuracy(tmp_path):
    text = read(make_run(tmp_path / "run")).text
    assert re.search(r"read50\.0 %–", text)
    assert "evaluation is not there" in text


def test_every_benchmark_is_shown_with_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    add_predictions(run, [prediction()], checkpoint="step_00000010")
    add_predictions(run, [prediction(), prediction(score=0.0)], checkpoint="step_00000020")
    add_predictions(run, [prediction(kind="all")] * 3, benchmark="chartqa")
    text = read(run).text
    assert "step_00000010" not in text
    assert re.search(r"chartqa, step_00000020questionrightsamplesoverall100\.0 %3held", text)
    assert re.search(r"heldout, step_00000020questionrightsamplesoverall50\.0 %2read", text)


def test_image_fields_are_drawn_as_the_model_saw_them(tmp_path):
    image = Image.new("RGB", (900, 300), "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    cut = tile_image(image, tile_size=28)
    other = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    media = TextMedia(
        values=torch.cat([cut.values, other]),
        positions=torch.arange(5),
        items=torch.tensor([0, 0, 0, 0, 1]),
        tiles=torch.cat([cut.tiles, torch.tensor([0])]),
        placeholder_id=1,
        tokens_per_item=4,
    )
    members = {"json": b"{}", "__key__": "a.b", "1.jpg": b"", "0.png": buffer.getvalue()}
    fields = image_fields(Record(members, {}, Limits()), {IMAGE: media})
    assert fields["grid"] == [3, 1] and len(fields["tiles"]) == 4
    shown = Image.open(io.BytesIO(base64.b64decode(fields["image"])))
    assert shown.size == (640, 213) and shown.getpixel((5, 5)) == (255, 0, 0)
    tile = Image.open(io.BytesIO(base64.b64decode(fields["tiles"][2])))
    assert tile.size == (28, 28) and tile.getpixel((5, 5)) == (255, 0, 0)
    run = make_run(tmp_path / "run")
    add_predictions(run, [prediction(), prediction(sample_id=4)])
    folder = run / "evaluation" / "heldout" / "step_00000020"
    (folder / "images.jsonl").write_text(json.dumps({"sample_id": 3, **fields}) + "\n")
    assert len(read(run).named("img")) == 5
    # An evaluation of earlier has the images in predictions.jsonl.
    add_predictions(run, [prediction(**fields)], benchmark="older")
    assert len(read(run).named("img")) == 10
    assert image_fields(Record({"json": b"{}"}, {}, Limits()), {IMAGE: media}) == {}


def test_what_a_model_says_cannot_become_markup(tmp_path):
    run = make_run(tmp_path / "run", name="<b>name</b>")
    attack = "<img src=x onerror=alert(1)>\"'"
    add_predictions(
        run,
        [
            prediction(
                question=attack,
                answers=[attack],
                prediction=attack,
                source=attack,
                kind=attack,
                image='"><script>',
                score=0.0,
            )
        ],
    )
    page = read(run)
    assert page.named("img") == [] and page.named("script") == [] and "onerror" in page.text
    assert "<b>name</b>" in page.text and "✗ wrong" in page.text


def test_an_empty_run_directory_says_what_is_missing(tmp_path):
    text = read(tmp_path).text
    for name in (
        "metrics.jsonl",
        "evaluation",
        "overrides.yaml",
        "config.yaml",
        "summary.json",
    ):
        assert f"{name} is not there" in text


def test_a_run_being_written_can_be_reported(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "los')
    assert "last training loss0.2" in read(run).text


def test_stages_are_found_by_init_from(tmp_path):
    first = make_run(tmp_path / "first", name="stage/text")
    second = make_run(
        tmp_path / "second",
        name="stage/align",
        init_from=first / "checkpoints" / "step_00000020",
        learning_rate=0.2,
    )
    third = make_run(
        tmp_path / "third", name="stage/last", init_from=second / "checkpoints" / "step_00000020"
    )
    config = yaml.safe_load((third / "config.yaml").read_text())
    assert stages(third, {}, config) == [first, second]
    assert stages(third, {"stages": ["../second", "."]}, config) == [third / "../second"]
    page = read(third)
    assert len(page.named("svg")) == 9
    assert "1. stage/text" in page.text and "2. stage/align" in page.text
    assert re.search(r"optim\.learning_rate0\.20\.1", page.text)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "nvmm.report"]
    (tmp_path / "summary.json").write_text(
        '{"heldout_exact_match": {"overall": 0.5, "read": 0.25}}'
    )
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    scores = "held-out exact match: overall 0.500, read 0.250"
    assert done.stdout.strip() == f"report: {tmp_path / 'report.html'} | {scores}"
    refused = subprocess.run(
        [*command, str(tmp_path / "no")], capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 2 and "does not exist" in refused.stderr


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "no")


def test_a_run_s_note_is_shown_as_text(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: a/b, note: 'starts <small>'}\n")
    assert "starts <small>" in read(tmp_path).text
