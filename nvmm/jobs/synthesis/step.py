"""A step of a pipeline makes records of records, asking generators by prompts."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from pydantic import BaseModel

from nvmm.jobs.synthesis.records import Made, Making, Message, Record, Request, canonical, turns

FORMAT = "json"
"""Name of the prompt that asks for JSON; it is put behind every prompt whose answer is JSON."""


@dataclass(frozen=True)
class Desk:
    """What a step asks with: the prompts by name, and a seed.

    step: the step's name, which stands in the lineage of its records.
    """

    step: str
    prompts: Mapping[str, str]
    seed: int

    @cached_property
    def _templates(self) -> dict[str, jinja2.Template]:
        sandbox = jinja2.sandbox.SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        found = {}
        for name, text in self.prompts.items():
            try:
                found[name] = sandbox.from_string(text)
            except jinja2.TemplateError as error:
                raise ValueError(f"job.prompts.{name} is no jinja2 template: {error}") from error
        return found

    def write(self, prompt: str, values: Mapping[str, Any]) -> str:
        """Return the text of a prompt; ValueError for one that is not there, or lacks a value."""
        if prompt not in self.prompts:
            known = ", ".join(sorted(self.prompts))
            raise ValueError(f"job.steps.{self.step}: no prompt {prompt!r}; there are {known}")
        try:
            return self._templates[prompt].render(values).strip()
        except jinja2.TemplateError as error:
            given = ", ".join(sorted(values))
            raise ValueError(
                f"job.prompts.{prompt} in job.steps.{self.step}: {error}; it is given {given}"
            ) from error

    def ask(
        self,
        generator: str,
        prompt: str,
        values: Mapping[str, Any],
        schema: type[BaseModel] | None = None,
        sample: int = 0,
    ) -> Request:
        """Return a request of one user's turn, made by a prompt."""
        text = self.write(prompt, values)
        if schema is not None:
            form = canonical(schema.model_json_schema())
            text = f"{text}\n\n{self.write(FORMAT, {'schema': form})}"
        return Request(generator, (("user", text),), prompt, schema, sample)

    def reply(self, generator: str, messages: Sequence[Message], sample: int = 0) -> Request:
        """Return a request for the next turn of a conversation."""
        return Request(generator, turns(messages), sample=sample)

    def draw(self, *names: Any) -> random.Random:
        """Return a generator of random numbers of this step, the seed and these names."""
        return random.Random(canonical([self.seed, self.step, *names]))


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """A step: its parameters are all that its records depend on, besides the records before it.

    after: names of the steps whose records it takes, one after the other; null: those of the step
        before it.
    part_size: items that are worked on together, and stand in one part file.
    """

    after: Sequence[str] | None = None
    part_size: int = field(default=64)

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return []

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return []

    def settings(self) -> dict[str, Any]:
        """Return all parameters as JSON, with the name of the step's kind."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"kind": type(self).__name__, **values}

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return what it works on one by one; by default the records."""
        return list(records)

    @abstractmethod
    def make(self, item: Any, desk: Desk) -> Making:
        """Work on an item (see `Making`); raise Failed where it has no outcome."""

    def finish(self, records: list[Record], folder: Path) -> list[Path]:
        """Write files of all of its records, on one rank; return them. By default there are none.

        folder: of the pipeline's output.
        """
        return []


class Local(Step):
    """A step that asks nobody."""

    def make(self, item: Any, desk: Desk) -> Making:
        """Work on an item."""
        yield from ()
        return self.change(item, desk)

    @abstractmethod
    def change(self, item: Any, desk: Desk) -> Made:
        """Return what it makes of an item."""
