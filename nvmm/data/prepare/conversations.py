"""Conversations and questions over documents, in their public layouts, become records for shards.

A record is {"messages", "contexts", "answers", "answerable"}: turns of which the last is the
assistant's answer; the texts to answer from, best first; all accepted answers; false where the
contexts do not answer. Instructions, the system line and the words of a refusal are of the template
and stand in no record.

    chatqa      ChatQA-Training-Data, ChatQA2-Long-SFT-data: {document, messages, answers}
    chatrag     ChatRAG-Bench: {messages, ctxs, ground_truth_ctx, document, answers or answer}
    squad       SQuAD 1.1 and 2.0: {data: [{paragraphs: [{context, qas}]}]}
    tatqa       TAT-QA: {table: {table}, paragraphs, questions}
    plain       {messages} or {conversations}, as chats without documents are
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from nvmm.config.choices import require
from nvmm.data.prepare.records import LeftOut
from nvmm.data.samples.forms import ROLES
from nvmm.data.samples.tables import read_table

Record = dict[str, Any]
Context = str | Mapping[str, Any]
"""A text, or a table {"header", "rows"}, which the template writes in its own form."""
Part = Literal["arithmetic", "others"]
Skip = LeftOut | None
"""Leaves a bad record out, and is told which and why; None: it is an error."""
Item = TypeVar("Item")
PASSAGE = "title: {title}, source: {text}"
"""How ChatRAG-Bench's own scripts write a retrieved passage."""
_SPOKEN = ("system", "user", "assistant")


def record(
    messages: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    contexts: Sequence[Context] = (),
    *,
    answerable: bool = True,
) -> Record:
    """Return the record of turns that end with a question, its answers and its contexts.

    The first answer is trained. One that is not answerable has no answers: its last turn is empty,
    and the template's refusal takes its place.

    Raises ValueError for turns that do not end with the user's, and for a question without answers.
    """
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("messages must end with a turn of the user")
    accepted = list(dict.fromkeys(answers)) if answerable else []
    if answerable and not (accepted and all(_is_text(answer) for answer in accepted)):
        raise ValueError(f"answers must be texts that are not empty, got {list(answers)!r}")
    if not all(_is_text(context) or isinstance(context, Mapping) for context in contexts):
        raise ValueError(f"a context must be a text that is not empty, got {list(contexts)!r}")
    for context in contexts:
        if isinstance(context, Mapping):
            read_table(context)
    answer = accepted[0] if answerable else ""
    made: Record = {"messages": [*turns, {"role": "assistant", "content": answer}]}
    if contexts:
        made["contexts"] = list(contexts)
    if len(accepted) > 1:
        made["answers"] = accepted
    if not answerable:
        made["answerable"] = False
    return made


def chatqa_record(item: Mapping[str, Any]) -> Record:
    """Return the record of one item of ChatQA's training data; ValueError for a bad one."""
    document = item.get("document")
    if not isinstance(document, str | None):
        raise ValueError(f"document must be a text, got {document!r}")
    contexts = [document] if document and document.strip() else []
    return record(_listed(item.get("messages")), _listed(item.get("answers")), contexts)


def chatqa(items: Iterable[Mapping[str, Any]], skip: Skip = None) -> Iterator[Record]:
    """Yield the records of ChatQA's training data; an empty document is no context."""

    def make(item: Mapping[str, Any]) -> list[Record]:
        return [chatqa_record(item)]

    return _each(enumerate(items, 1), make, skip)


def chatrag(
    items: Iterable[Mapping[str, Any]],
    num_contexts: int,
    *,
    gold: bool = False,
    passage: str = PASSAGE,
    skip: Skip = None,
) -> Iterator[Record]:
    """Yield the records of ChatRAG-Bench.

    A question's contexts are the first `num_contexts` of `ctxs`; where it has none, `document`.
    ConvFinQA's `exe_answer`, the value of its formula, is an accepted answer too.

    gold: `ground_truth_ctx` instead, the passages that are known to answer.
    passage: the words of a passage with `{title}` and `{text}`; the text alone where it has no
        title.
    """
    if num_contexts < 1:
        raise ValueError(f"num_contexts={num_contexts} must be at least 1")
    check_passage(passage)

    def make(item: Mapping[str, Any]) -> list[Record]:
        key = "ground_truth_ctx" if gold else "ctxs"
        contexts = [_passage(ctx, passage) for ctx in _listed(item.get(key))]
        contexts = contexts if gold else contexts[:num_contexts]
        if not contexts and not gold and _is_text(item.get("document")):
            contexts = [item["document"]]
        if not contexts:
            raise ValueError(f"has no {key}{'' if gold else ' and no document'}")
        answers = [*_listed(_first(item, "answers", "answer")), *_listed(item.get("exe_answer"))]
        return [record(_listed(item.get("messages")), _written(answers), contexts)]

    return _each(enumerate(items, 1), make, skip)


def check_passage(form: str) -> None:
    """Raise ValueError for words of a passage that are not around {title} and {text}."""
    try:
        written = form.format(title="\0", text="\1")
    except (LookupError, ValueError):
        written = ""
    if not {"\0", "\1"} <= set(written):
        raise ValueError(f"passage={form!r} must have {{title}} and {{text}}, and no other")


def _passage(ctx: Any, form: str) -> str:
    """Return a retrieved passage as a text."""
    if isinstance(ctx, str):
        return ctx
    text = ctx.get("text", ctx.get("ctx")) if isinstance(ctx, Mapping) else None
    if not _is_text(text):
        raise ValueError(f"a passage needs a text or ctx, got {ctx!r}")
    title = ctx.get("title")
    return form.format(title=title, text=text) if title else str(text)


def squad(path: str | Path, skip: Skip = None) -> Iterator[Record]:
    """Yield the records of a SQuAD file, 1.1 or 2.0; its impossible questions are unanswerable.

    Raises ValueError naming the file where it is none, and the question's id.
    """
    try:
        articles = json.loads(Path(path).read_bytes().decode("utf-8-sig"))["data"]
        asked = [
            (question.get("id"), (question, paragraph["context"]))
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no SQuAD file: {error!r}") from error

    def make(pair: tuple[Mapping[str, Any], str]) -> list[Record]:
        question, context = pair
        turns = [{"role": "user", "content": question.get("question")}]
        given = question.get("answers") or []
        if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
            raise ValueError(f"answers must be a list of objects with a text, got {given!r}")
        answers = [one.get("text") for one in given]
        possible = not question.get("is_impossible", False)
        return [record(turns, answers, [context], answerable=possible)]

    return _each(asked, make, skip)


def tatqa(items: Iterable[Mapping[str, Any]], part: Part, skip: Skip = None) -> Iterator[Record]:
    """Yield the records of TAT-QA: the table and then the paragraphs are the contexts.

    part: "arithmetic" has the questions that are calculated, whose answer is the formula
        (`derivation`; that ChatQA trains it is unverified); "others" all others, whose answer is
        the span, or the spans with commas between.
    """
    require("part", part, Part)

    def make(item: Mapping[str, Any]) -> list[Record]:
        try:
            header, *rows = item["table"]["table"]
            paragraphs = sorted(item["paragraphs"], key=lambda paragraph: paragraph["order"])
            contexts: list[Context] = [{"header": header, "rows": rows}]
            contexts += [paragraph["text"] for paragraph in paragraphs]
            listed = list(item["questions"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"is none of TAT-QA: {error!r}") from error
        made = []
        for question in listed:
            if not isinstance(question, Mapping):
                raise ValueError(f"a question must be an object, got {question!r}")
            is_calculated = question.get("answer_type") == "arithmetic"
            if is_calculated == (part == "arithmetic"):
                answer = question.get("derivation" if is_calculated else "answer")
                turns = [{"role": "user", "content": question.get("question")}]
                made.append(record(turns, [", ".join(_written(_listed(answer)))], contexts))
        return made

    return _each(enumerate(items, 1), make, skip)


def plain(
    items: Iterable[Mapping[str, Any]], left_out: LeftOut, skip: Skip = None
) -> Iterator[Record]:
    """Yield chats up to their last answer.

    An item is {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}.
    left_out: is told of turns at the end that nobody answers.
    """

    def make(item: Mapping[str, Any]) -> list[Record]:
        given = _listed(_first(item, "messages", "conversations"))
        turns = [_turn(message, place) for place, message in enumerate(given, 1)]
        kept = len(turns)
        while kept and turns[kept - 1]["role"] != "assistant":
            kept -= 1
        if kept < 2:
            raise ValueError("has no answer of the assistant")
        if kept < len(turns):
            left_out(f"the {len(turns) - kept} turns behind {turns[kept - 1]['content'][:40]!r}")
        return [{"messages": turns[:kept]}]

    return _each(enumerate(items, 1), make, skip)


def _each(
    items: Iterable[tuple[Any, Item]], make: Callable[[Item], list[Record]], skip: Skip
) -> Iterator[Record]:
    """Yield the records of named items; errors have the name, and go to `skip` if there is one."""
    for name, item in items:
        try:
            made = make(item)
        except ValueError as error:
            if skip is None:
                raise ValueError(f"record {name}: {error}") from error
            skip(f"record {name}: {error}")
        else:
            yield from made


def _turn(message: Any, number: int) -> dict[str, str]:
    """Return a turn in the roles and keys of a record."""
    if not isinstance(message, Mapping):
        raise ValueError(f"turn {number} must be an object, got {message!r}")
    name, text = message.get("role", message.get("from")), message.get("content")
    text = message.get("value") if text is None else text
    role = ROLES.get(name) if isinstance(name, str) else None
    if role not in _SPOKEN:
        known = ", ".join(key for key, value in ROLES.items() if value in _SPOKEN)
        raise ValueError(f"turn {number}: role {name!r} must be one of {known}")
    if not _is_text(text):
        raise ValueError(f"turn {number} must have a text, got {text!r}")
    return {"role": role, "content": str(text)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _written(answers: Sequence[Any]) -> list[str]:
    """Return answers, some of which are numbers, as texts."""
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"an answer must be a text or a number, got {answer!r}")
    return [str(answer) for answer in answers]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _first(item: Mapping[str, Any], *keys: str) -> Any:
    """Return the first value that is there; tables leave the others null."""
    return next((item[key] for key in keys if item.get(key) is not None), None)
