"""JSON records with folders of files, as LLaVA's -> samples for `write_shards`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.samples.decode import DECODERS, IMAGES


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


def samples(
    records: list[dict[str, Any]], files: str | Path | Mapping[str, str | Path]
) -> Iterator[dict[str, Any]]:
    """One sample a record: `json` as it was, and the bytes of the files that it names.

    files: key of a record, which holds a name or a list -> the folder that names are relative to;
        a folder alone stands for the key `image`. Names that lead out of their folder are refused,
        and so are extensions without a decoder. The only image is the member jpg (or png, ...),
        several are 0.jpg, 1.jpg, ...; other files are `key.extension`.
    """
    roots = files if isinstance(files, Mapping) else {"image": files}
    for number, record in enumerate(records):
        where = f"record {number} (id {record.get('id')})"
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        sample: dict[str, Any] = {"__key__": f"{number:09d}", "json": text.encode("utf-8")}
        images: list[Path] = []
        for key, root in roots.items():
            listed = record.get(key) or []
            for place, name in enumerate([listed] if isinstance(listed, str) else listed):
                path = _file(Path(root).resolve(), name, f"{where}: {key} {name}")
                kind = path.suffix[1:].lower()
                if kind in IMAGES:
                    images.append(path)
                else:
                    sample[f"{key.lower()}{place or ''}.{kind}"] = path.read_bytes()
        for place, path in enumerate(images):
            kind = path.suffix[1:].lower()
            sample[kind if len(images) == 1 else f"{place}.{kind}"] = path.read_bytes()
        yield sample


def _file(root: Path, name: str, where: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where} lies outside {root}")
    kinds = DECODERS.keys() - {"json"}
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{where} must be one of {', '.join(k for k in DECODERS if k in kinds)}")
    if not path.is_file():
        raise ValueError(f"{where} is not a file in {root}")
    return path
