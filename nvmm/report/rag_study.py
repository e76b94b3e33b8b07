"""Stages of retrieval-augmented models as one HTML page: scores, needles, losses, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nvmm.report.alignment import ANSWERS_STYLE, Example, Points, answer_card, chart, charts
from nvmm.report.study import Table, document, score_table

_STYLE = """
.heat td { text-align: center; min-width: 64px; color: #111; }
"""


@dataclass(frozen=True)
class HeatMap:
    """Recall of a needle. recall: [depths, lengths]; lengths in tokens, depths in percent."""

    title: str
    lengths: Sequence[int]
    depths: Sequence[float]
    recall: Sequence[Sequence[float | None]]


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    maps: Sequence[HeatMap],
    losses: Mapping[str, Points],
    examples: Sequence[Example],
) -> str:
    """Return the page. losses: stage -> (step, loss)."""
    drawn = [chart(f"Loss, {name}", {"loss": points}, "loss") for name, points in losses.items()]
    sections = {
        "Scores": "".join(map(score_table, tables)),
        "Needle in a haystack": charts([_heat_map(each) for each in maps]),
        "Losses": charts(drawn),
        "Answers": "".join(map(answer_card, examples)),
    }
    shown = {name: content for name, content in sections.items() if content}
    return document(title, "RAG", notes, shown, ANSWERS_STYLE + _STYLE)


def _heat_map(each: HeatMap) -> str:
    """Return a table whose cells are red at 0 and green at 1."""
    head = "".join(f"<th class=num>{length:,}</th>" for length in each.lengths)
    rows = "".join(
        f"<tr><th>{depth:g} %</th>{''.join(map(_cell, row))}</tr>"
        for depth, row in zip(each.depths, each.recall, strict=True)
    )
    return (
        f"<figure class=panel><h3>{escape(each.title)}</h3><p class=quiet>Rows: depth; columns:"
        f" tokens of prompt and answer.</p><div class=wide><table class=heat><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></figure>"
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    return f'<td style="background: hsl({120 * value:.0f} 65% 70%)">{value:.2f}</td>'
