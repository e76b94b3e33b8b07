"""Dialogues over documents become unanswerable questions and ranking pairs, by where answers stand.

Inputs are those of `nvmm.data.prepare.dialogues`, or ChatQA's training data. What a chunk holds of
an answer is the 4-gram recall of that module: more than 0.5 is high, less than 0.1 low.

Unanswerable (ChatQA, arXiv:2401.10225): the words that answer are deleted from a document whose
spans people have marked, or the chunks of high recall are dropped from one without marks; such a
question counts only where all other chunks are low. The question stays; its record says
`answerable: false`, and the template's refusal is the answer.

Pairs (RankRAG, arXiv:2407.02485): each chunk with its question, relevant where high, irrelevant
where low; chunks between are dropped.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nvmm.config.choices import require
from nvmm.data.prepare.conversations import Record, chatqa_record, record
from nvmm.data.prepare.dialogues import answered, checked, chunk_words, four_gram_recall
from nvmm.data.prepare.ranking import pair
from nvmm.data.prepare.records import LeftOut

By = Literal["spans", "recall"]


@dataclass(frozen=True)
class Bounds:
    """How documents are cut, and which recall is high or low (the papers' values).

    words: most words of a chunk.
    """

    words: int = 150
    high: float = 0.5
    low: float = 0.1

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words} must be at least 1")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}: need 0 <= low <= high <= 1")


@dataclass(frozen=True)
class Asked:
    """A question that an agent answers: its id, the turns up to it, the answer and the document.

    spans: the words of the document that answer, None where nobody has marked any.
    """

    name: str
    messages: list[dict[str, str]]
    answer: str
    spans: list[str] | None
    document: str


def questions(
    dialogues: Iterable[Mapping[str, Any]], documents: Mapping[str, str]
) -> Iterator[Asked]:
    """Yield every question that an agent answers next.

    `evidence` of the agent's turn marks its spans: a text or a list of texts. An empty one says
    that no document answers, and the question is passed over.

    Raises ValueError as `dialogues.answered` does, and for evidence that is no text.
    """
    roles = {"user": "user", "agent": "assistant"}
    for one in answered(dialogues, documents):
        spans = one.reply.get("evidence")
        listed = [spans] if isinstance(spans, str) else spans
        if listed is not None and not all(isinstance(span, str) for span in listed):
            raise ValueError(f"{one.where}: evidence of turn {one.number} must be texts: {spans!r}")
        if listed is not None and not any(listed):
            continue
        asked = [{"role": roles[who], "content": text} for who, text in one.turns]
        yield Asked(one.name, asked, one.answer, listed, documents[one.document])


def chatqa_questions(items: Iterable[Mapping[str, Any]]) -> Iterator[Asked]:
    """Yield the questions of ChatQA's training data, as SyntheticConvQA has them; none is marked.

    Raises ValueError naming the record for one without document, question or answer.
    """
    for number, item in enumerate(items, 1):
        document = item.get("document")
        if not isinstance(document, str) or not document.strip():
            raise ValueError(f"record {number} has no document")
        try:
            made = chatqa_record(item)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        *asked, answer = made["messages"]
        yield Asked(f"record {number}", asked, answer["content"], None, document)


def unanswerable(
    asked: Iterable[Asked],
    by: By,
    bounds: Bounds,
    left_out: LeftOut,
    *,
    count: int | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """Yield the questions whose answers can be taken out of their documents.

    by: "spans" or "recall". count: so many of them, chosen by the seed, in the order of their
    draw; None: all, as they come.
    """
    require("by", by, By)
    possible = _possible(asked, by, bounds, left_out)
    if count is None:
        yield from (made for _, made in possible)
        return
    drawn = heapq.nsmallest(count, possible, key=lambda named: _draw(named[0], seed))
    if len(drawn) < count:
        raise ValueError(f"count={count}: only {len(drawn)} questions can be made unanswerable")
    yield from (made for _, made in drawn)


def _possible(
    asked: Iterable[Asked], by: By, bounds: Bounds, left_out: LeftOut
) -> Iterator[tuple[str, Record]]:
    for question in asked:
        if by == "spans":
            rest, why = _without_spans(question)
        else:
            rest, why = _without_chunks(question, bounds)
        if why:
            left_out(f"{question.name}: {why}")
            continue
        yield question.name, record(question.messages, [], rest, answerable=False)


def _without_spans(question: Asked) -> tuple[list[str], str]:
    """Return the document without the marked spans, wherever they stand in it, and why not."""
    if question.spans is None:
        return [], "no evidence is marked"
    kept = [True] * len(question.document)
    for span in filter(None, question.spans):
        places = [match.start() for match in re.finditer(re.escape(span), question.document)]
        if not places:
            return [], f"the evidence {span[:40]!r} is not in the document"
        for place in places:  # spans may overlap
            kept[place : place + len(span)] = [False] * len(span)
    text = "".join(itertools.compress(question.document, kept))
    return ([text], "") if text.strip() else ([], "nothing is left of the document")


def _recalls(question: Asked, bounds: Bounds) -> tuple[list[str], list[float]]:
    """Return the chunks of a question's document, and what each holds of the answer."""
    chunks = chunk_words(question.document, bounds.words)
    return chunks, [four_gram_recall(question.answer, chunk) for chunk in chunks]


def _without_chunks(question: Asked, bounds: Bounds) -> tuple[list[str], str]:
    """Return the chunks of low recall as one text, and why there are none."""
    chunks, recalls = _recalls(question, bounds)
    rest = [i for i, recall in enumerate(recalls) if recall <= bounds.high]
    if len(rest) == len(chunks):
        # Its answer is in other words somewhere in the document, and stays there (our choice).
        return [], f"no chunk has more 4-gram recall than {bounds.high}"
    if not rest:
        return [], "nothing is left of the document"
    if any(recalls[i] >= bounds.low for i in rest):
        return [], f"a chunk that is left has a 4-gram recall of {bounds.low} or more"
    return ["\n\n".join(chunks[i] for i in rest)], ""


def pairs(
    asked: Iterable[Asked], bounds: Bounds, *, negatives: int | None = None, seed: int = 0
) -> Iterator[Record]:
    """Yield the ranking pairs of each question: every high chunk, and its low ones.

    negatives: at most so many low chunks for each high one, chosen by the seed (no source gives a
        ratio); None: all of them. A question without a high chunk gives none.
    """
    for question in asked:
        chunks, recalls = _recalls(question, bounds)
        high = [i for i, recall in enumerate(recalls) if recall > bounds.high]
        low = [i for i, recall in enumerate(recalls) if recall < bounds.low]
        if negatives is not None:
            ordered = sorted(low, key=lambda i: _draw(f"{question.name}#{i}", seed))
            low = sorted(ordered[: negatives * len(high)])
        *before, latest = question.messages
        for i in (*high, *(low if high else ())):
            yield pair(latest["content"], chunks[i], relevant=i in high, messages=before)


def read_documents(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return id -> text of documents {"_id", "text"}; ValueError naming the number of a bad one."""
    return {name: text for _, name, text, _ in checked(records)}


def _draw(name: str, seed: int) -> bytes:
    """Return bytes that are as good as random, and always the same for a name and a seed."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
