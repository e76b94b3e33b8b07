"""Steps that write new texts of old ones: lists, rewritings, filters by a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from nvmm.config.choices import require
from nvmm.jobs.synthesis.records import Made, Making, child, good, source, text_of
from nvmm.jobs.synthesis.step import FORMAT, Desk, Local, Step

Listing = Literal["structured", "extract"]


class Strings(BaseModel):
    """A list of texts."""

    model_config = ConfigDict(extra="forbid", strict=True)
    items: list[str]


class YesNo(BaseModel):
    """An answer of yes or no."""

    model_config = ConfigDict(extra="forbid", strict=True)
    yes: bool


@dataclass(frozen=True, kw_only=True)
class Expand(Step):
    """Records of a list that a generator writes about each record: subtopics of a topic, questions
    about it, tasks on a document, problems with a keyword.

    Args:
        prompt: asks for the list; it is given the record's fields and `count`.
        into: the field of a new record that has the list's text; the others are its parent's.
        count: how many texts are asked for; more are left out.
        listing: `structured` asks for JSON. `extract` asks for a text, then for its list by the
            prompt `extract`, and refuses it where one is not, word for word, in the text.
        generator: its name.
    """

    prompt: str
    into: str
    count: int
    generator: str
    listing: Listing = "structured"
    extract: str = "extract"

    def __post_init__(self) -> None:
        require("listing", self.listing, Listing)
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.generator]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        extract = [self.extract] if self.listing == "extract" else []
        return [self.prompt, *extract, FORMAT]

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask for the list; Failed where it is none, or has what the text has not."""
        values = {**item, "count": self.count}
        schema = Strings if self.listing == "structured" else None
        [answer] = good((yield [desk.ask(self.generator, self.prompt, values, schema)]))
        entries = {"written": source(answer)}
        dropped: list[str] = []
        if self.listing == "extract":
            text = answer.reply.text
            request = desk.ask(self.generator, self.extract, {"text": text}, Strings)
            [answer] = good((yield [request]))
            entries["extracted"] = source(answer)
            invented = [one for one in answer.value.items if one.strip() not in text]
            if invented:
                return Made([], [f"the list has {invented[0]!r}, and the text has not"])
        texts: list[str] = []
        for one in (text.strip() for text in answer.value.items):
            if not one or one in texts:
                dropped.append("an empty text" if not one else f"twice in a list: {one!r}")
            elif len(texts) == self.count:
                dropped.append(f"more than {self.count}: {one!r}")
            else:
                texts.append(one)
        if not texts:
            dropped.append("the list is empty")
        records = [
            child(desk.step, [item], {self.into: text}, number, **entries)
            for number, text in enumerate(texts)
        ]
        return Made(records, dropped)


@dataclass(frozen=True, kw_only=True)
class Rewrite(Step):
    """A generator's text in the place of a field: a question made longer, a draft refined.

    prompt: asks for it; it is given the record's fields. into: the field. generator: its name.
    """

    prompt: str
    into: str
    generator: str

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.generator]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.prompt]

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask for the text."""
        [answer] = good((yield [desk.ask(self.generator, self.prompt, item)]))
        fields = {self.into: answer.reply.text}
        return Made([child(desk.step, [item], fields, written=source(answer))])


@dataclass(frozen=True, kw_only=True)
class Ask(Step):
    """Keeps the records about which a generator says yes: is this a keyword of mathematics?

    prompt: asks it; it is given the record's fields. generator: its name.
    """

    prompt: str
    generator: str

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.generator]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.prompt, FORMAT]

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask about a record."""
        [answer] = good((yield [desk.ask(self.generator, self.prompt, item, YesNo)]))
        if not answer.value.yes:
            return Made([], [f"{item['id']}: {self.generator} says no to {self.prompt}"])
        return Made([child(desk.step, [item], {}, yes=source(answer))])


@dataclass(frozen=True, kw_only=True)
class Compose(Local):
    """A field that a prompt joins of others without asking anybody: a document and a task.

    prompts: one of them is drawn for each record. into: the field. drop: fields to leave behind.
    """

    prompts: Sequence[str]
    into: str
    drop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts=[] names none to draw from")

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return list(self.prompts)

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the record with the field."""
        prompt = desk.draw(item["id"]).choice(list(self.prompts))
        fields = dict.fromkeys(self.drop) | {self.into: desk.write(prompt, item)}
        return Made([child(desk.step, [item], fields, template=prompt)])


@dataclass(frozen=True, kw_only=True)
class Threshold(Local):
    """Keeps the records whose field is a number of at least `at_least` and at most `at_most`, or a
    text of so many characters. A record without the field has an error.
    """

    field: str
    at_least: float | None = None
    at_most: float | None = None

    def change(self, item: Any, desk: Desk) -> Made:
        """Keep a record or leave it out."""
        value = item.get(self.field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = len(text_of(item, self.field))
        low = self.at_least is not None and value < self.at_least
        if low or (self.at_most is not None and value > self.at_most):
            limits = f"{self.at_least} to {self.at_most}"
            return Made([], [f"{item['id']}: {self.field}={value} is outside {limits}"])
        return Made([item])
