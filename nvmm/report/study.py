"""What the pages of comparisons share: a frame without network or script, and tables of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nvmm.report.style import STYLE


@dataclass(frozen=True)
class Table:
    """A table of scores. rows: a name and a cell a column."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def document(
    title: str, kind: str, notes: Sequence[str], sections: Mapping[str, str], style: str
) -> str:
    """Return a whole page. sections: heading -> HTML. style: CSS besides the reports' own."""
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections.items()
    )
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>"
        f"<header><p class=eyebrow>nvmm {escape(kind)} report</p><h1>{escape(title)}</h1>"
        f"{paragraphs}</header>{body}</main></body></html>\n"
    )


def score_table(table: Table) -> str:
    """Return a table as HTML, with its title and note."""
    head = "".join(f"<th class=num>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td class=num>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in table.rows
    )
    return (
        f"<h3>{escape(table.title)}</h3><p class=quiet>{escape(table.note)}</p><div class=wide>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
