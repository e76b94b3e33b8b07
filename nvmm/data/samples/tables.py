"""Tables as text, in ChatQA's form (arXiv 2401.10225, appendix C.2).

    | 2019 (Year) | Revenue: 12.5 | Profit: 3.1 |
    | 2020 (Year) | Revenue: 14.0 | Profit: 2.8 |

Every cell repeats its header, and the first cell of a row has it in brackets, so that late rows
stay linked to the headers. That no row of the headers comes first is our reading of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KEYS = {"header", "rows"}


def table_text(header: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Return a table as Markdown rows.

    A cell without text, or one whose header has none, stands alone. Line breaks and bars in a cell
    would end it: they become spaces and `\\|`.

    Raises ValueError for a table without rows, and for a row of another length than the header.
    """
    if not rows:
        raise ValueError("a table needs rows")
    names = [_cell(name) for name in header]
    lines = []
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"row {number} of a table has {len(row)} cells, its header {len(names)}"
            )
        cells = [_cell(value) for value in row]
        written = [
            _named(name, cell, place)
            for place, (name, cell) in enumerate(zip(names, cells, strict=True))
        ]
        lines.append(f"| {' | '.join(written)} |")
    return "\n".join(lines)


def read_table(value: Mapping[str, Any]) -> str:
    """Return the text of a table `{"header": [..], "rows": [[..], ..]}`.

    Raises ValueError for one with other keys, and for what is neither a text nor a number.
    """
    if set(value) != _KEYS:
        raise ValueError(
            f"a table has header and rows, got {', '.join(map(str, value)) or 'nothing'}"
        )
    header, rows = value["header"], value["rows"]
    lists = [header, *rows] if isinstance(rows, list) else [None]
    if not all(isinstance(row, list) and all(map(_is_cell, row)) for row in lists):
        raise ValueError("header and each of rows must be lists of texts and numbers")
    return table_text(header, rows)


def _is_cell(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _cell(value: str | int | float) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _named(name: str, cell: str, place: int) -> str:
    if not name or not cell:
        return cell
    return f"{name}: {cell}" if place else f"{cell} ({name})"
