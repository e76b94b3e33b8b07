"""Parquet files and Hugging Face `datasets` folders become samples for `write_shards`.

Files (bytes, or datasets' Image and Audio) become members wherever they stand in a row, all others
the json.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import glob
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import Files, check_media, to_sample

_BATCH = 64


def parquet_rows(paths: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of Parquet files, reading some at a time."""
    import pyarrow.parquet as parquet

    for path in paths:
        with _readable(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Make a ValueError that names the file of what Arrow says against it."""
    from pyarrow import ArrowException

    try:
        yield
    except ArrowException as error:
        raise ValueError(f"{path} is damaged, or no such table ({error})") from error


def _facts(path: Path, *keys: str) -> dict[str, Any]:
    """Return the object in a file of `datasets`; raise ValueError for one without `keys`."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), list) for key in keys):
        raise ValueError(f"{path} is damaged: it has no {', '.join(keys)}")
    return facts


def folder_rows(
    folder: str | Path, split: str | None = None, config: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows of a folder of `datasets` (`save_to_disk`), or of Parquet files in a folder.

    split: split of a DatasetDict, or of Parquet files that lie as on the hub. config: their folder.

    Raises ValueError when the folder has several splits or configs and none is named, or lacks the
    one named.
    """
    folder = Path(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = _facts(folder / "dataset_dict.json", "splits")["splits"]
        if split not in splits:
            raise ValueError(f"{folder}: --split {split} is none of {', '.join(splits)}")
        folder = folder / str(split)
    if (folder / "state.json").is_file():
        state = _facts(folder / "state.json", "_data_files")
        if state.get("_indices_data_files"):
            raise ValueError(
                f"{folder} holds a selection; call flatten_indices() before save_to_disk"
            )
        if config is not None or split not in (None, folder.name, state.get("_split")):
            named = f"--config {config}" if config is not None else f"--split {split}"
            holds = state.get("_split") or "one split without a name"
            raise ValueError(f"{folder}: {named} is not there; it holds {holds}")
        yield from _arrow_rows(_within(folder, entry["filename"]) for entry in state["_data_files"])
        return
    yield from parquet_rows(_parquet_files(folder, split, config))


def _parquet_files(folder: Path, split: str | None, config: str | None) -> list[Path]:
    """Return the Parquet files of one split of one config, in order."""
    names = sorted(glob.glob("**/*.parquet", root_dir=folder, recursive=True))
    if not names:
        raise ValueError(f"{folder}: neither state.json (save_to_disk) nor Parquet files")
    places = {name: _place(Path(name)) for name in names}
    # 1. A config is a folder.
    configs = sorted({place[0] for place in places.values()})
    if config is None and len(configs) > 1:
        raise ValueError(
            f"{folder} has configs {', '.join(name or '(none)' for name in configs)}; name one by"
            " --config, or files by parquet --from PATTERN"
        )
    if config is not None and config not in configs:
        raise ValueError(f"{folder}: --config {config} is none of {', '.join(configs)}")
    chosen = [name for name in names if config in (None, places[name][0])]
    # 2. A split is the first part of its files' names, or their folder.
    splits = sorted({places[name][1] for name in chosen})
    if split is None and len(splits) > 1:
        raise ValueError(
            f"{folder} has splits {', '.join(splits)}; name one by --split, or files by parquet"
            " --from PATTERN"
        )
    if split is not None and split not in splits:
        raise ValueError(
            f"{folder}: nor Parquet files of split {split}; it has {', '.join(splits)}"
        )
    return [folder / name for name in chosen if split in (None, places[name][1])]


def _place(path: Path) -> tuple[str, str]:
    """Return config and split of a Parquet file of the hub.

    train-00000-of-00002, CONFIG/train-00000-of-00002, data/train-00000-of-00002, train,
    CONFIG/train/0000 and CONFIG/train/part-00000-... are of split train.
    """
    folders = [name for name in path.parts[:-1] if name != "data"]
    if re.fullmatch(r"(part-)?\d+([-_.].*)?", path.stem):
        return "/".join(folders[:-1]), folders[-1] if folders else ""
    parts = re.fullmatch(r"(.+?)-\d+(-of-\d+(-\w+)?)?", path.stem)
    return "/".join(folders), parts[1] if parts else path.stem


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
        with (
            _readable(path),
            pyarrow.memory_map(str(path)) as source,
            pyarrow.ipc.open_stream(source) as stream,
        ):
            for batch in stream:
                for start in range(0, batch.num_rows, _BATCH):
                    yield from batch.slice(start, _BATCH).to_pylist()


def samples(
    rows: Iterable[Mapping[str, Any]], unread: Collection[str] = ()
) -> Iterator[dict[str, bytes | str]]:
    """Yield one sample a row: its files, and the json of everything else.

    A row's only image is the member jpg (or png, ...), several are 0.jpg, 1.jpg ... in the order
    of columns; other files are `column.extension`. A column of nothing but files leaves the json;
    a file among other things leaves a text there.

    unread: columns that are left out.

    Raises ValueError for a file that was not embedded or is of no known format, for a column that
    names files, and for an unread column that no row has.
    """
    lacking = set(unread)
    for number, row in enumerate(rows):
        lacking -= row.keys()
        if lacking:
            raise ValueError(f"--unread {min(lacking)} is none of the columns {', '.join(row)}")
        taken = Files(f"row {number}")
        record: dict[str, Any] = {}
        for column, value in row.items():
            if column in unread:
                continue
            before = len(taken.contents)
            rest = taken.taken(column, value)
            items = rest if isinstance(rest, list) else [rest]
            only_files = len(taken.contents) - before == len(items)
            if not items or not only_files or not all(isinstance(item, str) for item in items):
                record[column] = rest
        check_media(record, (), f"row {number}")
        yield to_sample(f"{number:09d}", record, taken.contents, default=_plain)


def _plain(value: Any) -> Any:
    """Return a value that JSON knows for one that it does not; raise ValueError where none fits."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise ValueError(f"{type(value).__name__} cannot be written as JSON")
