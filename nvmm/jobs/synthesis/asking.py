"""Questions to generators: answered from the cache where it can, validated, and asked again."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from pydantic import BaseModel, ValidationError

from nvmm.jobs.synthesis.cache import Cache
from nvmm.jobs.synthesis.records import Answer, Reply, Request

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

Keep = Callable[[Request, Reply], None]
"""Puts a reply into the cache, as soon as it is there."""
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n\s*```\s*$", re.DOTALL | re.IGNORECASE)
_BLAME = 200
"""Characters of an invalid answer that an error quotes."""


class Source(ABC):
    """A generator: `replies` answers requests that are not in the cache.

    in_process: whether all ranks answer together with the command's checkpoint; else rank 0 asks.
    """

    in_process: bool = False

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The parameters that answers depend on, as JSON."""

    @property
    def prices(self) -> tuple[float, float]:
        """The price of a million tokens of input and of output."""
        return 0.0, 0.0

    @abstractmethod
    def replies(
        self,
        requests: Sequence[tuple[str, Request]],
        keep: Keep,
        counts: Counter[str],
        model: Restored | None,
    ) -> list[Reply]:
        """Answer requests, each with its key in the cache, and `keep` each reply as it comes.

        counts: what happened (requests, retries by reason), added to. model: the checkpoint of a
        generator that is `in_process`. Raises OSError where no answer can be had for now.
        """


@dataclass(frozen=True)
class Asking:
    """All generators of a pipeline behind one cache; its method is collective over all ranks.

    max_attempts: answers that are asked for until one is valid JSON of the schema. counts: of this
        process, for the summary: requests, answers of the cache, retries, invalid answers.
    """

    sources: Mapping[str, Source]
    cache: Cache
    max_attempts: int
    model: Restored | None
    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests in their order; equal ones are asked once.

        An answer that is no JSON of its request's schema is asked for again, as another attempt.
        After `max_attempts` of them, and where the generator refuses, the answer has an error.
        """
        answers: dict[int, Answer] = {}
        used: list[list[dict[str, Any]]] = [[] for _ in requests]
        pending = dict(enumerate(requests))
        while pending:
            named = {number: (self.cache.key(one), one) for number, one in pending.items()}
            found = self._replies(dict(named.values()))
            again: dict[int, Request] = {}
            for number, (key, request) in named.items():
                reply = found[key]
                used[number].append(
                    {
                        "key": key,
                        "generator": request.generator,
                        "input_tokens": reply.input_tokens,
                        "output_tokens": reply.output_tokens,
                    }
                )
                value, error = _read(request, reply)
                if error is not None and reply.error is None:
                    self.counts["invalid answers"] += 1
                    if request.attempt + 1 < self.max_attempts:
                        attempt = request.attempt + 1
                        again[number] = dataclasses.replace(request, attempt=attempt)
                        continue
                answers[number] = Answer(request, reply, value, error, used[number])
            pending = again
        return [answers[number] for number in range(len(requests))]

    def _replies(self, requests: Mapping[str, Request]) -> dict[str, Reply]:
        """Return the reply of each key, from the cache or a generator."""
        found: dict[str, Reply] = {}
        if dist.get_rank() == 0:
            cached = {key: self.cache.get(key) for key in requests}
            found = {key: reply for key, reply in cached.items() if reply is not None}
            self.counts["answers of the cache"] += len(found)
        shared: list[Any] = [found]
        dist.broadcast_object_list(shared, src=0)
        found = shared[0]
        for name, source in self.sources.items():
            missing = [
                (key, one)
                for key, one in requests.items()
                if key not in found and one.generator == name
            ]
            if missing:
                replies = self._ask(source, missing)
                found |= {key: reply for (key, _), reply in zip(missing, replies, strict=True)}
        return found

    def _ask(self, source: Source, missing: Sequence[tuple[str, Request]]) -> list[Reply]:
        first = dist.get_rank() == 0

        def keep(request: Request, reply: Reply) -> None:
            if first:
                self.cache.put(request, reply)

        if source.in_process:
            return source.replies(missing, keep, self.counts, self.model)
        return list(on_first_rank(lambda: source.replies(missing, keep, self.counts, None)))


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Return what something gives on rank 0, whose ValueError or OSError every rank raises.

    Else the other ranks would wait for ever.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _read(request: Request, reply: Reply) -> tuple[Any, str | None]:
    """Return the parsed value of a reply, and why it has none."""
    if reply.error is not None:
        return None, f"{request.generator}: {reply.error}"
    if request.schema is None:
        return None, None
    return parsed(reply.text, request.schema, request.generator)


def parsed(text: str, schema: type[BaseModel], what: str) -> tuple[Any, str | None]:
    """Return the JSON of an answer as `schema`, or why it is none; it may stand in a code fence."""
    fenced = _FENCE.match(text)
    try:
        return schema.model_validate_json(fenced[1] if fenced else text.strip()), None
    except ValidationError as error:
        why = "; ".join(str(one["msg"]) for one in error.errors()[:2])
        return None, f"{what}: its answer is no {schema.__name__} ({why}): {text[:_BLAME]!r}"
