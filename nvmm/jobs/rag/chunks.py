"""Documents are cut into chunks of words, tokens or sentences, which may overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import pyarrow as pa

from nvmm.config.choices import require
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest

Unit = Literal["words", "tokens", "sentences"]
Span = tuple[int, int]
_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*\s+|\n\s*\n\s*")


@dataclass(frozen=True)
class Chunking:
    """How a document is cut.

    unit: words are separated by white space; tokens are those of the command's checkpoint;
        sentences end at ., ! or ? before white space, and at empty lines.
    size: units of a chunk; the last one of a document may have fewer.
    overlap: units that a chunk has in common with the one before it.
    """

    unit: Unit = "words"
    size: int = 150
    overlap: int = 0

    def __post_init__(self) -> None:
        require("job.chunking.unit", self.unit, Unit)
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"job.chunking.overlap={self.overlap} must be at least 0, and below"
                f" size={self.size}"
            )

    def spans(self, text: str, tokenizer: Tokenizer | None = None) -> list[Span]:
        """Return the chunks of a text: first character and that behind the last one.

        White space around a chunk is not of it. A text without a unit has no chunk.
        """
        units = self._units(text, tokenizer)
        starts = range(0, max(len(units) - self.overlap, 1), self.size - self.overlap)
        chunks = [units[start : start + self.size] for start in starts]
        spans = [_stripped(text, some[0][0], some[-1][1]) for some in chunks if some]
        return [(start, end) for start, end in spans if start < end]

    def _units(self, text: str, tokenizer: Tokenizer | None) -> list[Span]:
        if self.unit == "words":
            return [match.span() for match in _WORD.finditer(text)]
        if self.unit == "tokens":
            assert tokenizer is not None, "tokens are those of a checkpoint"
            return tokenizer.spans(text)
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        edges = [0, *ends, len(text)]
        spans = [_stripped(text, *edge) for edge in pairwise(edges)]
        return [(start, end) for start, end in spans if start < end]


def chunk_id(document: str, span: Span) -> str:
    """Return a chunk's id, which keeps its document and its characters in it."""
    return f"{document}#{span[0]}-{span[1]}"


@dataclass(frozen=True)
class Chunk(Job):
    """Cut every document. A row has `id`, `starts` and `ends` of its chunks, and `error`.

    texts: document id -> text.
    """

    texts: Mapping[str, str]
    chunking: Chunking
    part_size: int
    name: str = "chunk"

    def prepare(self, model: Restored | None) -> Work:
        """Return the work; a document without a chunk has an error."""
        ids = list(self.texts)
        tokenizer = self.require(model).tokenizer if self.chunking.unit == "tokens" else None
        cut = partial(self.chunking.spans, tokenizer=tokenizer)

        def rows(numbers: range) -> pa.Table:
            chosen = [ids[number] for number in numbers]
            spans = [cut(self.texts[name]) for name in chosen]
            return pa.Table.from_pydict(
                {
                    "id": chosen,
                    "starts": [[start for start, _ in some] for some in spans],
                    "ends": [[end for _, end in some] for some in spans],
                    "error": [
                        None if some else f"document {name} has no text"
                        for name, some in zip(chosen, spans, strict=True)
                    ],
                },
                _SCHEMA,
            )

        return Work(len(ids), digest(list(self.texts.items())), rows)


def _stripped(text: str, start: int, end: int) -> Span:
    """Return a span without the white space around its text."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "starts": pa.list_(pa.int64()),
        "ends": pa.list_(pa.int64()),
        "error": pa.string(),
    }
)
