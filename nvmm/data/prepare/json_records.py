"""JSON records with folders of files, such as LLaVA's, become samples for `write_shards`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import Files, check_media, read_lines, to_sample
from nvmm.data.samples.decode import DECODERS, check_extension

_IMAGES = ("image", "images")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a JSON list, or of a `.jsonl` file with one object a line.

    A byte order mark is passed over. Raises ValueError naming the file for anything else.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return list(read_lines(path))
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON in UTF-8 ({error}); use .jsonl for lines"
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of objects")
    return records


def samples(
    records: list[dict[str, Any]],
    files: str | Path | Mapping[str, str | Path],
    unread: Collection[str] = (),
    on_missing: Callable[[str], None] | None = None,
) -> Iterator[dict[str, bytes | str]]:
    """Yield one sample a record: `json` as it was, and the bytes of the files that it names.

    The only image is the member jpg (or png, ...), several are 0.jpg, 1.jpg, ...; other files are
    `key.extension`. Pictures in base64 become members too.

    Args:
        files: key of a record, which holds a name or a list -> the folder that names are relative
            to; a folder alone stands for the keys `image` and `images`.
        unread: keys whose files are left out.
        on_missing: leaves a record out whose file is missing, and is told which; None: an error.

    Raises ValueError for names that lead out of their folder, for extensions without a decoder,
    for keys that name files and are neither in `files` nor in `unread`, and for keys in these two
    that no record has.
    """
    roots = files if isinstance(files, Mapping) else dict.fromkeys(_IMAGES, files)
    twice = sorted(set(roots) & set(unread))
    if twice:
        raise ValueError(f"{', '.join(twice)} cannot be both read and unread")
    known = set().union(*records)
    for option, keys in (("--unread", set(unread)), ("--files", roots.keys() - {*_IMAGES})):
        if unknown := sorted(keys - known):
            raise ValueError(f"{option} {unknown[0]} is no key of any record")
    for number, record in enumerate(records):
        where = f"record {number} (id {record.get('id')})"
        taken = Files(where)
        try:
            for key, root in roots.items():
                for name in _names(record.get(key), f"{where}: {key}"):
                    path = file_below(Path(root), name, f"{where}: {key} {name[:80]}")
                    taken.add(key, path.suffix[1:].lower(), path.read_bytes())
        except FileNotFoundError as error:
            if on_missing is None:
                raise ValueError(f"{error}\n--on-missing skip leaves such records out") from error
            on_missing(str(error))
            continue
        rest = {key: taken.taken(key, value) for key, value in record.items() if key not in roots}
        check_media(record | rest, {*roots, *unread}, where)
        yield to_sample(f"{number:09d}", record | rest, taken.contents)


def _names(value: Any, where: str) -> list[str]:
    """Return the file names that a record's value holds: a name, a list of names, or none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return []
    names = value if isinstance(value, list) else [value]
    if not all(name is None or isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a file name or a list of them, got {value!r}")
    return [name for name in names if name]


def file_below(root: Path, name: str, where: str) -> Path:
    """Return the path of a record's file, which may be a link or lie in a linked folder.

    Raises FileNotFoundError for one that is not there, ValueError for a name that leads out of the
    folder and for an extension without a decoder; their texts begin with `where`.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{where} lies outside {root}")
    kinds = [kind for kind in DECODERS if kind != "json"]
    extension = Path(name).suffix[1:].lower()
    if extension not in kinds:
        why = ""
        try:
            check_extension(extension)
        except ValueError as error:
            why = f" ({error})"
        raise ValueError(f"{where} must be one of {', '.join(kinds)}{why}")
    path = root / os.path.normpath(name)
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file in {root.resolve()}")
    return path
