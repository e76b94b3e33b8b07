"""LLaVA-style JSON with a folder of pictures -> samples for `write_shards`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvmm.data.decode import PICTURES


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON list, or of a `.jsonl` file with one object a line."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); use .jsonl for lines") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of objects")
    return records


def samples(records: list[dict[str, Any]], images: str | Path) -> Iterator[dict[str, Any]]:
    """One sample a record: `json` as it was, and the bytes of its `image` (a name or a list).

    Names are relative to `images`; one that leads out of that folder is refused.
    """
    root = Path(images).resolve()
    for number, record in enumerate(records):
        name = f"record {number} (id {record.get('id')})"
        listed = record.get("image", [])
        files = [listed] if isinstance(listed, str) else list(listed)
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        sample: dict[str, Any] = {"__key__": f"{number:09d}", "json": text.encode("utf-8")}
        for place, file in enumerate(files):
            path = (root / file).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"{name}: image {file} lies outside {root}")
            kind = path.suffix[1:].lower()
            if kind not in PICTURES:
                raise ValueError(f"{name}: image {file} must be one of {', '.join(PICTURES)}")
            if not path.is_file():
                raise ValueError(f"{name}: image {file} is not a file in {root}")
            sample[kind if len(files) == 1 else f"{place}.{kind}"] = path.read_bytes()
        yield sample
