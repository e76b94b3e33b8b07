"""JSON records from files, and records with files as samples for `write_shards`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.samples.decode import IMAGES


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file; empty lines are passed over.

    Raises ValueError naming file and line for anything else.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: no JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: must be an object")
            yield record


def to_sample(
    key: str,
    record: Mapping[str, Any],
    files: Iterable[tuple[str, str, bytes]] = (),
    default: Callable[[Any], Any] | None = None,
) -> dict[str, bytes | str]:
    """Return the sample of a record: extension -> bytes, and its `__key__`.

    files: (name, extension, content) of each. The only image becomes the member jpg (or png, ...),
        several become 0.jpg, 1.jpg, ... in their order; other files become `name.extension`.
    default: returns something that JSON knows for a value that it does not know.
    """
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=default)
    sample: dict[str, bytes | str] = {"__key__": key, "json": text.encode("utf-8")}
    images = []
    for name, extension, content in files:
        if extension in IMAGES:
            images.append((extension, content))
        else:
            sample[f"{name}.{extension}"] = content
    for number, (extension, content) in enumerate(images):
        sample[extension if len(images) == 1 else f"{number}.{extension}"] = content
    return sample
