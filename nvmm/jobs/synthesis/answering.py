"""Steps that answer prompts, and play dialogues."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nvmm.config.choices import require
from nvmm.jobs.synthesis.records import Failed, Made, Making, child, conversation_of, good, source
from nvmm.jobs.synthesis.step import Desk, Step

Ends = Literal["assistant", "user"]


@dataclass(frozen=True, kw_only=True)
class Respond(Step):
    """Answers to a record's prompt: its `messages`, or its `prompt` as a user's turn.

    A record gets `answers`, a list of {text, generator, sample, scores}. A generator's failure
    leaves its answer out; a record without any has an error.

    by: names of generators; `some` of them are drawn for each record, null: all.
    samples: answers of each.
    """

    by: Sequence[str]
    some: int | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if not self.by or self.samples < 1 or not 1 <= (self.some or 1) <= len(self.by):
            raise ValueError(
                f"by={list(self.by)}, some={self.some}, samples={self.samples}: name generators,"
                " draw at most all of them, and take at least one sample"
            )

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return list(self.by)

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask for the answers."""
        names = list(self.by)
        if self.some is not None:
            names = sorted(desk.draw(item["id"]).sample(names, self.some), key=names.index)
        messages = conversation_of(item)
        requests = [
            desk.reply(name, messages, sample) for name in names for sample in range(self.samples)
        ]
        answers = yield requests
        useful = [answer for answer in answers if answer.error is None]
        errors = [answer.error for answer in answers if answer.error is not None]
        if not useful:
            raise Failed(errors[0])
        found = [
            {
                "text": answer.reply.text,
                "generator": answer.request.generator,
                "sample": answer.request.sample,
                "scores": {},
            }
            for answer in useful
        ]
        said = list(map(source, useful))
        return Made([child(desk.step, [item], {"answers": found}, said=said)], errors)


@dataclass(frozen=True, kw_only=True)
class Dialogue(Step):
    """A dialogue that goes on from a record's prompt: a generator answers, another one plays the
    user, who has a personality.

    The record gets `messages`. Politeness is cut off the played turns: users seldom thank.

    Args:
        assistant, user: names of the generators.
        turns: the user's turns, that of the prompt too.
        ends: with the `assistant`'s answer to the last of them, or with that turn of the `user`: a
            prompt of several turns, for preferences.
        prompt: asks for the user's next turn; it is given `personality` and `messages`.
        personalities: one of them is drawn for each record.
    """

    assistant: str
    user: str
    personalities: Sequence[str]
    turns: int = 3
    ends: Ends = "assistant"
    prompt: str = "user_turn"

    def __post_init__(self) -> None:
        require("ends", self.ends, Ends)
        if self.turns < 1 or not self.personalities:
            raise ValueError(f"turns={self.turns} must be at least 1, and personalities not empty")

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.assistant, self.user]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.prompt]

    def make(self, item: Any, desk: Desk) -> Making:
        """Play the dialogue turn by turn."""
        messages = conversation_of(item)
        personality = desk.draw(item["id"]).choice(list(self.personalities))
        said = []
        for turn in range(self.turns):
            if turn:
                values = {"personality": personality, "messages": messages}
                [answer] = good((yield [desk.ask(self.user, self.prompt, values)]))
                text = without_politeness(answer.reply.text)
                if not text:
                    raise Failed(f"turn {turn + 1} of the user is nothing but politeness")
                messages.append({"role": "user", "content": text})
                said.append(source(answer))
            if turn + 1 < self.turns or self.ends == "assistant":
                [answer] = good((yield [desk.reply(self.assistant, messages)]))
                messages.append({"role": "assistant", "content": answer.reply.text})
                said.append(source(answer))
        fields = {"messages": messages, "prompt": None, "personality": personality}
        return Made([child(desk.step, [item], fields, said=said)])


_THANKS = re.compile(
    r"(?:^|(?<=[.!?\n]))\s*(?:(?:oh|ok|okay|ah|wow|great|perfect|awesome|and),?\s+)?"
    r"(?:thanks|thank\s+you|many\s+thanks|much\s+appreciated|i\s+(?:really\s+)?appreciate"
    r"|that(?:'s|\s+is|\s+was)\s+(?:really\s+|very\s+|so\s+)?(?:helpful|great|amazing|perfect))"
    r"[^.!?\n]*[.!?]*",
    re.IGNORECASE,
)
"""A sentence that thanks or praises, up to its end."""
_PLEASE = re.compile(r",?\s*\bplease\b,?(?=\s|[.!?]|$)", re.IGNORECASE)


def without_politeness(text: str) -> str:
    """Return a user's turn without sentences of thanks and praise, and without "please"."""
    text = _THANKS.sub("", text)
    text = _PLEASE.sub("", text).strip()
    return text[:1].upper() + text[1:]
