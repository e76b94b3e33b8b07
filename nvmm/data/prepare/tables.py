"""Parquet files and Hugging Face `datasets` folders become samples for `write_shards`.

Columns of files (bytes, or datasets' Image and Audio) become members, all others the json.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import to_sample
from nvmm.data.samples.decode import DECODERS

_BATCH = 64
_MAGIC = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"RIFF????WEBP": "webp",
    b"RIFF????WAVE": "wav",
}


def parquet_rows(paths: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of Parquet files, reading some at a time."""
    import pyarrow.parquet as parquet

    for path in paths:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()


def folder_rows(folder: str | Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows of a folder of `datasets` (`save_to_disk`), or of Parquet files in a folder.

    split: split of a DatasetDict; Parquet files of a split begin with its name, as on the hub.

    Raises ValueError when the folder has splits and none is named, or lacks the one named.
    """
    folder = Path(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise ValueError(f"{folder}: --split {split} is none of {', '.join(splits)}")
        folder = folder / str(split)
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise ValueError(
                f"{folder} holds a selection; call flatten_indices() before save_to_disk"
            )
        yield from _arrow_rows(_within(folder, entry["filename"]) for entry in state["_data_files"])
        return
    paths = sorted(folder.rglob("*.parquet"))
    if split is not None:
        paths = [path for path in paths if path.name.startswith(split)]
    if not paths:
        named = "" if split is None else f" of split {split}"
        raise ValueError(f"{folder}: neither state.json (save_to_disk) nor Parquet files{named}")
    yield from parquet_rows(paths)


def _within(folder: Path, name: str) -> Path:
    """Return the path of a data file; raise ValueError when it lies outside the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: data file {name} lies outside the folder")
    return path


def _arrow_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of Arrow streams, which are mapped and read some at a time."""
    import pyarrow

    for path in paths:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, _BATCH):
                    yield from batch.slice(start, _BATCH).to_pylist()


def samples(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, bytes | str]]:
    """Yield one sample a row: its files, and the json of everything else.

    A row's only image is the member jpg (or png, ...), several are 0.jpg, 1.jpg ... in the order
    of columns; other files are `column.extension`.

    Raises ValueError for a file that was not embedded or is of no known format.
    """
    for number, row in enumerate(rows):
        record: dict[str, Any] = {}
        contents = []
        for column, value in row.items():
            values = value if isinstance(value, list) else [value]
            if not values or not all(map(_is_file, values)):
                record[column] = value
                continue
            name = column.replace(".", "_").lower()
            for place, item in enumerate(values):
                content, extension = _file(item, f"row {number}, column {column}")
                contents.append((f"{name}{place or ''}", extension, content))
        yield to_sample(f"{number:09d}", record, contents, default=_plain)


def _is_file(value: Any) -> bool:
    """Return whether a value is bytes, or a file as `datasets` stores it."""
    return isinstance(value, bytes) or (
        isinstance(value, dict) and value.keys() == {"bytes", "path"} and any(value.values())
    )


def _file(value: Any, where: str) -> tuple[bytes, str]:
    """Return content and extension of a file, told from its first bytes."""
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise ValueError(
            f"{where}: {value['path']} is not embedded; save the data set with the files in it"
        )
    for magic, extension in _MAGIC.items():
        if all(a == b or b == ord("?") for a, b in zip(data, magic, strict=False)):
            return data, extension
    known = ", ".join(sorted(set(_MAGIC.values()) & DECODERS.keys()))
    raise ValueError(f"{where}: {len(data)} bytes of no known format; known are {known}")


def _plain(value: Any) -> Any:
    """Return a value that JSON knows for one that it does not; raise TypeError where none fits."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
