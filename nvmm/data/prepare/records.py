"""JSON records from files, and records with files as samples for `write_shards`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ijson

from nvmm.data.samples.decode import DECODERS, IMAGES
from nvmm.data.samples.record import MEDIA_KEYS, names_media, num_named

_MAGIC = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"GIF8": "gif",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"RIFF????WEBP": "webp",
    b"RIFF????WAVE": "wav",
}
_DATA_URL = re.compile(r"\s*data:[^,\s]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[\w+/=\s-]{64,}", re.ASCII)
_FILE_NAME = re.compile(
    r"\S+\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|heic|heif|avif|svg|wav|flac|ogg|mp3|m4a|mp4|mov|avi"
    r"|mkv|webm|npy|npz|pt|pth)",
    re.IGNORECASE,
)
_UNREAD_MAGIC = (b"????ftyp", b"ID3", b"\x1aE\xdf\xa3", b"PK\3\4", b"%PDF", b"\0\0\0\x0cJXL ")
"""The first bytes of media that nothing reads: HEIC, AVIF and MP4, MP3, Matroska, PDF ..."""
_TEXT_KEYS = (
    *("id", "question", "answer", "answers", "choices", "hint", "caption", "text", "texts"),
    *("text_list", "words", "conversations", "messages"),
)
LeftOut = Callable[[str], None]
"""Is told which record is left out, and why."""
_NAME_KEYS = ("url", "path", "file", "file_name", "name", *MEDIA_KEYS)


def read_objects(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list of any size, or of a `.jsonl` file, one after another.

    A byte order mark is passed over. Raises ValueError naming the file, and the object's number
    from 1, for anything else; the objects before it have come by then.
    """
    if Path(path).suffix == ".jsonl":
        yield from read_lines(path)
        return
    number = 1
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        try:
            events = ijson.parse(file, use_float=True)
            first = next(events)
            if first[1] != "start_array":
                raise ValueError("it must be a JSON list of objects, or a .jsonl file")
            for value in ijson.items(itertools.chain([first], events), "item"):
                if not isinstance(value, dict):
                    raise ValueError(f"a list must hold objects, found {value!r:.40}")
                yield value
                number += 1
        except (ijson.JSONError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: at object {number}: {reason}") from error


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file; empty lines and a byte order mark are passed over.

    Raises ValueError naming file and line for anything else.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: no JSON in UTF-8 ({error})") from error
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
    try:
        sample: dict[str, bytes | str] = {"__key__": key, "json": text.encode("utf-8")}
    except UnicodeEncodeError as error:
        raise ValueError(f"sample {key}: half a character in a text ({error})") from error
    images = []
    for name, extension, content in files:
        if extension in IMAGES:
            images.append((extension, content))
        else:
            if f"{name}.{extension}" in sample:
                raise ValueError(f"sample {key}: two files are called {name}.{extension}")
            sample[f"{name}.{extension}"] = content
    for number, (extension, content) in enumerate(images):
        sample[extension if len(images) == 1 else f"{number}.{extension}"] = content
    return sample


_URL_SAFE = str.maketrans("-_", "+/")


class _Taken(str):
    """The text that stands in a record for a file that was taken out of it."""


class Files:
    """The files of one record, in their order: those that it names, and those inside of it.

    where: the record, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.contents: list[tuple[str, str, bytes]] = []
        self._counts: Counter[str] = Counter()

    def add(self, key: str, extension: str, content: bytes) -> str:
        """Keep a file of a key, and return the text that stands for it in the record."""
        # A dot or a slash would begin another name, and webdataset leaves out what begins with _.
        name = re.sub(r"[^\w-]", "_", key).lower().lstrip("_") or "file"
        place = self._counts[name]
        self._counts[name] += 1
        self.contents.append((f"{name}{place or ''}", extension, content))
        if extension not in IMAGES:
            return _Taken(f"{name}{place or ''}.{extension}")
        return _Taken(f"image {sum(kind in IMAGES for _, kind, _ in self.contents) - 1}")

    def taken(self, key: str, value: Any) -> Any:
        """Return a value of the record with a text for each file in it, which is kept.

        A file is bytes, `datasets`' {bytes, path}, or the base64 text of a picture.

        Raises ValueError for bytes of no known format, and for a file that is not embedded.
        """
        if isinstance(value, bytes):
            return self.add(key, self._kind(key, value), value)
        if isinstance(value, str):
            content = self._decoded(key, value)
            return value if content is None else self.add(key, self._kind(key, content), content)
        if isinstance(value, list | tuple):
            return [self.taken(key, item) for item in value]
        if not isinstance(value, dict):
            return value
        if not value.keys() >= {"bytes", "path"}:
            return {name: self.taken(key, item) for name, item in value.items()}
        content, path = value["bytes"], value["path"]
        if content is None and path is not None:
            raise ValueError(
                f"{self.where}, column {key}: {path} is not embedded; save the data set with the"
                " files in it"
            )
        text = None if content is None else self.taken(key, content)
        rest = {name: item for name, item in value.items() if name not in ("bytes", "path")}
        return {**rest, "file": text} if rest else text

    def _decoded(self, key: str, text: str) -> bytes | None:
        """Return the file that a text is in base64; None for a text.

        Raises ValueError for a data URL that is damaged, or stands within a text.
        """
        url = _DATA_URL.match(text)
        if url is None and not _BASE64.fullmatch(text):
            if ";base64," in text.lower():
                raise ValueError(
                    f"{self.where}, column {key}: a file in base64 stands within a text; give it a"
                    f" key of its own, or leave the column out by --unread {key}"
                )
            return None
        payload = "".join(text[url.end() if url else 0 :].split()).translate(_URL_SAFE)
        payload += "=" * (-len(payload) % 4)
        with contextlib.suppress(binascii.Error):
            # Words alone may look like base64, too: a file begins as one.
            head = base64.b64decode(payload[:24])
            magics = (*_MAGIC, *_UNREAD_MAGIC, b"BM????\0\0\0\0")
            if url or any(_begins(head, magic) for magic in magics):
                return base64.b64decode(payload, validate=True)
            return None
        if url:
            raise ValueError(
                f"{self.where}, column {key}: a data URL whose base64 is damaged; leave the column"
                f" out by --unread {key}"
            )
        return None

    def _kind(self, key: str, data: bytes) -> str:
        """Return the extension of a file, told from its first bytes."""
        extension = extension_of(data)
        if extension is not None:
            return extension
        known = ", ".join(sorted({*_MAGIC.values(), "bmp"} & DECODERS.keys()))
        raise ValueError(
            f"{self.where}, column {key}: {len(data)} bytes of no known format; known are {known}."
            f" Leave the column out by --unread {key}"
        )


def extension_of(data: bytes) -> str | None:
    """Return the extension of a picture or sound, told from its first bytes; None for others."""
    for magic, extension in _MAGIC.items():
        if _begins(data, magic):
            return extension
    is_bmp = data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data)
    return "bmp" if is_bmp else None


def _begins(data: bytes, magic: bytes) -> bool:
    """Return whether data begin with `magic`, where ? stands for any byte."""
    same = (a == b or b == ord("?") for a, b in zip(data, magic, strict=False))
    return len(data) >= len(magic) and all(same)


def check_media(record: Mapping[str, Any], read: Collection[str], where: str) -> None:
    """Raise ValueError, beginning with `where`, for a key that names files which nobody reads.

    read: the keys whose files are read, or that are to be left out.
    """
    names = {str(item) for key in read for item in _listed(record.get(key))}
    for key, value in record.items():
        unread = [] if key in read else [name for name in _named(key, value) if name not in names]
        if unread:
            raise ValueError(
                f"{where}: {key} names files that are not read ({unread[0][:80]}); say where they"
                f" are (jsonl --files {key}=FOLDER, for names that are the key's own value), or"
                f" leave them out by --unread {key}"
            )


def _named(key: str, value: Any, top: bool = True, media: bool = False) -> Iterator[str]:
    """Yield the names of files in a value of a record, or anywhere inside of it.

    top: whether it is the record's own. media: whether it is inside a value of media.
    """
    media = media or key in MEDIA_KEYS or (key == "image_url" and not top)
    if isinstance(value, list):
        for item in value:
            yield from _named(key, item, top, media)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not media or name in _NAME_KEYS:
                yield from _named(name, item, False, media)
    elif key in MEDIA_KEYS and isinstance(value, int | float) and num_named(key, value):
        yield str(value)
    elif isinstance(value, str) and value and not isinstance(value, _Taken):
        is_name = bool(_FILE_NAME.fullmatch(value)) and "://" not in value
        is_name = is_name and top and key not in _TEXT_KEYS
        if media or is_name or (names_media(key) and num_named(key, value)):
            yield value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
