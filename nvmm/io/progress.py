"""One progress bar for everything: drawn on a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_LINE_SECONDS = 10.0
_LINE_FORMAT = (
    "{desc}: {unit} {n_fmt}/{total_fmt} ({percentage:.0f}%), {elapsed} gone, {remaining} left"
    "{postfix}"
)


def progress(
    total: int, name: str, unit: str = "sample", *, rate: bool = False, **options: Any
) -> tqdm:
    """Return a tqdm bar on stderr; `update` counts, from any thread.

    rate: give units a second in a log file too; a terminal's bar always does.
    options: tqdm's own, `disable` and `delay` among them; `unit="B"` counts bytes.
    """
    terminal = sys.stderr.isatty()
    line_format = _LINE_FORMAT + ", {rate_noinv_fmt}" * rate
    return _Bar(
        total=total,
        desc=name,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else _LINE_SECONDS,
        miniters=1,
        dynamic_ncols=terminal,
        bar_format=None if terminal else line_format,
        **options,
    )


def watch(items: Iterable[T], total: int, name: str, unit: str = "sample") -> Iterator[T]:
    """Go through `items`, with a bar after five seconds."""
    with progress(total, name, unit, delay=5) as bar:
        for item in items:
            yield item
            bar.update()


class _Bar(tqdm):
    # tqdm's monitor is a thread, and a process that forks should have none; miniters=1 needs none.
    monitor_interval = 0

    def update(self, n: float | None = 1) -> bool | None:
        """Count; tqdm's own is not meant for several threads."""
        with self.get_lock():
            return super().update(n)


class _Lines:
    """Turns tqdm's redrawn line into one line a refresh, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a line, unless it is empty."""
        if line := text.strip():
            self._stream.write(line + "\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
