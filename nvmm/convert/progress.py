"""A line that says how far a conversion is."""

from __future__ import annotations

import sys
import threading
import time


class Progress:
    """Counts bytes; on a terminal it draws a bar, else it says nothing until `close`.

    total: bytes to come. `add` may be called by several threads.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total = total
        self.label = label
        self.done = 0
        self._start = time.monotonic()
        self._shown = 0.0
        self._lock = threading.Lock()
        self._live = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self._live and now - self._shown > 0.2:
                self._shown = now
                print(f"\r{self}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Say the final count and speed."""
        print(f"{chr(13) if self._live else ''}{self}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        filled = 20 if not self.total else 20 * self.done // self.total
        return (
            f"{self.label} [{'#' * filled}{'.' * (20 - filled)}] {self.done / 1e9:.2f} of"
            f" {self.total / 1e9:.2f} GB, {self.done / 1e9 / seconds:.2f} GB/s"
        )
