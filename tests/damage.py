"""Bytes of a checkpoint to flip, by the kind of place they lie at."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def changed(file: Path, position: int, mask: int = 1) -> Iterator[None]:
    """Flip bits of one byte, meanwhile."""
    flip(file, position, mask)
    try:
        yield
    finally:
        flip(file, position, mask)


def flip(file: Path, position: int, mask: int = 1) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ mask]))


def stored(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file of a tensor's first piece, and where it begins and ends there."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == name)
    info = metadata.storage_data[index]
    return folder / info.relative_path, info.offset, info.offset + info.length


def parts(folder: Path, name: str) -> dict[str, tuple[Path, range]]:
    """Kind of place -> the bytes of it, of the archive that holds a tensor's first piece."""
    file, begin, end = stored(folder, name)
    blob = file.read_bytes()[begin:end]
    archive = zipfile.ZipFile(io.BytesIO(blob))
    places = {}
    for info in archive.infolist():
        name_length, extra = (
            blob[info.header_offset + i : info.header_offset + i + 2] for i in (26, 28)
        )
        padding = info.header_offset + 30 + int.from_bytes(name_length, "little")
        data = padding + int.from_bytes(extra, "little")
        kind = info.filename.rpartition("/")[2]
        places[f"{kind} header"] = range(info.header_offset, padding)
        places[f"{kind} padding"] = range(padding, data)
        places[kind] = range(data, data + info.file_size)
    directory = int.from_bytes(blob[-6:-2], "little")
    places["directory"] = range(directory, len(blob))
    return {
        kind: (file, range(begin + r.start, begin + r.stop)) for kind, r in places.items() if len(r)
    }


def data_byte(folder: Path, name: str, generator: random.Random) -> tuple[Path, int]:
    [(file, bytes_)] = [place for kind, place in parts(folder, name).items() if kind == "0"]
    return file, generator.choice(bytes_)
