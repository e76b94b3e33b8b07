"""A generator behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openai

from nvmm.config.choices import require
from nvmm.io.progress import progress
from nvmm.jobs.synthesis.asking import Keep, Source
from nvmm.jobs.synthesis.records import Reply, Request

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

Structured = Literal["json_schema", "json_object", "prompt"]
_REFUSED = (400, 413, 422)
"""Statuses by which an endpoint refuses this request, whoever asks it again."""
_AGAIN = (408, 409, 425, 429)
"""Statuses, besides those from 500, after which the same request may be answered."""


@dataclass(frozen=True)
class Endpoint(Source):
    """A model behind the chat completions of an OpenAI-compatible endpoint.

    Args:
        model: its name at the endpoint.
        base_url: where the endpoint is; null: OpenAI's client decides (OPENAI_BASE_URL).
        api_key_file: a file with the key; null: the client's own variable OPENAI_API_KEY, or none.
        temperature, top_p, max_tokens: of sampling, and the tokens of the longest answer. An answer
            that is cut there is an error: half an answer is no example.
        seed: each request has a seed of its own, drawn from this one and what is asked.
        send_seed: false for an endpoint that knows no `seed`.
        structured: how JSON is asked for: by its schema (`json_schema`), as any JSON
            (`json_object`), or by the prompt's words alone (`prompt`). It is validated always.
        extra: other fields of the request's body, as {top_k: 20}.
        concurrency: requests at a time. requests_per_minute: at most so many begin; null: no limit.
        timeout: seconds for one answer.
        max_retries: how often a request is tried again after an error of the endpoint (429, 5xx,
            no connection, no answer in time), after a pause that doubles from `backoff` seconds up
            to a minute, or the one that it asks for (Retry-After).
        skip_failing: a request that still fails becomes an error of its record; false: the job
            stops, and the same command goes on.
        input_price, output_price: of a million tokens, for the summary.
    """

    model: str
    base_url: str | None = None
    api_key_file: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1234
    send_seed: bool = True
    structured: Structured = "json_schema"
    extra: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    requests_per_minute: float | None = None
    timeout: float = 120.0
    max_retries: int = 8
    backoff: float = 1.0
    skip_failing: bool = False
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        require("structured", self.structured, Structured)
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute={self.requests_per_minute} must be above 0")

    @property
    def identity(self) -> dict[str, Any]:
        """The model and the parameters of sampling: where it is served changes no answer."""
        names = ("model", "temperature", "top_p", "max_tokens", "seed", "structured", "extra")
        return {"kind": "endpoint", **{name: getattr(self, name) for name in names}}

    @property
    def prices(self) -> tuple[float, float]:
        """The price of a million tokens of input and of output."""
        return self.input_price, self.output_price

    def replies(
        self,
        requests: Sequence[tuple[str, Request]],
        keep: Keep,
        counts: Counter[str],
        model: Restored | None,
    ) -> list[Reply]:
        """Ask the endpoint; see `Source.replies`."""
        return asyncio.run(self._replies(requests, keep, counts))

    async def _replies(
        self, requests: Sequence[tuple[str, Request]], keep: Keep, counts: Counter[str]
    ) -> list[Reply]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(self._client())
            bar = stack.enter_context(progress(len(requests), "asked", "answer", delay=5))
            gate = _Gate(self.concurrency, self.requests_per_minute)

            async def one(key: str, request: Request) -> Reply:
                try:
                    async with gate.slots:
                        reply = await self._try(client, key, request, gate, counts)
                except Exception:
                    gate.closed = True  # What has begun is waited for, and kept; no more begins.
                    raise
                # A refusal for now is no answer: it is asked again by the next command.
                if reply.finish != _FAILING:
                    keep(request, reply)
                bar.update()
                return reply

            tasks = [asyncio.create_task(one(key, request)) for key, request in requests]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, _Closed):
                raise failure
        return [result for result in results if isinstance(result, Reply)]

    def _client(self) -> openai.AsyncOpenAI:
        options: dict[str, Any] = {
            "base_url": self.base_url,
            "max_retries": 0,
            "timeout": self.timeout,
        }
        if self.api_key_file is not None:
            try:
                key = Path(self.api_key_file).expanduser().read_text().strip()
            except OSError as error:
                raise ValueError(
                    f"api_key_file={self.api_key_file} cannot be read ({error.strerror})"
                ) from error
            return openai.AsyncOpenAI(api_key=key, **options)
        try:
            return openai.AsyncOpenAI(**options)
        except openai.OpenAIError:  # A server of one's own asks for none.
            return openai.AsyncOpenAI(api_key="none", **options)

    async def _try(
        self,
        client: openai.AsyncOpenAI,
        key: str,
        request: Request,
        gate: _Gate,
        counts: Counter[str],
    ) -> Reply:
        """Ask until there is an answer; raise OSError where there is none for now."""
        body = self._body(key, request)
        last: Exception | None = None
        for trial in range(self.max_retries + 1):
            await gate.begin()
            counts["requests"] += 1
            try:
                return _reply(await client.chat.completions.create(**body), self.max_tokens)
            except openai.APIStatusError as error:
                status = error.status_code
                if status in _REFUSED:
                    counts[f"refused by {status}"] += 1
                    return Reply("", f"the endpoint refuses ({status}): {error.message}")
                if status < 500 and status not in _AGAIN:
                    raise OSError(
                        f"{self.model}: the endpoint answers {status}: {error.message}"
                    ) from error
                reason, last = str(status), error
                wait = _asked_pause(error.response.headers.get("retry-after"))
                if status == 429 and wait is not None:
                    gate.pause(wait)
            except openai.APITimeoutError as error:
                reason, wait, last = "no answer in time", None, error
            except openai.APIConnectionError as error:
                reason, wait, last = "no connection", None, error
            except (openai.APIError, ValueError, TypeError, LookupError, AttributeError) as error:
                reason, wait, last = "no chat completion", None, error  # an answer of another form
            counts[f"retries after {reason}"] += trial < self.max_retries
            if trial < self.max_retries:
                pause = min(60.0, self.backoff * 2**trial) * (0.5 + random.random() / 2)
                await asyncio.sleep(pause if wait is None else wait)
        failure = (
            f"the endpoint fails {self.max_retries + 1} times; the last time: {reason} ({last})"
        )
        if self.skip_failing:
            return Reply("", failure, _FAILING)
        raise OSError(f"{self.model}: {failure}; the same command goes on")

    def _body(self, key: str, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        if self.send_seed:
            body["seed"] = int(key[:8], 16) >> 1  # The key has the generator's seed in it.
        if request.schema is not None and self.structured == "json_schema":
            schema = {"name": request.schema.__name__, "schema": request.schema.model_json_schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.schema is not None and self.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        if self.extra:
            body["extra_body"] = dict(self.extra)
        return body


_FAILING = "failing"
"""The `finish` of a reply that the endpoint may still give another time."""


class _Closed(Exception):  # noqa: N818 - nothing went wrong with this request
    """A request did not begin, as another one has failed."""


class _Gate:
    """Lets requests begin: so many at a time, so many a minute, none in a pause."""

    def __init__(self, concurrency: int, per_minute: float | None) -> None:
        self.slots = asyncio.Semaphore(concurrency)
        self.closed = False
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0

    async def begin(self) -> None:
        """Wait until a request may begin; raise _Closed where none may any more."""
        if self.closed:
            raise _Closed
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
            if self.closed:
                raise _Closed
        self._next = time.monotonic() + self._gap

    def pause(self, seconds: float) -> None:
        """Let no request begin for so long."""
        self._next = max(self._next, time.monotonic() + seconds)


def _reply(completion: Any, max_tokens: int) -> Reply:
    """Return a reply of a chat completion; raise what an object of another form raises."""
    choice, usage = completion.choices[0], completion.usage
    text = (choice.message.content or "").encode("utf-8", "replace").decode().strip()
    error = None
    if choice.finish_reason == "length":
        text, error = "", f"the answer was cut at max_tokens={max_tokens}"
    elif not text:
        error = f"the answer is empty (finish_reason {choice.finish_reason})"
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
    return Reply(text, error, choice.finish_reason, *map(int, counts))


def _asked_pause(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None for none, and for a date."""
    try:
        seconds = float(header) if header is not None else None
    except ValueError:
        return None
    return None if seconds is None or not 0 <= seconds < 3600 else seconds
