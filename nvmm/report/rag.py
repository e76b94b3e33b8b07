"""A RAG run as one HTML page: `nvmm report OUTPUT` writes OUTPUT/report.html.

It reads table.json and traces.jsonl (`nvmm.jobs.rag`). The page needs no network, script or
library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nvmm.report.style import STYLE

TRACES = "traces.jsonl"
_MAX_QUESTIONS = 200
_STYLE = """
.trace > summary b { font-weight: 600; }
.trace pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.trace h3 { margin-top: 16px; }
.yes { color: var(--good); font-weight: 600; }
.no { color: var(--bad); font-weight: 600; }
.hit { white-space: pre-wrap; }
"""
_RECALL = (
    "The share of questions with a relevant chunk among the first k, of those that say what is"
    " relevant. {relevance}"
)
_RELEVANCE = {
    "gold": "A chunk is relevant that lies in a gold document or touches a gold span.",
    "answer": "A chunk is relevant that contains an answer.",
}
_ANSWERS = (
    "F1 and exact match are means over the questions with answers; one without a reply counts as 0."
    " Of the accuracies, unanswerable is the share of refusals where there is no answer, answerable"
    " that of other replies where a relevant chunk was shown, and both their mean."
)


def write(folder: Path) -> Path:
    """Write the page of a RAG run's output and return its path.

    Raises ValueError for an output without tables.
    """
    try:
        tables = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        lines = (folder / TRACES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: run job=rag to its end") from error
    path = folder / "report.html"
    path.write_text(
        page(folder.resolve().name, tables, [json.loads(line) for line in lines]), encoding="utf-8"
    )
    return path


def page(title: str, tables: Mapping[str, Any], traces: Sequence[Mapping[str, Any]]) -> str:
    """Return the page. Of many questions the first ones are shown, and the page says so."""
    note = _RECALL.format(relevance=_RELEVANCE[tables["relevance"]])
    shown = traces[:_MAX_QUESTIONS]
    count = f"{len(shown)} of {len(traces)} questions; all are in {TRACES}."
    sections = {
        "Retrieval": f"<p class=quiet>{escape(note)}</p>{_table(tables['recall'])}",
        "Answers": f"<p class=quiet>{escape(_ANSWERS)}</p>{_table(tables['answers'])}",
        "Questions": f"<p class=quiet>{escape(count)}</p>{''.join(map(_trace, shown))}",
    }
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" for name, content in sections.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f"<header><p class=eyebrow>nvmm RAG report</p><h1>{escape(title)}</h1></header>"
        f"{body}</main></body></html>\n"
    )


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f"<th class=num>{escape(column.replace('_', ' '))}</th>" for column in columns)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td class=num>{_number(row.get(column))}</td>" for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody>"
        "</table></div>"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def _trace(trace: Mapping[str, Any]) -> str:
    question = trace["messages"][-1]["content"]
    turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in trace["messages"])
    answers = "; ".join(trace["answers"]) if trace["answerable"] else "(cannot be answered)"
    rankings = "".join(
        f"<h3>{name.capitalize()}</h3>{_ranking(trace[name])}"
        for name in ("searched", "reranked")
        if name in trace
    )
    ways = "".join(_way(name, way) for name, way in trace["ways"].items())
    return (
        f"<details class=trace><summary><b>{escape(trace['id'])}</b> {escape(question)}"
        f" <span class=quiet>{escape(answers)}</span></summary><pre>{escape(turns)}</pre>"
        f"{rankings}<h3>Answers</h3>{ways}</details>"
    )


def _ranking(hits: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td class=num>{rank}</td><td class=num>{_number(hit['score'])}</td>"
        f"<td>{_verdict(hit['relevant'])}</td><td>{escape(hit['id'])}</td>"
        f"<td class=hit>{escape(hit['text'])}</td></tr>"
        for rank, hit in enumerate(hits, 1)
    )
    return (
        "<div class=wide><table><thead><tr><th class=num>rank</th><th class=num>score</th>"
        f"<th>relevant</th><th>chunk</th><th>text</th></tr></thead><tbody>{rows}</tbody></table>"
        "</div>"
    )


def _verdict(right: bool) -> str:
    return "<span class=yes>yes</span>" if right else "<span class=no>no</span>"


def _way(name: str, way: Mapping[str, Any]) -> str:
    said = way["error"] if way["error"] is not None else way["text"]
    scores = " ".join(
        f"{key.replace('_', ' ')} {way[key]:.3f}" for key in ("f1", "exact_match") if key in way
    )
    contexts = f"<p class=quiet>{escape(', '.join(way['contexts']))}</p>" if way["contexts"] else ""
    prompt = f"<pre>{escape(way['prompt'])}</pre>" if way["prompt"] else ""
    return (
        f"<details><summary><b>{escape(name)}</b> {escape(said)}"
        f" <span class=quiet>{escape(scores)}</span></summary>{contexts}{prompt}</details>"
    )
