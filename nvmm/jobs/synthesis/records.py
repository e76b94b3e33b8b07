"""Records of synthetic data: what a pipeline's steps hand on, and what they ask.

A record is a JSON object. Besides its fields it has `id`, `parents` (the ids of the records that it
was made of) and `lineage`: an entry for every answer and decision that it depends on, oldest first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

Record = dict[str, Any]
Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""
OWN = ("id", "parents", "lineage")
"""The fields that the pipeline itself writes."""


@dataclass(frozen=True)
class Request:
    """A question to a generator.

    messages: the conversation, which ends with a user's turn, or with the assistant's answer that a
        reward model scores. template: name of the prompt that made it, None for a conversation.
    schema: the answer must be JSON of this pydantic model; None: any text. sample: number among
        the answers to the same question. attempt: answers before it that were no such JSON.
    """

    generator: str
    messages: tuple[tuple[str, str], ...]
    template: str | None = None
    schema: type[BaseModel] | None = None
    sample: int = 0
    attempt: int = 0

    @property
    def prompt_digest(self) -> str:
        """A digest of the messages."""
        return digest(self.messages)


@dataclass(frozen=True)
class Reply:
    """What a generator said, as the cache keeps it.

    text: the answer, empty where `error` says why there is none. finish: why it ended, where the
    endpoint says so. The tokens are those that the endpoint counted.
    """

    text: str
    error: str | None = None
    finish: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    value: the parsed JSON, where the request has a schema. used: a row for each reply that it took,
    the invalid ones first: its `key` in the cache, the generator, and its tokens.
    """

    request: Request
    reply: Reply
    value: Any
    error: str | None
    used: list[dict[str, Any]]


@dataclass(frozen=True)
class Made:
    """What a step makes of an item: records, and why others were left out, one text each."""

    records: list[Record] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


Making = Generator[list[Request], list[Answer], Made]
"""A step at work on one item: it yields requests, is sent their answers, and returns `Made`."""


class Failed(Exception):  # noqa: N818 - it is an outcome of an item, which its row tells
    """An item has no outcome, as a generator gave no usable answer."""


def good(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers; raise Failed where one has an error."""
    for answer in answers:
        if answer.error is not None:
            raise Failed(answer.error)
    return list(answers)


def digest(value: Any) -> str:
    """Return a digest of a value that JSON can write."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def child(
    step: str,
    parents: Sequence[Mapping[str, Any]],
    fields: Mapping[str, Any],
    number: int = 0,
    **entry: Any,
) -> Record:
    """Return a new record of other records.

    fields: added to those of the first parent, whose own are replaced; None takes one away.
    number: tells children of equal fields apart. entry: what the lineage says of this step; nothing
        is added to it without.
    """
    first = parents[0] if parents else {}
    merged = {name: value for name, value in first.items() if name not in OWN} | dict(fields)
    content = {name: value for name, value in merged.items() if value is not None}
    ids = [parent["id"] for parent in parents]
    history = [one for parent in parents for one in parent["lineage"]]
    lineage = list({canonical(one): one for one in history}.values())
    if entry:
        lineage.append({"step": step, **entry})
    identity = digest([step, ids, content, number])[:16]
    return {"id": identity, "parents": ids, "lineage": lineage, **content}


def source(answer: Answer) -> dict[str, Any]:
    """Return what a lineage says of an answer."""
    request = answer.request
    said = {
        "generator": request.generator,
        "template": request.template,
        "prompt": request.prompt_digest,
        "sample": request.sample,
        "answer": answer.used[-1]["key"],
    }
    return {name: value for name, value in said.items() if value is not None}


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return a field that must be a text; raise ValueError naming the record."""
    value = record.get(name)
    if not isinstance(value, str):
        fields = ", ".join(sorted(key for key in record if key not in OWN))
        raise ValueError(f"record {record.get('id')} has no text {name}; it has {fields}")
    return value


def conversation_of(record: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a record's prompt: `messages`, or `prompt` as a user's turn."""
    messages = record.get("messages")
    if messages is None:
        return [{"role": "user", "content": text_of(record, "prompt")}]
    return [dict(message) for message in messages]


def answer_ids(record: Mapping[str, Any]) -> list[str]:
    """Return the names of a record's answers: its id, and their numbers."""
    return [f"{record['id']}-{number}" for number in range(len(record["answers"]))]


def turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """Return messages as a request has them."""
    return tuple((message["role"], message["content"]) for message in messages)
