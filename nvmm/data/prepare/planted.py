"""NarrativeQA, with summaries as contexts, or with the summary planted in its long document.

ChatQA 2 (arXiv:2407.14482) plants the summary that a question was written from as a paragraph at a
random place of the document, without breaking a sentence, and asks the question: the evidence then
lies at a random depth of up to 128K tokens. ChatQA's context is the summary alone.

The folder is that of NarrativeQA's repository: qaps.csv, third_party/wikipedia/summaries.csv, and
the documents as tmp/<document_id>.content, which its script downloads.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvmm.data.prepare.conversations import Record, record
from nvmm.data.prepare.records import LeftOut

_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[A-Z0-9])")
_SHORT = re.compile(
    r"(?:^|[\s(\"'\u201c\u2018])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Capt|Col|Gen|Lt|Sgt|Rev|Hon|Jr|Sr|Mt"
    r"|No|vs|etc|i\.e|e\.g|cf)\.$"
)
_LONGEST_SHORT = 8


@dataclass(frozen=True)
class Lengths:
    """Which documents are taken for planting, in tokens of the model's tokenizer.

    shortest, longest: of a document with its summary; longer ones are cut at a sentence's end
        before the summary is planted. reserve: tokens of `longest` left to template, question and
        answer (our choice), since a context that does not fit would lose its end, and the summary.
    """

    shortest: int = 32768
    longest: int = 131072
    reserve: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest - self.reserve or self.reserve < 0:
            raise ValueError(
                f"shortest={self.shortest}, longest={self.longest}, reserve={self.reserve}: need"
                " 0 <= shortest <= longest - reserve"
            )


@dataclass(frozen=True)
class Planted:
    """A document with a paragraph in it. depth: its place, from 0 (the beginning) to 1."""

    text: str
    depth: float


def boundaries(text: str) -> list[int]:
    """Return where a text may be parted without breaking a sentence, its beginning and end too.

    A sentence ends with . ! or ? (quotes and brackets may follow), white space, and a capital or
    digit after it. Initials and common abbreviations end none.
    """
    places = [0]
    for match in _END.finditer(text):
        before = text[max(0, match.start() - _LONGEST_SHORT) : match.start() + 1]
        if not _SHORT.search(before):
            places.append(match.end())
    return [*places, len(text)]


def plant(text: str, paragraph: str, rng: random.Random) -> Planted:
    """Return a text with a paragraph at a random boundary of its sentences, each as likely."""
    place = rng.choice(boundaries(text))
    parts = (text[:place].rstrip(), paragraph.strip(), text[place:].lstrip())
    return Planted("\n\n".join(part for part in parts if part), round(place / len(text), 4))


def summaries(folder: str | Path, split: str) -> Iterator[Record]:
    """Yield NarrativeQA's questions with the summary as context. split: train, valid or test."""
    folder = Path(folder)
    texts = _summaries(folder, split)
    for row in _questions(folder, split):
        yield _record(row, _of(texts, row["document_id"], folder))


def planted(
    folder: str | Path,
    split: str,
    count_tokens: Callable[[str], int],
    lengths: Lengths,
    left_out: LeftOut,
    seed: int = 0,
) -> Iterator[Record]:
    """Yield NarrativeQA's questions with the whole document, the summary planted in it.

    Records have `depth` and `document_id` beside the fields that builders read. Each question has
    a place of its own, the same for a seed (our choice).
    """
    folder = Path(folder)
    texts = _summaries(folder, split)
    name, fitting = "", ""
    for row in _questions(folder, split):
        summary = _of(texts, row["document_id"], folder)
        if row["document_id"] != name:
            name = row["document_id"]
            fitting = _fitting(_document(folder, name), summary, count_tokens, lengths)
        question = f"{name}: {row['question']}"
        if not fitting:
            left_out(f"{question} (its document has fewer than {lengths.shortest} tokens)")
            continue
        digest = hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=8).digest()
        made = plant(fitting, summary, random.Random(int.from_bytes(digest, "big")))
        yield {**_record(row, made.text), "depth": made.depth, "document_id": name}


def _fitting(text: str, summary: str, count_tokens: Callable[[str], int], lengths: Lengths) -> str:
    """Return as many whole sentences of a document as fit with its summary; none if too short."""
    used = count_tokens(summary) + 2  # the blank lines around it
    room = lengths.longest - lengths.reserve - used
    if room < 1:
        return ""
    total = count_tokens(text)
    if total + used < lengths.shortest:
        return ""
    while total > room and text:
        # Tokens are spread evenly enough that two rounds do.
        most = min(int(len(text) * room / total), len(text) - 1)
        text = text[: max(place for place in boundaries(text) if place <= most)].rstrip()
        total = count_tokens(text)
    return text


def _record(row: dict[str, str], context: str) -> Record:
    asked = [{"role": "user", "content": row["question"]}]
    answers = [row[key] for key in ("answer1", "answer2") if (row[key] or "").strip()]
    try:
        return record(asked, answers, [context])
    except ValueError as error:
        raise ValueError(f"qaps.csv: document {row['document_id']}: {error}") from error


def _questions(folder: Path, split: str) -> Iterator[dict[str, str]]:
    columns = ("document_id", "set", "question", "answer1", "answer2")
    yield from _rows(folder / "qaps.csv", split, columns)


def _summaries(folder: Path, split: str) -> dict[str, str]:
    path = folder / "third_party" / "wikipedia" / "summaries.csv"
    rows = _rows(path, split, ("document_id", "set", "summary"))
    return {row["document_id"]: row["summary"] for row in rows}


def _rows(path: Path, split: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a split; ValueError naming the file for another header or no row."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path} has no columns {', '.join(lacking)}")
        found = False
        for row in reader:
            if row["set"] == split:
                found = True
                yield row
    if not found:
        raise ValueError(f"{path}: no row has the set {split}; use train, valid or test")


def _of(texts: dict[str, str], name: str, folder: Path) -> str:
    if not texts.get(name, "").strip():
        raise ValueError(f"{folder}: document {name} of qaps.csv has no summary")
    return texts[name]


def _document(folder: Path, name: str) -> str:
    """Return a document's text: UTF-8, or Latin-1, which some of the downloaded ones are in."""
    data = (folder / "tmp" / f"{name}.content").read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
