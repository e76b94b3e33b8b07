"""Chunks of documents in front of a question: how they are labelled and joined, and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nvmm.data.samples.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """A chunk's text between the texts of its label."""

    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return self.before + self.text + self.after


@dataclass(frozen=True)
class Contexts:
    """The block of contexts of one sample.

    may_cut: whether it may lose its end where the sample is too long.
    """

    chunks: Sequence[Chunk]
    separator: str
    may_cut: bool = True

    @property
    def text(self) -> str:
        """The text of the block."""
        return self.separator.join(map(str, self.chunks))

    def shortened(self, excess: int, tokenizer: Tokenizer) -> Contexts | None:
        """Return the block without about `excess` tokens at its end, None where nothing is left.

        The last chunk goes first; the first that need not go as a whole loses the end of its text.
        At least one token of text goes.
        """
        chunks = list(self.chunks)
        while chunks and excess > 0:
            last = chunks.pop()
            size = len(tokenizer.encode(last.text))
            text = tokenizer.beginning(last.text, size - excess).rstrip() if size > excess else ""
            if 0 < len(text) < len(last.text):
                chunks.append(replace(last, text=text))
                break
            excess -= len(tokenizer.encode(self.separator + str(last)))
        return replace(self, chunks=chunks) if chunks else None


@dataclass(frozen=True)
class Passages:
    """How the chunks of a sample are written.

    one, several: form of the only chunk of a sample, and of each of several: {text} is its text and
        {number} its place, from 1 on.
    separator: text between two chunks.
    shuffle: put them in an order that the sample's key alone decides, so that it is the same in
        every epoch, on every layout, and in prompts.
    """

    one: str = "{text}"
    several: str = "{text}"
    separator: str = "\n\n"
    shuffle: bool = False

    def __post_init__(self) -> None:
        for name in ("one", "several"):
            form = getattr(self, name)
            if form.count("{text}") != 1:
                raise ValueError(f"form.passages.{name}={form!r} must have {{text}} once")

    def order(self, size: int, key: str) -> list[int]:
        """Return the numbers of `size` chunks in the order in which they are written."""
        numbers = range(size)
        return sorted(numbers, key=lambda n: _draw(key, n)) if self.shuffle else [*numbers]

    def block(self, texts: Sequence[str], *, may_cut: bool = True) -> Contexts:
        """Return chunks, in the order in which they are written, as a block."""
        form = self.one if len(texts) == 1 else self.several
        before, _, after = form.partition("{text}")
        chunks = []
        for number, text in enumerate(texts, 1):
            label, end = (each.replace("{number}", str(number)) for each in (before, after))
            chunks.append(Chunk(label, text, end))
        return Contexts(tuple(chunks), self.separator, may_cut)


def _draw(key: str, number: int) -> bytes:
    return hashlib.blake2b(f"{key}\0{number}".encode("utf-8", "surrogatepass")).digest()
