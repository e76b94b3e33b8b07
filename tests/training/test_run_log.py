"""A run's log files have what libraries say; the console has nvmm's lines and errors."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmm.training.run_log import RunLog


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """What a root logger's handler prints; all is as before in the end."""
    root, text = logging.getLogger(), io.StringIO()
    before = root.handlers[:]
    root.handlers = [logging.StreamHandler(text)]
    yield text
    root.handlers = before
    logging.captureWarnings(False)


def test_noise_goes_to_the_file(console: io.StringIO, tmp_path: Path) -> None:
    log = RunLog().install()
    logging.getLogger("somelibrary").warning("noise")
    logging.getLogger("nvmm.part").warning("ours")
    assert not any(tmp_path.iterdir())
    log.open(tmp_path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old way", FutureWarning, stacklevel=1)
    logging.getLogger("somelibrary").error("broken")
    assert console.getvalue() == "ours\nbroken\n"
    lines = (tmp_path / "logs" / "rank_00003.txt").read_text()
    assert [word in lines for word in ("noise", "ours", "old way", "broken")] == [True] * 4


def test_a_start_that_fails_tells_what_it_kept(
    console: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog().install()
    logging.getLogger("somelibrary").warning("a hint")
    log.tell()
    assert "somelibrary: a hint" in capsys.readouterr().err
