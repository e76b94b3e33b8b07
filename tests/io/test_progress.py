"""Lines of progress in a log file."""

import re

import pytest

from nvmm.io.progress import progress


@pytest.mark.parametrize("rate", [True, False])
def test_a_line_has_the_rate_where_it_is_asked_for(
    rate: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(4, "encode", "item", rate=rate) as bar:
        bar.update(4)
    last = capsys.readouterr().err.splitlines()[-1]
    line = r"encode: item 4/4 \(100%\), 00:00 gone, 00:00 left"
    assert re.fullmatch(line + r", [\d.]+item/s" if rate else line, last)
