"""A comparison of retrievers as one HTML page: scores, losses, queries and what was found.

The page needs no network, script or library; pictures are in it as base64.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nvmm.report.charts import Series, figure, legend, line_chart
from nvmm.report.study import Table, document, score_table

_STYLE = """
.ranked { display: grid; gap: 8px 12px; grid-template-columns: 150px 1fr; align-items: center; }
.ranked b { font-weight: 600; font-size: 13px; }
.hits { display: flex; gap: 8px; flex-wrap: wrap; }
.item { width: 112px; min-height: 84px; padding: 6px; border: 1px solid var(--rule);
  border-radius: 8px; border-bottom: 3px solid var(--bad); font-size: 12px; line-height: 1.3;
  display: flex; align-items: center; justify-content: center; text-align: center;
  overflow-wrap: anywhere; }
.item.right { border-bottom-color: var(--good); }
.item.query { border-bottom-color: var(--s0); width: auto; gap: 10px; justify-content: left; }
.item img { width: 64px; height: 64px; background: #fff; }
.card.ranking { border-top-color: var(--rule); margin-bottom: 14px; }
"""


@dataclass(frozen=True)
class Shown:
    """A query or candidate. image: bytes of a PNG. right: whether the candidate is relevant."""

    text: str
    image: bytes | None = None
    right: bool = False


@dataclass(frozen=True)
class Example:
    """A query with the best candidates of every retriever, by its name, best first."""

    task: str
    instruction: str
    query: Shown
    rankings: Mapping[str, Sequence[Shown]]


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    losses: Mapping[str, Sequence[tuple[float, float | None]]],
    examples: Sequence[Example],
) -> str:
    """Return the page.

    losses: name of a retriever -> (step, loss); at most four are drawn, the page's colours.
    """
    series = [Series(name, points, number) for number, (name, points) in enumerate(losses.items())]
    chart = line_chart(series[:4], label="training loss")
    sections = {"Scores": "".join(map(score_table, tables))}
    if chart:
        sections["Training"] = figure("Loss", legend(series[:4]) + chart)
    for task in dict.fromkeys(example.task for example in examples):
        cards = "".join(_card(example) for example in examples if example.task == task)
        sections[f"Best candidates: {task}"] = cards
    return document(title, "retrieval", notes, sections, _STYLE)


def _card(example: Example) -> str:
    rows = "".join(
        f"<b>{escape(name)}</b><div class=hits>{''.join(map(_candidate, candidates))}</div>"
        for name, candidates in example.rankings.items()
    )
    return (
        "<article class='card ranking'><div class=ranked>"
        f"<b>{escape(example.instruction)}</b>"
        f"<div class=hits><div class='item query'>{_content(example.query)}</div></div>"
        f"{rows}</div></article>"
    )


def _candidate(shown: Shown) -> str:
    return f"<div class='item {'right' if shown.right else 'wrong'}'>{_content(shown)}</div>"


def _content(shown: Shown) -> str:
    text = f"<span>{escape(shown.text)}</span>" if shown.text else ""
    if shown.image is None:
        return text
    data = base64.b64encode(shown.image).decode("ascii")
    return f'<img alt="picture" src="data:image/png;base64,{data}">{text}'
