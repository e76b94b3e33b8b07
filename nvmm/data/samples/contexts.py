"""Forms of answers that rest on contexts: ChatQA's conversations and RankRAG's rankings.

Their default texts are the published ones (arXiv 2401.10225 and 2407.02485). A `{question}` in one
of them stands for the latest question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from nvmm.data.samples.chat import Turn
from nvmm.data.samples.forms import Chat, Example, check_beside, turns_of
from nvmm.data.samples.images import ImageOrSize
from nvmm.data.samples.passages import Contexts, Passages
from nvmm.data.samples.record import Record
from nvmm.data.samples.tables import read_table

SORRY = "Sorry. I cannot find the answer based on the context."
RANK = (
    "For the question {question}, access whether the passage is relevant to the question. Return"
    " True if relevant, otherwise False."
)
"""The ranking prompt, "access" and all."""
RANK_ALL = (
    "For the question {question}, access whether the above passages are relevant to the question."
    " Return all the relevant passage id."
)
_QUESTION = "{question}"
_CONTEXTS = (
    *("context", "ctxs", "passage", "passages", "document", "documents"),
    *("paragraph", "paragraphs", "chunks", "evidence"),
)
"""Keys that are contexts in the data sets of the field: an answer is not trained without them."""


@dataclass(frozen=True)
class ContextChat:
    """A conversation, or `question` with `answers`, whose last answer rests on `contexts`.

    `contexts` is a list of texts or tables (`nvmm.data.samples.tables`), best first, and may be
    missing. `answers` lists every right answer. `answerable` false says that the contexts do not
    hold the answer, which may then be missing or empty.

    instruction: stands in front of the first user's turn, with a space between, in samples that
        have no `instruction` of their own.
    question: form of the latest question.
    unanswerable: the answer where `answerable` is false.
    passages: form of the contexts.
    """

    instruction: str | None = None
    question: str = _QUESTION
    unanswerable: str = SORRY
    passages: Passages = field(default_factory=Passages)
    names: ClassVar[tuple[str, ...]] = (
        *Chat.names,
        "contexts",
        "instruction",
        "answerable",
    )

    def __post_init__(self) -> None:
        _check("question", self.question)
        if not self.unanswerable.strip():
            raise ValueError("form.unanswerable must be a text that is not empty")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        answerable = record.get("answerable")
        if answerable is not None and not isinstance(answerable, bool):
            raise record.bad(f"answerable must be true or false, got {answerable!r}")
        example = self._conversation(record, images, answerable is not False)
        latest = _latest(example.turns, record)
        turns = list(example.turns)
        turns[latest] = _asked(turns[latest], self.question)
        instruction = self.instruction
        if record.get("instruction") is not None:
            instruction = record.text("instruction")
        if instruction is not None:
            first = next(i for i, turn in enumerate(turns) if turn.role == "user")
            turns[first] = replace(turns[first], text=f"{instruction} {turns[first].text}")
        return replace(example, turns=turns, contexts=self._contexts(record), whole=True)

    def _conversation(
        self, record: Record, images: Sequence[ImageOrSize], answerable: bool
    ) -> Example:
        """Return the turns and the accepted answers of a record."""
        name = next((n for n in ("conversations", "messages") if record.get(n) is not None), None)
        if name is None:
            example = Chat()(record, images)
            if answerable:
                return example
            turns = [turn for turn in example.turns if turn.role != "assistant"]
        else:
            check_beside(record)
            if record.get("question") is not None:
                raise record.bad(f"it has {name} and question; leave one out by build.unread")
            messages = record.get(name)
            if not answerable:
                messages = _without_answer(messages)
            turns = turns_of(record, messages)
            if answerable:
                last = [turns[-1].text] if turns[-1].role == "assistant" else []
                return Example(turns, images, _texts(record, "answers") or last)
        answer = Turn("assistant", self.unanswerable)
        return Example([*turns, answer], images, [self.unanswerable])

    def _contexts(self, record: Record) -> Contexts | None:
        """Return the block of contexts, None of a record without any."""
        lost = record.lost(_CONTEXTS)
        if lost:
            raise record.bad(
                f"{', '.join(lost)} is not read: contexts are a list under contexts; name another"
                f" key by build.fields.contexts={lost[0]}, or leave it out by"
                f" build.unread=[{','.join(lost)}]"
            )
        values = record.get("contexts")
        if values is None or values == []:
            return None
        if not isinstance(values, list):
            raise record.bad(f"contexts must be a list, got {values!r}")
        texts = [_context(record, value) for value in values]
        order = self.passages.order(len(texts), record.key)
        return self.passages.block([texts[number] for number in order])


@dataclass(frozen=True)
class Ranking:
    """`question`, and `passages` with one passage, which is `relevant` ([0]) or not ([]).

    `messages` are turns before the question, where it is a dialogue's.

    prompt: the user's turn. relevant, irrelevant: the two answers. passages: form of the passage.
    """

    prompt: str = RANK
    relevant: str = "True"
    irrelevant: str = "False"
    passages: Passages = field(default_factory=lambda: Passages(one="Passage: {text}"))
    names: ClassVar[tuple[str, ...]] = ("question", "passages", "relevant", "messages")

    def __post_init__(self) -> None:
        _check("prompt", self.prompt)
        if self.relevant == self.irrelevant:
            raise ValueError(f"form.relevant and form.irrelevant are both {self.relevant!r}")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        texts = _passages(record)
        if len(texts) != 1:
            raise record.bad(f"{len(texts)} passages; each is ranked in a sample of its own")
        relevant = _relevant(record, 1)
        answers = [] if relevant is None else [self.relevant if relevant else self.irrelevant]
        turns = _ranked(record, self.prompt, answers)
        return Example(turns, images, answers, self.passages.block(texts), whole=True)


def _labelled() -> Passages:
    label = "Passage {number}: {text}"
    return Passages(one=label, several=label, shuffle=True)


@dataclass(frozen=True)
class ListRanking:
    """`question`, `passages`, and the numbers of those that are `relevant`, from 0 on.

    The answer has the places of the relevant passages as they are written, in ascending order. None
    of the passages is ever cut: the answer says something of each. `messages`: see `Ranking`.

    prompt: the user's turn. item: form of one place, {number}. separator: between two of them.
    none: the answer where no passage is relevant. The paper does not give these three.
    passages: form of the passages.
    """

    prompt: str = RANK_ALL
    item: str = "{number}"
    separator: str = ", "
    none: str = "None"
    passages: Passages = field(default_factory=_labelled)
    names: ClassVar[tuple[str, ...]] = Ranking.names

    def __post_init__(self) -> None:
        _check("prompt", self.prompt)
        if self.item.count("{number}") != 1:
            raise ValueError(f"form.item={self.item!r} must have {{number}} once")
        if not self.none.strip():
            raise ValueError("form.none must be a text that is not empty")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        texts = _passages(record)
        relevant = _relevant(record, len(texts))
        order = self.passages.order(len(texts), record.key)
        answers = []
        if relevant is not None:
            places = [place for place, number in enumerate(order, 1) if number in relevant]
            items = [self.item.replace("{number}", str(place)) for place in places]
            answers = [self.separator.join(items) or self.none]
        block = self.passages.block([texts[number] for number in order], may_cut=False)
        turns = _ranked(record, self.prompt, answers)
        return Example(turns, images, answers, block, whole=True)


def _check(name: str, text: str) -> None:
    if text.count(_QUESTION) != 1:
        raise ValueError(f"form.{name}={text!r} must have {_QUESTION} once")


def _latest(turns: Sequence[Turn], record: Record) -> int:
    """Return the place of the latest question; BadSample where none or more than its answer
    follows."""
    users = [place for place, turn in enumerate(turns) if turn.role == "user"]
    roles = [turn.role for turn in turns[users[-1] + 1 :]] if users else []
    if not users or roles not in ([], ["assistant"]):
        raise record.bad("the conversation must end with a user's turn, or with one and its answer")
    return users[-1]


def _asked(turn: Turn, form: str) -> Turn:
    return replace(turn, text=form.replace(_QUESTION, turn.text))


def _without_answer(messages: Any) -> Any:
    """Return the messages without the answer at their end, whatever it is."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return messages
    role = messages[-1].get("role", messages[-1].get("from"))
    return messages[:-1] if role in ("assistant", "gpt") else messages


def _context(record: Record, value: Any) -> str:
    """Return a context as text: a text, or a table in its form."""
    if not isinstance(value, Mapping):
        return record.checked_text("context", value)
    try:
        return read_table(value)
    except ValueError as error:
        raise record.bad(f"a context is no table: {error}") from error


def _texts(record: Record, name: str) -> list[str]:
    """Return a list of texts; empty where the record has none."""
    values = record.get(name)
    if values is None:
        return []
    if not isinstance(values, list):
        raise record.bad(f"{name} must be a list, got {values!r}")
    return [record.checked_text(name, value) for value in values]


def _passages(record: Record) -> list[str]:
    return [record.checked_text("passage", value) for value in record.sequence("passages")]


def _relevant(record: Record, size: int) -> set[int] | None:
    """Return the numbers of the relevant passages, None where the record does not say."""
    numbers = record.get("relevant")
    if numbers is None:
        return None
    allowed = range(size)
    if not isinstance(numbers, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n in allowed for n in numbers
    ):
        raise record.bad(f"relevant must list numbers from 0 to {size - 1}, got {numbers!r}")
    return set(numbers)


def _ranked(record: Record, prompt: str, answers: Sequence[str]) -> list[Turn]:
    """Return the turns before the question, the question in its form, and the answer."""
    messages = record.get("messages")
    earlier = turns_of(record, messages) if messages else []
    if earlier and earlier[-1].role == "user":
        raise record.bad("messages are the turns before the question, and end with a user's")
    asked = _asked(Turn("user", record.text("question")), prompt)
    return [*earlier, asked, *(Turn("assistant", answer) for answer in answers)]
