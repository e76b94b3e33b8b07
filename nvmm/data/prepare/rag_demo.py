"""Everything that `tools/demo_rag.py` trains and evaluates on, of Python's documentation.

    text/ chats/ questions/ answer/ relevance/ pairs/ unanswerable/ planted/ planted_long/   shards
    pages.jsonl                      whole pages, for rows of long text
    documents.jsonl questions.jsonl  of a RAG run, from held-out modules
    haystack.txt                     the pages of held-out modules
    tokenizer/                       a byte-level BPE

No training text names a held-out module's callables but in passing: their pages and entries are
left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvmm.data.prepare import conversations, python_api, ranking
from nvmm.data.prepare.once import once
from nvmm.data.prepare.python_faq import plain
from nvmm.data.prepare.records import to_sample
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.io.files import write

FORMAT = 2
"""A number that is increased when the data made from the same arguments change."""
BOS = "<|begin|>"
END = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", BOS, "<|im_start|>", END, "<|vision_pad|>")
VOCAB_SIZE = 2048
PASSAGES = 5
"""Of a question in training."""
RENAMED = 5
"""Times that each entry is asked for with another name too."""
SHORT = (200, 1100)
LONG = (1500, 8000)
"""Characters of texts with an entry planted in them: within 512 and 4,096 tokens."""


@dataclass(frozen=True)
class Amounts:
    """The share of entries held out; documents and questions of a RAG run, the last of which have
    no answer; and the seed.
    """

    held_out: float = 0.12
    documents: int = 330
    questions: int = 120
    unanswerable: int = 30
    seed: int = 1234


def build(folder: str | Path, source: Path, amounts: Amounts = Amounts()) -> bool:
    """Write the data; return False if they were there already.

    source: the documentation's `_sources`. The same arguments give the same bytes.
    """
    folder = Path(folder)
    settings = {"format": FORMAT, **asdict(amounts)}
    return once(folder, settings, partial(_write, folder, source, amounts))


def _write(folder: Path, source: Path, amounts: Amounts) -> None:
    found = python_api.entries(source)
    training, held_out = python_api.split(found, amounts.held_out)
    hidden = {entry.module for entry in held_out}
    pages = list(python_api.pages(source, hidden))
    _tokenizer(folder / "tokenizer", pages, training)
    _shards(folder, source, pages, training, amounts.seed)
    documents, questions = python_api.evaluation(
        held_out, amounts.documents, amounts.questions, amounts.unanswerable, amounts.seed
    )
    _lines(folder / "pages.jsonl", ({"text": page, "source": "docs"} for page in pages))
    _lines(folder / "documents.jsonl", documents)
    _lines(folder / "questions.jsonl", questions)
    paths = [source / "library" / f"{name}.rst.txt" for name in sorted(hidden)]
    text = "\n\n".join(plain(path.read_text(encoding="utf-8")) for path in paths if path.exists())
    write(folder / "haystack.txt", text + "\n")


def _shards(
    folder: Path, source: Path, pages: list[str], training: list[python_api.Entry], seed: int
) -> None:
    """Write the shards of training, as the commands of `nvmm shard` make them of such files."""
    left_out: list[str] = []
    pieces = [piece for page in pages for piece in python_api.pieces(page)]
    texts: list[dict[str, bytes | str]] = [
        {"__key__": f"{number:06d}", "txt": piece.encode()} for number, piece in enumerate(pieces)
    ]
    write_shards(folder / "text", "train", texts)

    def written(name: str, records: Iterable[Mapping[str, Any]]) -> None:
        samples = [to_sample(f"{n:06d}", dict(record)) for n, record in enumerate(records)]
        write_shards(folder / name, "train", samples)

    asked = training + python_api.renamed(training, RENAMED, seed)

    def ranked() -> Iterable[ranking.Ranked]:
        items = python_api.ranked(asked, PASSAGES - 1, seed)
        return ranking.read_dpr(items, left_out.append)

    def chats(records: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        return conversations.plain(records, left_out.append)

    written("chats", chats(python_api.chats(training, source)))
    written("questions", conversations.chatqa(python_api.questions(asked)))
    written("answer", ranking.answering(ranked(), PASSAGES, left_out.append))
    written("relevance", ranking.relevance(ranked(), PASSAGES, left_out.append))
    written("pairs", ranking.pairs(ranked(), 1))
    written("unanswerable", python_api.unanswerable(asked, PASSAGES, seed))
    for name, size in (("planted", SHORT), ("planted_long", LONG)):
        written(name, chats(python_api.planted(asked, pieces, size, seed)))
    if left_out:
        raise ValueError(f"{len(left_out)} of the demo's own records are left out: {left_out[0]}")


def _tokenizer(folder: Path, pages: list[str], training: list[python_api.Entry]) -> None:
    """Train a tokenizer on the pages, and on the entries as passages and questions have them."""
    spoken = ["Passage 1: Assistant: User: How do I call it?"] * 100
    texts = [f" {entry.text}" for entry in training]
    train_byte_level_bpe(
        folder,
        [*pages, *texts, *spoken],
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        bos_token=BOS,
        eos_token=END,
        pad_token=SPECIAL_TOKENS[0],
    )


def _lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write(path, text)
