"""Functions of Python's library as short documents, and questions whose answers stand in them.

The source is the folder `_sources` of Debian's package python3.11-doc (PSF licence). An entry is a
function, method or class with the first words of its description:

    shutil.move(src, dst, copy_function=copy2)
    Recursively move a file or directory (src) to another location (dst) ...

A question is `How do I call shutil.move?`, and its answer the first line: exact, and to be copied.
Whole modules are held out. Passages beside the gold one are entries of the same module, and of
others. A question is made unanswerable by leaving its entry out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.data.prepare.python_faq import digest, faq_sections, first_sentence, plain

_DIRECTIVE = re.compile(
    r"( *)\.\. (?:(module|currentmodule)|(function|method|classmethod|staticmethod|class|exception)"
    r"):: *(.*?) *$"
)
_CALL = re.compile(r"([A-Za-z_][\w.]*)\(([^()\[\]\\]+)\)")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]+?)\s*(?:<[^`>]+>)?`")
_WORD = re.compile(r"(?!(?:None|True|False)\b)[A-Za-z]{2,}")
_TERM = re.compile(r"(?m)^   (\S[^\n]*)\n((?:      [^\n]*\n|\n)+)")
LONGEST_CALL = 60
"""Characters of the longest call that is asked for."""
WORDS = 16
"""Words of an entry's description."""
PIECE = 1200
"""Characters of a piece of text, after which it ends at the next blank line."""
_CHAPTERS = ("faq", "howto", "library", "reference", "tutorial")


@dataclass(frozen=True)
class Entry:
    """A callable: its name with its module, its call, and the first words of its description."""

    name: str
    module: str
    call: str
    description: str

    @property
    def question(self) -> str:
        """Return how it is asked for; the call is the answer."""
        return f"How do I call {self.name}?"

    @property
    def text(self) -> str:
        """Return it as a document."""
        return f"{self.call}\n{' '.join(self.description.split()[:WORDS])}"


def entries(folder: Path) -> list[Entry]:
    """Return the callables of `folder/library` with a plain call, one of a name, in their order.

    A plain call has parameters, and neither brackets nor a line break; one without a description
    is left out. Raises ValueError where there are none.
    """
    found: dict[str, Entry] = {}
    for path in sorted((folder / "library").glob("*.rst.txt")):
        for entry in _entries(path.read_text(encoding="utf-8")):
            found.setdefault(entry.name, entry)
    if not found:
        raise ValueError(f"{folder}/library has no callable: is it _sources of python3.11-doc?")
    return list(found.values())


def _entries(text: str) -> Iterator[Entry]:
    module = ""
    owners: list[tuple[int, str]] = []  # indentations and names of the classes around a line
    lines = text.splitlines()
    for number, line in enumerate(lines):
        directive = _DIRECTIVE.fullmatch(line)
        if directive is None:
            continue
        indent, named, kind, rest = directive.groups()
        if named:
            module, owners = rest, []
            continue
        owners = [owner for owner in owners if owner[0] < len(indent)]
        name = rest.partition("(")[0]
        owner = owners[-1][1] if owners else ""
        full = name if not owner or name.startswith(f"{owner}.") else f"{owner}.{name}"
        if kind in ("class", "exception"):
            owners.append((len(indent), full))
        call = _CALL.fullmatch(rest)
        if not module or call is None:
            continue
        full = full if full.startswith(f"{module}.") else f"{module}.{full}"
        written = f"{full}({' '.join(call[2].split())})"
        description = _description(lines[number + 1 :], len(indent))
        if description and len(written) <= LONGEST_CALL:
            yield Entry(full, module, written, description)


def _description(lines: Sequence[str], indent: int) -> str:
    """Return the first paragraph that is indented below a directive, without markup."""
    paragraph: list[str] = []
    for line in lines:
        if not line.strip():
            if paragraph:
                break
            continue
        if len(line) - len(line.lstrip()) <= indent:
            break
        paragraph.append(line.strip())
    if not paragraph or paragraph[0].startswith((".. ", ":")):
        return ""
    return " ".join(re.sub(r"\*(\S+?)\*", r"\1", _plain(" ".join(paragraph))).split())


def split(found: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Divide whole modules, in the order of a hash: (training, at least `share` held out)."""
    names = sorted({entry.module for entry in found}, key=digest)
    held_out: set[str] = set()
    for name in names:
        if sum(entry.module in held_out for entry in found) >= share * len(found):
            break
        held_out.add(name)
    training = [entry for entry in found if entry.module not in held_out]
    return training, [entry for entry in found if entry.module in held_out]


def renamed(found: Sequence[Entry], times: int, seed: int) -> list[Entry]:
    """Return the entries `times` over, with the words of all calls interchanged at random.

    So `shutil.move(src, dst)` may become `locale.fetch(flags, path)`: a call that no memory has,
    and that can only be copied. One interchange holds for all entries, so that modules stay
    modules and names stay different. Descriptions are as they were.
    """
    words = sorted({word for entry in found for word in _WORD.findall(entry.call)})
    made = []
    for number in range(times):
        others = random.Random(f"{seed}/renamed/{number}").sample(words, len(words))
        other = dict(zip(words, others, strict=True))

        def change(text: str, other: dict[str, str] = other) -> str:
            return _WORD.sub(lambda match: other[match[0]], text)

        made += [
            Entry(change(one.name), change(one.module), change(one.call), one.description)
            for one in found
        ]
    return made


def pages(folder: Path, without: Collection[str]) -> Iterator[str]:
    """Yield the text of the documentation's pages, but for the pages of some modules.

    without: modules; of `library`, the page of a module has its name.
    """
    for chapter in _CHAPTERS:
        for path in sorted((folder / chapter).glob("*.rst.txt")):
            if chapter != "library" or path.name.removesuffix(".rst.txt") not in without:
                yield _plain(path.read_text(encoding="utf-8"))


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of whole paragraphs."""
    pending = ""
    for paragraph in text.split("\n\n"):
        pending = f"{pending}\n\n{paragraph}" if pending else paragraph
        if len(pending) >= PIECE:
            yield pending
            pending = ""
    if pending.strip():
        yield pending


def chats(found: Sequence[Entry], folder: Path) -> list[dict[str, Any]]:
    """Return questions without contexts: of callables, of the glossary, and of the FAQ."""
    glossary = (folder / "glossary.rst.txt").read_text(encoding="utf-8")
    asked = [(f"What does {one.name} do?", one.description) for one in found]
    asked += [(f"What is {term}?", _plain(text)) for term, text in _TERM.findall(glossary)]
    asked += [(section.question, section.answer) for section in faq_sections(folder)]
    said = [(question, first_sentence(text)) for question, text in asked]
    return [
        {
            "messages": [
                _turn("user", question),
                _turn("assistant", " ".join(answer.split()[:WORDS])),
            ]
        }
        for question, answer in said
        if answer.strip()
    ]


def questions(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return ChatQA's training data: each entry as the document of its own question."""
    return [
        {"document": one.text, "messages": [_turn("user", one.question)], "answers": [one.call]}
        for one in found
    ]


def ranked(found: Sequence[Entry], others: int, seed: int) -> list[dict[str, Any]]:
    """Return questions in DPR's layout: the gold entry, and `others` that do not answer."""
    return [
        {
            "question": one.question,
            "answers": [one.call],
            "positive_ctxs": [{"text": one.text}],
            "hard_negative_ctxs": [{"text": other.text} for other in some],
        }
        for one, some in _with_others(found, others, f"{seed}/ranked")
    ]


def unanswerable(found: Sequence[Entry], contexts: int, seed: int) -> list[dict[str, Any]]:
    """Return records of conversations whose contexts lack the entry that is asked for."""
    return [
        {
            "messages": [_turn("user", one.question), _turn("assistant", "")],
            "contexts": [other.text for other in some],
            "answerable": False,
        }
        for one, some in _with_others(found, contexts, f"{seed}/unanswerable")
    ]


def planted(
    found: Sequence[Entry], texts: Sequence[str], characters: tuple[int, int], seed: int
) -> list[dict[str, Any]]:
    """Return conversations whose question follows a text with the entry planted on a line of it.

    characters: the shortest and the longest text.
    """
    rng = random.Random(f"{seed}/planted")
    made = []
    for one in found:
        size = rng.randint(*characters)
        start = rng.randrange(len(texts))
        text = ""
        for number in range(len(texts)):
            if len(text) >= size:
                break
            text += texts[(start + number) % len(texts)] + "\n"
        lines = text[:size].split("\n")
        lines.insert(rng.randint(0, len(lines)), one.text)
        asked = f"{chr(10).join(lines)}\n\n{one.question}"
        made.append({"messages": [_turn("user", asked), _turn("assistant", one.call)]})
    return made


def evaluation(
    held_out: Sequence[Entry], size: int, asked: int, without: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the documents and questions of a RAG run.

    size: entries, drawn of the held-out ones. asked: questions, the last `without` of which are
    not answerable: their entries are no documents.
    """
    if not without <= asked <= len(held_out):
        raise ValueError(f"asked={asked}, without={without}: held out are {len(held_out)} entries")
    drawn = random.Random(f"{seed}/evaluation").sample(held_out, min(size, len(held_out)))
    wanted = drawn[:asked]
    missing = wanted[asked - without :]
    made = []
    for number, (one, [other]) in enumerate(_with_others(wanted, 1, f"{seed}/gold")):
        answerable = one not in missing
        # What the way "gold" shows of one without an answer: another entry.
        rest = {"relevant": [one.name]} if answerable else {"contexts": [other.text]}
        answers = [one.call] if answerable else []
        made.append(
            {"id": f"q{number:03d}", "question": one.question, "answers": answers}
            | {"answerable": answerable, **rest}
        )
    documents = [{"_id": one.name, "text": one.text} for one in drawn if one not in missing]
    return documents, made


def _with_others(
    found: Sequence[Entry], count: int, seed: str
) -> Iterator[tuple[Entry, list[Entry]]]:
    """Yield each entry with others: half of its own module if it has so many, the rest of any.

    Raises ValueError where there are not so many others.
    """
    if len(found) <= count:
        raise ValueError(f"{len(found)} entries: each needs {count} others")
    rng = random.Random(seed)
    modules: dict[str, list[Entry]] = {}
    for entry in found:
        modules.setdefault(entry.module, []).append(entry)
    for entry in found:
        near = [other for other in modules[entry.module] if other is not entry]
        chosen = rng.sample(near, min(len(near), (count + 1) // 2))
        while len(chosen) < count:
            other = rng.choice(found)
            if other is not entry and other not in chosen:
                chosen.append(other)
        rng.shuffle(chosen)
        yield entry, chosen


def _plain(text: str) -> str:
    """Return text without markup, roles with a link's text (`:func:`text <target>``) included."""
    return plain(_ROLE.sub(r"\1", text))


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
