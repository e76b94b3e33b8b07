"""The objects of JSON files of any size, one after another, without holding a file whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nvmm.data.prepare.records import read_lines

_BLOCK = 1 << 20
_SPACE = re.compile(r"\s*")


def objects(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list, or of a `.jsonl` file with one a line.

    A byte order mark is passed over. Raises ValueError naming the file, and the object's number
    from 1, for anything else; the objects before it have come by then.
    """
    if Path(path).suffix == ".jsonl":
        yield from read_lines(path)
        return
    with open(path, encoding="utf-8-sig") as file:
        items, number = _items(_Reader(file)), 0
        while True:
            number += 1
            try:
                value = next(items, None)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: at object {number}: {error}") from error
            if value is None:
                return
            yield value


class _Reader:
    """The text of a file, of which only what is not read yet is held."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Pass over the character that `peek` gave."""
        self._place += 1

    def value(self) -> Any:
        """Return the object, list or text that begins at the character that `peek` gave."""
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
                return value
            except json.JSONDecodeError:
                if not self._more():
                    raise

    def _more(self) -> bool:
        """Read as much again as is held, so that a long object is not parsed too often."""
        rest = self._text[self._place :]
        block = self._file.read(max(_BLOCK, len(rest)))
        self._text, self._place = rest + block, 0
        return bool(block)


def _items(reader: _Reader) -> Iterator[Any]:
    """Yield the values of the list that a text is."""
    if reader.peek() != "[":
        raise ValueError("must be a JSON list of objects, or a .jsonl file")
    reader.skip()
    if reader.peek() == "]":
        reader.skip()
    else:
        while True:
            if reader.peek() != "{":
                raise ValueError(f"a list must hold objects, found {reader.peek()!r}")
            yield reader.value()
            mark = reader.peek()
            reader.skip()
            if mark == "]":
                break
            if mark != ",":
                raise ValueError(f"expected , or ] behind an object, found {mark!r}")
    if reader.peek():
        raise ValueError(f"text behind the list: {reader.peek()!r}")
