"""A run directory as one HTML page: `nvmm report RUN_DIR` writes RUN_DIR/report.html.

The output of a RAG run has a page of its own (`nvmm.report.rag`).

The page needs no network, script or library. A section whose file is missing says so. It reads:

- `summary.json` (`nvmm.training.summary`); `stages`, if there, lists the run directories that this
  one was started from, oldest first; else they are found by `init_from` of `config.yaml`.
- `metrics.jsonl`, `validation.jsonl` (`nvmm.training.logger`), `config.yaml`, `overrides.yaml`.
- `evaluation/<benchmark>/<checkpoint>/predictions.jsonl` (`nvmm.evaluate`; of each benchmark the
  newest checkpoint), one held-out sample a line: {sample_id, source, kind (of the question),
  question, answers: [...], prediction, score (1 is right)}. `images.jsonl` beside it has, for the
  samples to be drawn, sample_id and the fields that `nvmm.evaluation.images` makes; `heatmap.png`
  is that of a needle in a haystack.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from nvmm.config.nested import flat
from nvmm.report import rag
from nvmm.report.charts import (
    Series,
    figure,
    format_duration,
    format_number,
    line_chart,
    log_switch_figure,
)
from nvmm.report.style import STYLE

MAX_CARDS = 12
_STATS = {
    "steps": "steps",
    "samples_seen": "samples seen",
    "train_seconds": "training time",
    "tokens_per_second": "tokens a second",
    "num_parameters": "parameters",
    "world_size": "ranks",
}
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from the files of the run directory and return its path.

    Raises ValueError when there is no such directory.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run directory {run_dir} does not exist")
    # 1. Read the run; every file may be missing.
    summary = _json(run_dir / "summary.json")
    config = _yaml(run_dir / "config.yaml") or {}
    steps = _lines(run_dir / "metrics.jsonl")
    newest: dict[str, Path] = {}
    for path in sorted(run_dir.glob("evaluation/*/*/predictions.jsonl")):
        newest[path.parent.parent.name] = path
    evaluations = {
        f"{name}, {path.parent.name}": _predictions(path) for name, path in newest.items()
    }
    earlier = stages(run_dir, summary, config)
    about = config.get("run") or {}
    name = str(about.get("name") or run_dir.name)
    note = f"<p>{escape(str(about['note']))}</p>" if about.get("note") else ""
    # 2. Make the sections; None leaves one out.
    sections = {
        "Held-out accuracy": _accuracy(summary, evaluations),
        "Needle in a haystack": _heatmaps(newest),
        "Held-out images": _images([line for lines in evaluations.values() for line in lines]),
        "Training": _training(steps, _lines(run_dir / "validation.jsonl")),
        "Stages": _stages([*earlier, run_dir]) if earlier else None,
        "Configuration": _configuration(run_dir, config, earlier),
        "Run": _table(summary) if summary else _missing("summary.json", "training writes it"),
    }
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>"
        for title, content in sections.items()
        if content is not None
    )
    # 3. Put them on one page.
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p class=eyebrow>nvmm training report</p><h1>{escape(name)}</h1>"
        f"<p class=quiet>{escape(str(run_dir))}, written {escape(written)}</p>{note}</header>"
        f"{_headline(summary, steps)}{body}</main></body></html>\n"
    )
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    return run_dir / "report.html"


def _predictions(path: Path) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl with their images, those of images.jsonl beside it."""
    drawn = {line["sample_id"]: line for line in _lines(path.with_name("images.jsonl"))}
    return [{**line, **drawn.get(line.get("sample_id"), {})} for line in _lines(path)]


def _heatmaps(newest: Mapping[str, Path]) -> str | None:
    """Return the heat maps beside the predictions of `nvmm.evaluation.needle`, if there are any."""
    drawn = {name: path.with_name("heatmap.png") for name, path in newest.items()}
    figures = [
        f"<figure><img alt='recall by depth and length' src='data:image/png;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'>"
        f"<figcaption>{escape(name)}, {escape(path.parent.name)}</figcaption></figure>"
        for name, path in drawn.items()
        if path.is_file()
    ]
    return "".join(figures) or None


def stages(run_dir: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[Path]:
    """Return the run directories that this run's weights come from, oldest first."""
    if "stages" in summary:
        return [
            path for s in summary["stages"] if (path := run_dir / s).resolve() != run_dir.resolve()
        ]
    earlier: list[Path] = []
    while config.get("init_from"):
        # init_from names a checkpoint: RUN_DIR/checkpoints/step_XXXXXXXX
        path = Path(config["init_from"]).resolve().parent.parent
        if path in earlier or path == run_dir.resolve() or not (path / "config.yaml").exists():
            break
        earlier.insert(0, path)
        config = _yaml(path / "config.yaml") or {}
    return earlier


def _headline(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """Return the run's main numbers, those that are known."""
    exact = summary.get("heldout_exact_match")
    overall = exact.get("overall") if isinstance(exact, Mapping) else exact
    loss = next((s["loss"] for s in reversed(steps) if s.get("loss") is not None), None)
    stats = {
        "held-out exact match": None if overall is None else f"{100 * overall:.1f} %",
        "last training loss": None if loss is None else f"{loss:.4g}",
        **{label: _stat(summary, key) for key, label in _STATS.items()},
    }
    items = (
        f"<div class=stat><span>{label}</span><b>{value}</b></div>"
        for label, value in stats.items()
        if value is not None
    )
    return f"<div class=stats>{''.join(items)}</div>"


def _stat(summary: Mapping[str, Any], key: str) -> str | None:
    value = summary.get(key)
    if value is None:
        return None
    return format_duration(value) if key == "train_seconds" else format_number(value)


def _accuracy(
    summary: Mapping[str, Any], evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Return the accuracies by kind of question: of the predictions, else of the summary."""
    tables = []
    for name, predictions in evaluations.items():
        scores: dict[str, list[float]] = {"overall": []}
        for line in predictions:
            for kind in ("overall", str(line["kind"])):
                scores.setdefault(kind, []).append(float(line["score"]))
        scores.pop("all", None)  # This is the kind of samples that have none.
        means = {kind: (sum(s) / len(s), str(len(s))) for kind, s in scores.items() if s}
        tables.append(f"<h3>{escape(name)}</h3>{_accuracy_table(means)}")
    if not tables and (exact := summary.get("heldout_exact_match")) is not None:
        by_kind = exact if isinstance(exact, Mapping) else {"overall": exact}
        tables.append(_accuracy_table({kind: (mean, "–") for kind, mean in by_kind.items()}))
    return "".join(tables) or _missing("evaluation", "nvmm.evaluate writes it")


def _accuracy_table(means: Mapping[str, tuple[float, str]]) -> str:
    rows = "".join(
        f"<tr><th>{escape(kind)}</th><td class=bar><i style='--share:{100 * mean:.1f}%'></i></td>"
        f"<td class=num>{100 * mean:.1f} %</td><td class='num quiet'>{count}</td></tr>"
        for kind, (mean, count) in means.items()
    )
    return (
        "<table class=accuracy><thead><tr><th>question</th><th></th><th class=num>right</th>"
        f"<th class=num>samples</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _images(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Return cards of the first predictions, those with images if there are any."""
    if not predictions:
        return _missing("evaluation", "nvmm.evaluate writes it")
    drawn = [line for line in predictions if any(map(line.get, ("image", "tiles", "sound")))]
    cards = "".join(_card(line) for line in (drawn or predictions)[:MAX_CARDS])
    note = (
        "The image, the tiles the encoder sees (numbered in the order of the sequence, the"
        " thumbnail last), or the sound with its spectrogram and windows, and the model's answer."
        if drawn
        else "The predictions carry no images; the first answers:"
    )
    return f"<p class=quiet>{note}</p><div class=cards>{cards}</div>"


def _card(line: Mapping[str, Any]) -> str:
    """Return one prediction with its image, tiles or sound, question and answers."""
    right = float(line["score"]) >= 1
    verdict = "✓ right" if right else "✗ wrong"
    if 0 < float(line["score"]) < 1:
        verdict = f"score {float(line['score']):.2f}"
    answers = " or ".join(map(str, line.get("answers", [])))
    source = str(line.get("source") or line.get("sample_id", ""))
    return (
        f"<article class='card {'right' if right else 'wrong'}'>"
        f"<div class=shown>{_image(line.get('image'), 'image')}{_tiles(line)}{_sound(line)}</div>"
        f"<dl><dt>Question</dt><dd>{escape(str(line.get('question', '')))}</dd>"
        f"<dt>Answer</dt><dd>{escape(answers)}</dd>"
        f"<dt>Model</dt><dd><b>{escape(str(line.get('prediction', ''))) or '(nothing)'}</b>"
        f" <span class=verdict>{verdict}</span></dd></dl>"
        f"<p class='quiet source'>{escape(source)}</p>"
        "</article>"
    )


def _tiles(line: Mapping[str, Any]) -> str:
    """Return a prediction's tiles in their grid, and its thumbnail."""
    tiles = list(line.get("tiles") or [])
    if not tiles:
        return ""
    if len(tiles) == 1:
        return f"<figure>{_image(tiles[0], 'tile')}<figcaption>1 tile</figcaption></figure>"
    cols, rows = (int(n) for n in line.get("grid") or (len(tiles) - 1, 1))
    cells = "".join(
        f"<span class=cell>{_image(tile, f'tile {i}')}<em>{i}</em></span>"
        for i, tile in enumerate(tiles[: cols * rows], start=1)
    )
    thumbnails = (
        f"<figure>{_image(tile, 'thumbnail')}<figcaption>thumbnail</figcaption></figure>"
        for tile in tiles[cols * rows :]
    )
    return (
        f"<figure><div class=mosaic style='--cols:{cols}'>{cells}</div>"
        f"<figcaption>{cols} x {rows} tiles</figcaption></figure>{''.join(thumbnails)}"
    )


def _sound(line: Mapping[str, Any]) -> str:
    """Return a prediction's sound: what the encoder gets of it, and a player."""
    data = line.get("sound")
    if not isinstance(data, str) or not _BASE64.fullmatch(data):
        return ""
    picture = _image(line.get("spectrogram"), "spectrogram")
    player = f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
    return f"<figure class=heard>{picture}{player}</figure>"


def _image(data: object, alt: str) -> str:
    """Return an image from base64 PNG; nothing for other data, which must not reach the page."""
    if not isinstance(data, str) or not _BASE64.fullmatch(data):
        return ""
    return f'<img class="{alt.split()[0]}" alt="{alt}" src="data:image/png;base64,{data}">'


def _training(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return _missing("metrics.jsonl", "training writes it")
    loss = _loss_series(steps, validations)
    charts = [log_switch_figure("Loss", loss, label="loss", identity="main")]
    panels = {
        "Learning rate": ("learning_rate", "learning rate", True),
        "Throughput": ("tokens_per_second", "tokens a second", True),
        "Gradient norm": ("grad_norm", "norm before clipping", False),
    }
    for title, (key, label, from_zero) in panels.items():
        points = [(s["step"], s.get(key)) for s in steps]
        series = Series(label, points, noisy=key != "learning_rate")
        chart = line_chart([series], label=label, from_zero=from_zero)
        charts.append(figure(title, chart))
    return f"<div class=charts>{''.join(charts)}</div>"


def _loss_series(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[Series]:
    series = [Series("training", [(s["step"], s.get("loss")) for s in steps], 0)]
    if validations:
        points = [(v["step"], v.get("validation_loss")) for v in validations]
        series.append(Series("validation", points, 1, markers=True))
    return series


def _stages(runs: Sequence[Path]) -> str:
    panels, rows = [], []
    for i, run in enumerate(runs):
        about = (_yaml(run / "config.yaml") or {}).get("run") or {}
        name = str(about.get("name") or run.name)
        summary = _json(run / "summary.json")
        cells = [name, *(_stat(summary, key) for key in list(_STATS)[:3]), about.get("note")]
        rows.append("<tr>" + "".join(f"<td>{escape(c or '–')}</td>" for c in cells) + "</tr>")
        if run != runs[-1]:  # The curves of this run are above already.
            series = _loss_series(_lines(run / "metrics.jsonl"), _lines(run / "validation.jsonl"))
            title = f"{i + 1}. {name}"
            panels.append(log_switch_figure(title, series, label="loss", identity=f"stage-{i}"))
    return (
        "<p class=quiet>Each stage starts from the weights of the one before; the last is this run."
        "</p><table><thead><tr><th>stage</th><th>steps</th><th>samples</th><th>time</th><th>note</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
        f"<div class=charts>{''.join(panels)}</div>"
    )


def _configuration(run_dir: Path, config: Mapping[str, Any], earlier: Sequence[Path]) -> str:
    """Return the overrides, the differences from the stage before, and the config."""
    overrides = _yaml(run_dir / "overrides.yaml")
    if overrides is None:
        blocks = [_missing("overrides.yaml", "training writes it")]
    else:
        lines = "\n".join(map(str, overrides)) or "(none)"
        blocks = [f"<p class=quiet>Given on the command line:</p><pre>{escape(lines)}</pre>"]
    if not config:
        return "".join([*blocks, _missing("config.yaml", "training writes it")])
    if earlier:
        before, now = dict(flat(_yaml(earlier[-1] / "config.yaml") or {})), dict(flat(config))
        rows = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(str(before.get(key, '–')))}</td>"
            f"<td>{escape(str(now.get(key, '–')))}</td></tr>"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        )
        blocks.append(
            "<details><summary>What differs from the stage before</summary><div class=wide><table>"
            "<thead><tr><th>key</th><th>stage before</th><th>this run</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    blocks.append(f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>")
    return "".join(blocks)


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>"
        for key, value in flat(values)
    )
    return f"<div class=wide><table class=facts>{''.join(rows)}</table></div>"


def _missing(name: str, writer: str) -> str:
    return f"<p class=missing>{escape(name)} is not there ({escape(writer)}).</p>"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, none where it is missing.

    A last line without its end is left out: a run may be writing it. The reader of data sets
    (`nvmm.data.prepare.records`) refuses it, as there it is damage.
    """
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.split("\n") if line]


def main() -> None:
    """Write the report that the command line names, and print where it is."""
    parser = argparse.ArgumentParser(prog="nvmm.report", description="Write a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="run directory, or output of job=rag")
    arguments = parser.parse_args()
    try:
        if (arguments.run_dir / rag.TRACES).is_file():
            print(f"report: {rag.write(arguments.run_dir)}")
            return
        page = write_report(arguments.run_dir)
        exact = _json(page.parent / "summary.json").get("heldout_exact_match")
    except ValueError as error:
        parser.error(str(error))
    line = f"report: {page}"
    if isinstance(exact, Mapping):
        shares = ", ".join(f"{kind} {value:.3f}" for kind, value in exact.items())
        line += f" | held-out exact match: {shares}"
    print(line)
