"""The log files of a run: all that is logged and warned. The console has nvmm's lines alone."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO


class RunLog(logging.Handler):
    """Writes every line of this rank to `<run>/logs/rank_<number>.txt`.

    Lines of before `open` are kept until then: a start that is refused makes no file. The root
    logger's other handlers get what nvmm says and the errors of libraries alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._kept: list[str] = []
        self._file: TextIO | None = None

    def install(self) -> RunLog:
        """Listen to all loggers and to Python's warnings; return self."""
        root = logging.getLogger()
        for handler in root.handlers:
            handler.addFilter(_for_console)
        root.addHandler(self)
        logging.captureWarnings(True)
        return self

    def open(self, run_dir: Path, rank: int) -> None:
        """Write what was kept and what comes; a run that goes on adds to its files."""
        path = run_dir / "logs" / f"rank_{rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.writelines(self._kept)
        self._kept = []

    def tell(self) -> None:
        """Print what was kept and has no file: the run failed before it began."""
        sys.stderr.writelines(self._kept)

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep a line."""
        try:
            line = f"{self.format(record)}\n"
            if self._file is None:
                self._kept.append(line)
            else:
                self._file.write(line)
        except Exception:
            self.handleError(record)


def _for_console(record: logging.LogRecord) -> bool:
    ours = record.name == "nvmm" or record.name.startswith("nvmm.")
    return ours or record.levelno >= logging.ERROR
