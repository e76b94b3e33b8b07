"""JSON records with folders of files, such as LLaVA's, become samples for `write_shards`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import read_lines, to_sample
from nvmm.data.samples.decode import DECODERS


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a JSON list, or of a `.jsonl` file with one object a line.

    Raises ValueError naming the file for anything else.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return list(read_lines(path))
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); use .jsonl for lines") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of objects")
    return records


def samples(
    records: list[dict[str, Any]], files: str | Path | Mapping[str, str | Path]
) -> Iterator[dict[str, bytes | str]]:
    """Yield one sample a record: `json` as it was, and the bytes of the files that it names.

    files: key of a record, which holds a name or a list -> the folder that names are relative to;
        a folder alone stands for the key `image`. The only image is the member jpg (or png, ...),
        several are 0.jpg, 1.jpg, ...; other files are `key.extension`.

    Raises ValueError for names that lead out of their folder, and extensions without a decoder.
    """
    roots = files if isinstance(files, Mapping) else {"image": files}
    for number, record in enumerate(records):
        where = f"record {number} (id {record.get('id')})"
        contents = []
        for key, root in roots.items():
            names = record.get(key) or []
            for place, name in enumerate([names] if isinstance(names, str) else names):
                path = _file(Path(root).resolve(), name, f"{where}: {key} {name}")
                extension = path.suffix[1:].lower()
                contents.append((f"{key.lower()}{place or ''}", extension, path.read_bytes()))
        yield to_sample(f"{number:09d}", record, contents)


def _file(root: Path, name: str, where: str) -> Path:
    """Return the path of a record's file; raise ValueError, beginning with `where`, for others."""
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where} lies outside {root}")
    kinds = DECODERS.keys() - {"json"}
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{where} must be one of {', '.join(k for k in DECODERS if k in kinds)}")
    if not path.is_file():
        raise ValueError(f"{where} is not a file in {root}")
    return path
