"""A data set of a demo is made once from the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvmm.io.files import write


def once(folder: Path, settings: Mapping[str, Any], make: Callable[[], None]) -> bool:
    """Make a folder's data, unless they were made of these settings; return whether it did.

    folder/complete.json holds the settings, which must be JSON. It goes first and comes last, so
    that data half written are never taken for complete.
    """
    stamp = folder / "complete.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == settings:
        return False
    stamp.unlink(missing_ok=True)
    make()
    write(stamp, json.dumps(settings, indent=2) + "\n")
    return True
