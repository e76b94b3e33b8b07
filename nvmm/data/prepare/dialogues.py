"""Dialogues over documents become retrieval records: chunks, positives by 4-gram recall, negatives.

ChatQA (arXiv:2401.10225): documents are cut into chunks of some 300 words; the positive of a
question is the chunk with the highest 4-gram recall of the agent's answer. Negatives are the other
chunks of the same document (our choice: the paper says only that there are negatives).

A document is {"_id", "text"} and may have a `title`, as in BEIR's corpus.jsonl. A dialogue is
{"_id", "document_id", "messages"}; a turn of the agent may have `evidence`, the words of the
document that answer (the paper's human-annotated set), which then stand for the answer; an empty
one says that no document answers this turn, which is then none to train.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import LeftOut
from nvmm.data.samples.dialogue import Dialogue, Speaker, turns
from nvmm.io.files import write

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Rules:
    """How documents are cut and chunks chosen.

    words: most words of a chunk. ChatQA's paper has 300; the released evaluation files say 150.
    answer_recall: a chunk with more 4-gram recall than this, beside the positive, answers too and
        is no negative (the paper's bound of "high", of another step; here our choice).
    min_recall: a question whose best chunk has no more than this is left out (our choice).
    """

    words: int = 300
    answer_recall: float = 0.5
    min_recall: float = 0.0

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words} must be at least 1")
        for name in ("answer_recall", "min_recall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")


@dataclass(frozen=True)
class Chunk:
    """A part of a document: its id `<document>#<number>`, the document's title, its own text."""

    name: str
    title: str
    text: str

    @property
    def whole(self) -> str:
        """Title and text, as BEIR and mteb join them."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Question:
    """A question of a dialogue: its id, the turns up to it, and the chunks that answer it.

    recalls: of each chunk of the document. positive: place of the best one.
    """

    name: str
    messages: list[dict[str, str]]
    chunks: Sequence[Chunk]
    recalls: list[float]
    positive: int


def chunk_words(text: str, words: int) -> list[str]:
    """Cut a text into the fewest parts of at most `words` words, of lengths that differ by one.

    Parts keep the white space inside them. An empty text has none.
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    count = -(-len(spans) // words)
    bounds = [len(spans) * number // count for number in range(count + 1)] if count else []
    return [text[spans[a][0] : spans[b - 1][1]] for a, b in itertools.pairwise(bounds)]


def four_gram_recall(answer: str, chunk: str) -> float:
    """Return the share of the answer's distinct 4-grams of lower-case words that the chunk has.

    An answer of fewer than four words is one gram; one without words has recall 0.
    """
    wanted, found = _WORD.findall(answer.lower()), _WORD.findall(chunk.lower())
    if not wanted:
        return 0.0
    size = min(4, len(wanted))
    grams = {tuple(wanted[i : i + size]) for i in range(len(wanted) - size + 1)}
    here = {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}
    return len(grams & here) / len(grams)


def checked(
    documents: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[int, str, str, Mapping[str, Any]]]:
    """Yield number, from 1, id and text of documents {"_id", "text", ..}, and the whole.

    Raises ValueError naming the number for a document without an id and a text, and for an id that
    two documents have.
    """
    seen: set[str] = set()
    for number, document in enumerate(documents, 1):
        name, text = document.get("_id"), document.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"document {number} needs an _id and a text, has {dict(document)}")
        if name in seen:
            raise ValueError(f"document {number} has the _id {name} of another")
        seen.add(name)
        yield number, name, text, document


def cut_documents(documents: Iterable[Mapping[str, Any]], words: int) -> dict[str, list[Chunk]]:
    """Return the chunks of each document by its id.

    Raises ValueError as `checked` does, and for a title that is no text.
    """
    chunks: dict[str, list[Chunk]] = {}
    for number, name, text, document in checked(documents):
        title = document.get("title")
        if not isinstance(title, str | None):
            raise ValueError(f"document {number}: title must be text, got {title!r}")
        parts = chunk_words(text, words)
        chunks[name] = [Chunk(f"{name}#{i}", title or "", part) for i, part in enumerate(parts)]
    return chunks


@dataclass(frozen=True)
class Answered:
    """A turn of a user that the agent answers next.

    where: the dialogue, for messages. name: of the question. document: the id of its document.
    turns: (role, text) up to the question. number: of the agent's turn in the dialogue, from 1.
    reply: that turn as it came.
    """

    where: str
    name: str
    document: str
    turns: list[tuple[Speaker, str]]
    number: int
    reply: Mapping[str, Any]
    answer: str


def answered(
    dialogues: Iterable[Mapping[str, Any]], documents: Container[str]
) -> Iterator[Answered]:
    """Yield every turn of a user that the agent answers next.

    Raises ValueError naming the dialogue for one of an unknown document or with bad turns.
    """
    for number, dialogue in enumerate(dialogues, 1):
        name, document = dialogue.get("_id"), dialogue.get("document_id")
        where = f"dialogue {number} ({name})"
        if not isinstance(name, str) or not isinstance(document, str) or document not in documents:
            raise ValueError(f"{where} needs an _id and the document_id of a document: {document}")
        messages = dialogue.get("messages")
        try:
            spoken = turns(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        assert isinstance(messages, list)
        for place in range(1, len(spoken)):
            (who, _), (next_one, answer) = spoken[place - 1 : place + 1]
            if (who, next_one) == ("user", "agent"):
                question = f"{name}/{place // 2}"
                yield Answered(
                    where, question, document, spoken[:place], place + 1, messages[place], answer
                )


def questions(
    dialogues: Iterable[Mapping[str, Any]],
    chunks: Mapping[str, Sequence[Chunk]],
    rules: Rules,
    left_out: LeftOut,
) -> Iterator[Question]:
    """Yield every question of a user that the agent answers next, with its positive chunk.

    left_out: is told which question has no chunk with enough recall.

    Raises ValueError as `answered` does, and for evidence that is no text.
    """
    for one in answered(dialogues, chunks):
        evidence = one.reply.get("evidence", one.answer)
        if not isinstance(evidence, str):
            raise ValueError(f"{one.where}: evidence of turn {one.number} must be text")
        if not evidence:
            continue
        here = chunks[one.document]
        recalls = [four_gram_recall(evidence, chunk.text) for chunk in here]
        best = max(range(len(here)), key=recalls.__getitem__)
        if recalls[best] <= rules.min_recall:
            left_out(
                f"{one.name}: no chunk of {one.document} has more 4-gram recall than"
                f" {rules.min_recall}"
            )
            continue
        asked = [{"role": who, "content": text} for who, text in one.turns]
        yield Question(one.name, asked, here, recalls, best)


def records(asked: Iterable[Question], name: str, rules: Rules) -> Iterator[dict[str, Any]]:
    """Yield a record for shards of each question.

    name: of the set, before every id, since ids are compared over all sets of a blend.
    """
    for question in asked:
        answers = answering(question, rules)
        others = [i for i in range(len(question.chunks)) if i not in answers]
        yield {
            "messages": question.messages,
            "positive": question.chunks[question.positive].whole,
            "positive_id": f"{name}/{question.chunks[question.positive].name}",
            "positive_ids": [f"{name}/{question.chunks[i].name}" for i in answers],
            "negatives": [question.chunks[i].whole for i in others],
            "negative_ids": [f"{name}/{question.chunks[i].name}" for i in others],
        }


def answering(question: Question, rules: Rules) -> list[int]:
    """Return the places of the chunks that answer: the positive, and those of high recall."""
    high = {i for i, recall in enumerate(question.recalls) if recall > rules.answer_recall}
    return sorted({question.positive, *high})


def write_beir(
    folder: str | Path,
    split: str,
    chunks: Mapping[str, Sequence[Chunk]],
    asked: Iterable[Question],
    rules: Rules,
    dialogue: Dialogue,
) -> None:
    """Write all chunks and the questions as a folder in BEIR's layout, which evaluations read.

    A chunk that answers has relevance 1. A query is the whole dialogue, rendered.
    """
    corpus = [
        {"_id": chunk.name, "title": chunk.title, "text": chunk.text}
        for parts in chunks.values()
        for chunk in parts
    ]
    queries, qrels = [], ["query-id\tcorpus-id\tscore"]
    for question in asked:
        queries.append({"_id": question.name, "text": dialogue.render(question.messages)})
        names = (question.chunks[i].name for i in answering(question, rules))
        qrels += [f"{question.name}\t{chunk}\t1" for chunk in names]
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for file, lines in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write(folder / f"{file}.jsonl", text)
    write(folder / "qrels" / f"{split}.tsv", "\n".join(qrels) + "\n")
