"""Dialogue queries: the turns so far, one a line, as the query of a retrieval sample.

    user: How do I copy a list?
    agent: Use the method copy, or a slice.
    user: And a nested one?

ChatQA (arXiv:2401.10225) and its released retriever write them so, with the role word `agent`. No
step rewrites the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Speaker = Literal["user", "agent"]
SPEAKERS: dict[str, Speaker] = {
    "user": "user",
    "human": "user",
    "assistant": "agent",
    "gpt": "agent",
    "agent": "agent",
}
"""Role of a turn in data sets -> who speaks."""


def turns(messages: Any) -> list[tuple[Speaker, str]]:
    """Return (speaker, text) of each turn; the texts' outer white space is left out.

    messages: a list of {"role": .., "content": ..}, or of {"from": .., "value": ..}.

    Raises ValueError for another role than `SPEAKERS`, and for a turn without text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a dialogue must be a list of turns that is not empty, got {messages!r}")
    result = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"turn {number} must be an object, got {message!r}")
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"turn {number}: role {role!r} must be one of {', '.join(SPEAKERS)}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"turn {number} must have a text, got {text!r}")
        result.append((SPEAKERS[role], text.strip()))
    return result


@dataclass(frozen=True)
class Dialogue:
    """The form of a dialogue query, and what is cut where it is too long.

    A dialogue that does not fit loses whole turns from its beginning, as few as possible. The last
    turn of the user is never dropped: where it does not fit alone, it loses its end, as every long
    text does.

    user_word, agent_word: what stands before a turn, with a colon.
    """

    user_word: str = "user"
    agent_word: str = "agent"

    def __post_init__(self) -> None:
        if not self.user_word or not self.agent_word or self.user_word == self.agent_word:
            raise ValueError(
                f"dialogue.user_word={self.user_word!r} and agent_word={self.agent_word!r} must be"
                " two words"
            )

    def render(self, messages: Any) -> str:
        """Return a dialogue that ends with the user's question as one text.

        Raises ValueError as `turns` does, and where the last turn is not the user's.
        """
        spoken = turns(messages)
        if spoken[-1][0] != "user":
            raise ValueError("a dialogue query must end with a turn of the user")
        words = {"user": self.user_word, "agent": self.agent_word}
        return "\n".join(f"{words[speaker]}: {text}" for speaker, text in spoken)

    def cut(self, text: str, fits: Callable[[str], bool]) -> str:
        """Return a rendered dialogue without the turns at its beginning that do not fit.

        A turn begins at a line that begins with a role word, so that a text which was rendered
        elsewhere, as the queries of an evaluation are, is cut as the records of training.
        """
        words = f"{re.escape(self.user_word)}|{re.escape(self.agent_word)}"
        begins = list(re.finditer(rf"^({words}): ", text, re.MULTILINE))
        last = max((m.start() for m in begins if m[1] == self.user_word), default=0)
        starts = [0, *(match.start() for match in begins if 0 < match.start() <= last)]
        return next((text[start:] for start in starts if fits(text[start:])), text[last:])
