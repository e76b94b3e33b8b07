"""Python's FAQ as documents, and dialogues about it made by rule.

The source is the folder `_sources` of Debian's package python3.11-doc (PSF licence). A document is
a chapter of the FAQ without its questions, or a page of the tutorial, which nobody asks about. A
dialogue is made of each question, and no person spoke it:

    user: {the question before it in the chapter}
    agent: {the first sentence of its answer}
    user: I have a question about {topic}.
    agent: What would you like to know about {topic}?
    user: {the question, with "it" for the topic}

The topic is a word of the question that few questions have. So the last turn alone does not say
what it is about, and the turns before it are of two subjects.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNDERLINE = re.compile(r"(=+|-+|\*+)\s*")
_WORD = re.compile(r"(?<![\w'-])[A-Za-z_][\w-]+[A-Za-z_](?![\w'-])")
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """how what why when where which who does did can could should would will are was the and
        for not has have had with from that this there they them you your its into than then one two
        some any all get use using used make made work works want python module modules between
        other many much way ways good tell know like more most need only out same such about yet
        still but must instead too also being been own over take seem without""",
    )
)
"""Words that are no topic."""
_EVIDENCE_WORDS = 60


@dataclass(frozen=True)
class Section:
    """A question of the FAQ with its answer; page and chapter that it stands in."""

    page: str
    chapter: str
    question: str
    answer: str

    @property
    def document(self) -> str:
        """The id of its chapter."""
        return f"faq/{self.page}/{self.chapter}"


def plain(text: str) -> str:
    """Return reStructuredText without roles, links, directives and marks of literals."""
    text = re.sub(r"(?m)^ *\.\. .*\n?", "", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}", r"\1", text)
    text = re.sub(r":[\w:+-]+:`~?([^`]+)`", r"\1", text)
    text = re.sub(r"`+_{0,2}|\*\*", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def faq_sections(folder: Path) -> list[Section]:
    """Return every question of `folder/faq`, the first of those with equal questions or answers.

    Raises ValueError where there are none.
    """
    sections: list[Section] = []
    for path in sorted((folder / "faq").glob("*.rst.txt")):
        page = path.name.removesuffix(".rst.txt")
        chapter, question, lines = page, "", [""]
        # A heading is a line above an underline; questions have the dashes of the second level.
        content = [*path.read_text(encoding="utf-8").splitlines(), "end", "==="]
        for line, after in zip(content, [*content[1:], ""], strict=True):
            if _UNDERLINE.fullmatch(line) and len(line) > 2:
                continue
            if not (line.strip() and len(after) > 2 and _UNDERLINE.fullmatch(after)):
                lines.append(line)
                continue
            if question and (answer := plain("\n".join(lines))):
                sections.append(Section(page, chapter, question, answer))
            heading = plain(line)
            question, lines = (heading, []) if after[0] == "-" else ("", [])
            chapter = chapter if after[0] == "-" else heading
    unique = {section.answer: section for section in reversed(sections)}
    unique = {section.question: section for section in unique.values()}
    kept = [section for section in sections if unique.get(section.question) is section]
    if not kept:
        raise ValueError(
            f"{folder}/faq has no questions; name the folder _sources of python3.11-doc"
        )
    return kept


def documents(sections: Iterable[Section], folder: Path) -> list[dict[str, str]]:
    """Return the chapters of the sections, and the pages of the tutorial."""
    chapters: dict[str, list[str]] = {}
    for section in sections:
        chapters.setdefault(section.document, []).append(section.answer)
    texts = {name: "\n\n".join(answers) for name, answers in chapters.items()}
    for path in sorted((folder / "tutorial").glob("*.rst.txt")):
        text = plain(path.read_text(encoding="utf-8"))
        texts[f"tutorial/{path.name.removesuffix('.rst.txt')}"] = text
    return [{"_id": name, "text": text} for name, text in texts.items()]


def split(sections: Sequence[Section], share: float) -> tuple[list[Section], list[Section]]:
    """Divide whole chapters, in the order of a hash: (training, at least `share` held out)."""
    names = sorted({section.document for section in sections}, key=digest)
    sizes = Counter(section.document for section in sections)
    held_out: set[str] = set()
    for name in names:
        if sum(sizes[held] for held in held_out) >= share * len(sections):
            break
        held_out.add(name)
    first = [section for section in sections if section.document not in held_out]
    return first, [section for section in sections if section.document in held_out]


def topics(sections: Sequence[Section]) -> dict[str, list[str]]:
    """Return the topics of each question, the rarest first; a word of one question before others'.

    Words of equal count stand in the order of the question.
    """
    words = {section.question: _candidates(section.question) for section in sections}
    counts = Counter(word.lower() for found in words.values() for word in {*found})
    return {
        question: sorted(found, key=lambda word: counts[word.lower()])
        for question, found in words.items()
    }


def dialogues(
    sections: Sequence[Section], of: Sequence[Section], num_topics: int, *, form: str = "dialogue"
) -> Iterator[dict[str, Any]]:
    """Yield dialogues over the questions of `sections`, up to `num_topics` of each.

    of: all questions, among which a topic is rare.
    form: "dialogue" as above; "last_turn", its last question alone; "question", the FAQ's own.
    """
    known = topics(of)
    before: dict[str, Section] = {}
    for number, section in enumerate(sections):
        earlier = before.get(section.document)
        before[section.document] = section
        for place, topic in enumerate(known[section.question][:num_topics] or [""]):
            asked = _without(topic, section.question)
            turns: list[dict[str, str]] = []
            if form == "dialogue" and earlier is not None:
                turns += _turns(earlier.question, first_sentence(earlier.answer), "")
            if form == "dialogue" and topic:
                turns += _turns(
                    f"I have a question about {topic}.",
                    f"What would you like to know about {topic}?",
                    "",
                )
            question = section.question if form == "question" else asked
            evidence = " ".join(section.answer.split()[:_EVIDENCE_WORDS])
            turns += _turns(question, first_sentence(section.answer), evidence)
            name = f"{number:03d}-{place}"
            yield {"_id": name, "document_id": section.document, "messages": turns}


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop, question mark or blank line; 40 words at most."""
    sentence = re.split(r"(?<=[.!?])\s|\n\n", text, maxsplit=1)[0]
    return " ".join(sentence.split()[:40])


def _without(topic: str, question: str) -> str:
    """Return a question with "it" for its topic."""
    return re.sub(rf"(?<![\w'-]){topic}(?![\w'-])", "it", question) if topic else question


def _turns(question: str, answer: str, evidence: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "agent", "content": answer, "evidence": evidence},
    ]


def _candidates(question: str) -> list[str]:
    found = dict.fromkeys(_WORD.findall(question))
    return [word for word in found if word.lower() not in _COMMON]


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
