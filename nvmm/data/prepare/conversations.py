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
from typing import Any, Literal

from nvmm.config.choices import require
from nvmm.data.samples.forms import ROLES

Record = dict[str, Any]
Context = str | Mapping[str, Any]
"""A text, or a table {"header", "rows"}, which the template writes in its own form."""
Part = Literal["arithmetic", "others"]
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
    answer = accepted[0] if answerable else ""
    made: Record = {"messages": [*turns, {"role": "assistant", "content": answer}]}
    if contexts:
        made["contexts"] = list(contexts)
    if len(accepted) > 1:
        made["answers"] = accepted
    if not answerable:
        made["answerable"] = False
    return made


def chatqa(items: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Yield the records of ChatQA's training data; an empty document is no context."""
    for number, item in enumerate(items, 1):
        with_document = _is_text(item.get("document"))
        contexts = [item["document"]] if with_document else []
        yield _made(number, item.get("messages"), item.get("answers"), contexts)


def chatrag(
    items: Iterable[Mapping[str, Any]],
    num_contexts: int,
    *,
    gold: bool = False,
    passage: str = PASSAGE,
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
    for number, item in enumerate(items, 1):
        given = item.get("ground_truth_ctx") if gold else (item.get("ctxs") or [])[:num_contexts]
        if gold and not given:
            raise ValueError(f"record {number} has no ground_truth_ctx")
        listed = given if isinstance(given, list) else [given]
        contexts = [_passage(ctx, passage, number) for ctx in listed]
        if not contexts and _is_text(item.get("document")):
            contexts = [item["document"]]
        answers = item["answers"] if item.get("answers") is not None else item.get("answer")
        answers = list(answers) if isinstance(answers, list) else [answers]
        answers += [item["exe_answer"]] if item.get("exe_answer") is not None else []
        texts = [answer if isinstance(answer, str) else str(answer) for answer in answers]
        yield _made(number, item.get("messages"), texts, contexts)


def _passage(ctx: Any, form: str, number: int) -> str:
    """Return a retrieved passage as a text."""
    if isinstance(ctx, str):
        return ctx
    text = None
    if isinstance(ctx, Mapping):
        text = ctx.get("text", ctx.get("ctx"))
    if not _is_text(text):
        raise ValueError(f"record {number}: a passage needs a text or ctx, got {ctx!r}")
    title = ctx.get("title")
    return form.format(title=title, text=text) if title else str(text)


def squad(path: str | Path) -> Iterator[Record]:
    """Yield the records of a SQuAD file, 1.1 or 2.0; its impossible questions are unanswerable.

    Raises ValueError naming the file, and the question's id.
    """
    try:
        articles = json.loads(Path(path).read_bytes().decode("utf-8-sig"))["data"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no SQuAD file: no JSON with a list data ({error})") from error
    for article in articles:
        for paragraph in article.get("paragraphs") or []:
            for question in paragraph.get("qas") or []:
                asked = [{"role": "user", "content": question.get("question")}]
                possible = not question.get("is_impossible", False)
                answers = [answer.get("text") for answer in question.get("answers") or []]
                try:
                    yield record(asked, answers, [paragraph.get("context")], answerable=possible)
                except ValueError as error:
                    raise ValueError(f"{path}: question {question.get('id')}: {error}") from error


def tatqa(items: Iterable[Mapping[str, Any]], part: Part) -> Iterator[Record]:
    """Yield the records of TAT-QA: the table and then the paragraphs are the contexts.

    part: "arithmetic" has the questions that are calculated, whose answer is the formula
        (`derivation`; that ChatQA trains it is unverified); "others" all others, whose answer is
        the span, or the spans with commas between.
    """
    require("part", part, Part)
    for number, item in enumerate(items, 1):
        try:
            header, *rows = item["table"]["table"]
            paragraphs = sorted(item["paragraphs"], key=lambda paragraph: paragraph["order"])
            texts = [paragraph["text"] for paragraph in paragraphs]
            listed = list(item["questions"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"record {number} is none of TAT-QA: {error!r}") from error
        contexts: list[Context] = [{"header": header, "rows": rows}, *texts]
        for question in listed:
            is_calculated = question.get("answer_type") == "arithmetic"
            if is_calculated != (part == "arithmetic"):
                continue
            answer = question.get("derivation" if is_calculated else "answer")
            answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
            asked = [{"role": "user", "content": question.get("question")}]
            yield _made(number, asked, [answer], contexts)


def plain(items: Iterable[Mapping[str, Any]], left_out: Callable[[str], None]) -> Iterator[Record]:
    """Yield chats up to their last answer.

    An item is {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}.
    left_out: is told of turns at the end that nobody answers.
    """
    for number, item in enumerate(items, 1):
        given = item["messages"] if item.get("messages") is not None else item.get("conversations")
        try:
            turns = [_turn(message, place) for place, message in enumerate(given or [], 1)]
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        while turns and turns[-1]["role"] != "assistant":
            left_out(f"record {number}: turn {len(turns)} of the {turns.pop()['role']}, at the end")
        if len(turns) < 2:
            raise ValueError(f"record {number} has no answer of the assistant")
        yield {"messages": turns}


def _made(number: int, messages: Any, answers: Any, contexts: Sequence[Context]) -> Record:
    """Return a record whose errors name the number of the item that it is made of."""
    listed = answers if isinstance(answers, list) else [] if answers is None else [answers]
    try:
        return record(messages or [], listed, contexts)
    except ValueError as error:
        raise ValueError(f"record {number}: {error}") from error


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
