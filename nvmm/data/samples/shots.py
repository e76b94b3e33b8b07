"""Solved examples in front of a question, with their images in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import DOCUMENT, Turn
from nvmm.data.samples.forms import Example

Shots = Literal["turns", "document"]
"""How solved examples stand before a question: as turns of a chat, or as one document."""
Named = tuple[str, Example]
"""A source and its example."""


def few_shot(
    asked: Named,
    solved: Sequence[Named],
    suffix: str,
    layout: Shots,
    separator: str,
    *,
    answer_separator: str,
) -> Example:
    """Return the example of a question without its answer, behind solved ones.

    suffix: text behind every question. separator: between the examples of a document;
    answer_separator: between a question and its answer there.

    Raises BadSample naming the source that is no question with an answer.
    """
    require("layout", layout, Shots)
    question = replace(asked[1], turns=unanswered(asked[1].turns))
    for source, example, roles in [
        *((source, example, ["user", "assistant"]) for source, example in solved),
        (asked[0], question, ["user"]),
    ]:
        if [turn.role for turn in example.turns[-len(roles) :]] != roles:
            raise BadSample(source, "it is no question with an answer")
    every = [*(example for _, example in solved), question]
    # 1. Every question gets its suffix; a system message stands once, the question's own.
    turns = [
        replace(turn, text=turn.text + suffix) if turn.role == "user" else turn
        for example in every
        for turn in example.turns
        if turn.role != "system"
    ]
    images = [image for example in every for image in example.images]
    if layout == "turns":
        system = [turn for turn in question.turns if turn.role == "system"]
        return Example([*system, *turns], images, [])
    # 2. As a document, an answer follows its question.
    text = "".join(
        turn.text + (answer_separator if turn.role == "user" else separator) for turn in turns[:-1]
    )
    return Example([Turn(DOCUMENT, text + turns[-1].text)], images, [])


def unanswered(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns up to where the last answer begins."""
    return list(turns[:-1] if turns[-1].role == "assistant" else turns)
