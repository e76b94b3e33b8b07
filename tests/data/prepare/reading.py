"""What the commands have written."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any


def written(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    """Return the records of all shards of a name, in order."""
    records = []
    for path in sorted(folder.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            members = [tar.extractfile(member) for member in tar]
            records += [json.loads(member.read()) for member in members if member is not None]
    return records
