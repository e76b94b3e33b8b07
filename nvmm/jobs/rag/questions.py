"""What a RAG run reads: documents and questions, and the chunks and queries that it makes of them.

`documents` is a .jsonl file of BEIR's fields: `_id`, `text` and optionally `title`, which goes
before the text. `questions` is a .jsonl file; an object has

- `id`, and `question`, or `messages`: turns of a dialogue, the last one the user's;
- optionally `answers` (every accepted one), `answerable` (false: the right answer is that there is
  none), `instruction`;
- optionally `relevant`: ids of documents, or {"document", "start", "end"}, characters of one;
- optionally `contexts`: texts that are its gold contexts, instead of the relevant chunks;
- optionally `document`, the id of the whole document that long context reads; else that is the
  only one which `relevant` names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nvmm.data.prepare.layouts import RetrievalSet
from nvmm.data.prepare.mbeir import Item
from nvmm.data.prepare.records import read_lines
from nvmm.data.samples.dialogue import Dialogue, turns

Relevance = Literal["gold", "answer"]
"""A chunk is relevant that lies in a gold document or touches a gold span, or that contains an
answer: its words, whatever their case and punctuation."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Place:
    """Characters start to end - 1 of a document; without an end, all of it."""

    document: str
    start: int = 0
    end: int | None = None

    def touches(self, document: str, start: int, end: int) -> bool:
        """Return whether a chunk has a character of it."""
        last = end if self.end is None else self.end
        return document == self.document and start < last and self.start < end


@dataclass(frozen=True)
class Chunk:
    """A chunk of a document: its characters there, and its text."""

    document: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Question:
    """One object of the questions' file. messages: the last one is the question."""

    id: str
    messages: Sequence[Mapping[str, str]]
    answers: Sequence[str] = ()
    answerable: bool = True
    instruction: str | None = None
    relevant: Sequence[Place] = ()
    document: str | None = None
    contexts: Sequence[str] = ()
    words: Sequence[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = [words_of(answer) for answer in self.answers]
        object.__setattr__(self, "words", [text for text in words if text.strip()])

    @property
    def text(self) -> str:
        """The latest question."""
        return self.messages[-1]["content"]

    def record(self, **more: Any) -> dict[str, Any]:
        """Return it as a record of conversations, with other keys."""
        instruction = {} if self.instruction is None else {"instruction": self.instruction}
        return {"messages": list(self.messages), **instruction, **more}

    def finds(self, chunk: Chunk, relevance: Relevance) -> bool:
        """Return whether a chunk is relevant."""
        if relevance == "gold":
            return any(
                place.touches(chunk.document, chunk.start, chunk.end) for place in self.relevant
            )
        text = words_of(chunk.text)
        return any(words in text for words in self.words)

    def judged(self, relevance: Relevance) -> bool:
        """Return whether it says what is relevant; unanswerable questions never do."""
        return self.answerable and bool(self.relevant if relevance == "gold" else self.words)


def words_of(text: str) -> str:
    """Return a text's words, in lower case and between single spaces."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def read_documents(path: str) -> dict[str, str]:
    """Return document id -> title, a line break, and text.

    Raises ValueError, naming file and record, for one without id or text, and for an id twice.
    """
    documents: dict[str, str] = {}
    for number, line in enumerate(_lines(path, "documents"), 1):
        name, text, title = line.get("_id"), line.get("text"), line.get("title") or ""
        if (
            not isinstance(name, str)
            or not name
            or not all(isinstance(t, str) for t in (text, title))
        ):
            raise ValueError(f"{path}: record {number} needs an _id and a text, has {line}")
        if name in documents:
            raise ValueError(f"{path}: record {number} has the _id {name} of another")
        documents[name] = f"{title}\n{text}".strip()
    return documents


def read_questions(path: str, documents: Mapping[str, str]) -> list[Question]:
    """Return the questions.

    Raises ValueError, naming file and record, for one that is not as the module says, an id twice,
    and documents that are not there.
    """
    questions: dict[str, Question] = {}
    for number, line in enumerate(_lines(path, "questions"), 1):
        try:
            question = _question(line)
            named = [place.document for place in question.relevant]
            for name in (*named, *([question.document] if question.document else [])):
                if name not in documents:
                    raise ValueError(f"document {name!r} is not in job.documents")
            if question.id in questions:
                raise ValueError(f"id {question.id!r} is that of another")
        except ValueError as error:
            raise ValueError(f"{path}: record {number}: {error}") from error
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} has no question")
    return list(questions.values())


def _question(line: Mapping[str, Any]) -> Question:
    unknown = sorted(line.keys() - _KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]} is unknown; allowed are {', '.join(sorted(_KEYS))}")
    name, asked = line.get("id"), line.get("question")
    if not isinstance(name, str) or not name:
        raise ValueError(f"id must be a text, is {name!r}")
    if ("messages" in line) == ("question" in line):
        raise ValueError("give either question or messages")
    messages = line.get("messages", [{"role": "user", "content": asked}])
    spoken = turns(messages)
    if spoken[-1][0] != "user":
        raise ValueError("messages must end with a turn of the user")
    roles = {"user": "user", "agent": "assistant"}
    answerable = line.get("answerable", True)
    for key in ("answers", "contexts"):
        texts = line.get(key, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} must be a list of texts, is {texts!r}")
    if not isinstance(line.get("relevant", []), list):
        raise ValueError(f"relevant must be a list, is {line['relevant']!r}")
    if not isinstance(answerable, bool):
        raise ValueError(f"answerable must be true or false, is {answerable!r}")
    for key in ("instruction", "document"):
        if not isinstance(line.get(key), str | None):
            raise ValueError(f"{key} must be a text, is {line[key]!r}")
    places = [_place(value) for value in line.get("relevant", [])]
    only = {place.document for place in places}
    return Question(
        name,
        [{"role": roles[speaker], "content": text} for speaker, text in spoken],
        line.get("answers", []),
        answerable,
        line.get("instruction"),
        places,
        line.get("document") or (only.pop() if len(only) == 1 else None),
        line.get("contexts", []),
    )


def _place(value: Any) -> Place:
    if isinstance(value, str):
        return Place(value)
    if isinstance(value, Mapping) and value.keys() == {"document", "start", "end"}:
        place = Place(**value)
        whole = isinstance(place.start, int) and isinstance(place.end, int)
        if whole and 0 <= place.start < (place.end or 0):
            return place
    raise ValueError(
        f"relevant has {value!r}; it must be a document's id, or document, start and end"
    )


def _lines(path: str, key: str) -> list[dict[str, Any]]:
    try:
        return list(read_lines(path))
    except OSError as error:
        raise ValueError(f"job.{key}={path} cannot be read ({error.strerror})") from error


class Chunks(RetrievalSet):
    """Chunks as candidates, and questions as queries; nothing is judged in it.

    chunks: id -> chunk. dialogue: the form of queries, with earlier turns; None: the latest
    question alone.
    """

    def __init__(
        self, chunks: Mapping[str, Chunk], questions: Sequence[Question], dialogue: Dialogue | None
    ) -> None:
        self.chunks = chunks
        self._documents = {name: Item(one.text, None, "text") for name, one in chunks.items()}
        self._questions = {
            one.id: Item(dialogue.render(one.messages) if dialogue else one.text, None, "text")
            for one in questions
        }

    @property
    def documents(self) -> Mapping[str, Item]:
        """The chunks."""
        return self._documents

    @property
    def questions(self) -> Mapping[str, Item]:
        """The questions as the retriever reads them."""
        return self._questions

    @property
    def judgements(self) -> dict[str, dict[str, int]]:
        """None: recall is measured on the rankings, so that they do not depend on it."""
        return {}

    @property
    def modalities(self) -> Mapping[str, str]:
        """All are text."""
        return dict.fromkeys(self._documents, "text")

    @property
    def asked(self) -> list[str]:
        """All questions."""
        return list(self._questions)


_KEYS = {
    *("id", "question", "messages", "answers", "answerable", "instruction", "relevant"),
    *("document", "contexts"),
}
