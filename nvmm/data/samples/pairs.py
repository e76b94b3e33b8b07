"""Records of preferences: a prompt with a better and a worse answer, or one answer and a label."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nvmm.data.samples.chat import IMAGE_MARKER, Turn
from nvmm.data.samples.forms import asked, check_beside, turns_of
from nvmm.data.samples.record import Record

NAMES = (
    *("prompt", "system", "chosen", "rejected", "chosen_reward", "rejected_reward"),
    *("completion", "label"),
)
"""The fields that are read, under our names."""
MOST = 1e15
"""The largest reward or label: single precision holds squares of such numbers."""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    turns: what follows the prompt; the assistant's first. chosen: whether it is the better one, or
    desirable. reward: a judge's score of it, NaN where the record has none.
    """

    turns: list[Turn]
    chosen: bool
    reward: float = math.nan


@dataclass(frozen=True)
class Answers:
    """A prompt, of which nothing is trained, and its answers: the chosen and the rejected one, or
    the only one."""

    prompt: list[Turn]
    answers: list[Answer]


def is_preference(record: Record) -> bool:
    """Return whether a record has answers to prefer, and not a conversation to learn."""
    return any(record.get(name) is not None for name in ("chosen", "rejected", "completion"))


def read(record: Record, num_images: int) -> Answers:
    """Return the prompt and the answers of a record.

    - `chosen` and `rejected` are texts, or lists of messages (TRL's conversational form). With a
      `prompt`, a text (a user's turn) or a list of messages, they follow it; a conversation that
      repeats a prompt's text is a whole one (UltraFeedback). Without a prompt they are whole
      conversations, and what they begin with in common is the prompt (TRL's implicit prompt).
    - `chosen_reward` and `rejected_reward` are numbers, both or neither.
    - `completion` with the boolean `label` is one answer (KTO), to a `prompt`.
    - `system` is the system's text, where the messages have none.

    num_images: images of the record; a text prompt that marks none has them first.

    Raises BadSample for anything else, and where both answers are the same.
    """
    check_beside(record, NAMES)
    if record.get("completion") is not None:
        return _unpaired(record, num_images)
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise record.missing(name)
    if record.get("label") is not None:
        raise record.bad("label is of a completion, and the record has chosen and rejected")
    prompt = _prompt(record, num_images)
    chosen, rejected = (_turns(record, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise record.bad("chosen and rejected are the same")
    if prompt is None or _repeats(record, chosen, rejected):
        prompt = _common(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _check_text(record, prompt)
    rewards = [_reward(record, name) for name in ("chosen_reward", "rejected_reward")]
    if math.isnan(rewards[0]) != math.isnan(rewards[1]):
        raise record.bad("it has one of chosen_reward and rejected_reward; give both, or neither")
    answers = [Answer(chosen, True, rewards[0]), Answer(rejected, False, rewards[1])]
    return _checked(record, prompt, answers)


def _unpaired(record: Record, num_images: int) -> Answers:
    given = [name for name in NAMES if name in ("chosen", "rejected") and record.get(name)]
    if given:
        raise record.bad(f"it has a completion and {' and '.join(given)}; leave one of them out")
    label = record.get("label")
    if not isinstance(label, bool):
        raise record.bad(f"label must be true or false, got {label!r}")
    prompt = _prompt(record, num_images)
    if prompt is None:
        raise record.missing("prompt")
    return _checked(record, prompt, [Answer(_turns(record, "completion"), label)])


def _prompt(record: Record, num_images: int) -> list[Turn] | None:
    """Return the turns of `prompt`, None where the record has none."""
    prompt = record.get("prompt")
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return asked(record.checked_text("prompt", prompt), None, num_images)
    return turns_of(record, prompt)


def _turns(record: Record, name: str) -> list[Turn]:
    """Return the turns of an answer, or of a conversation."""
    value = record.get(name)
    if isinstance(value, str):
        return [Turn("assistant", record.checked_text(name, value))]
    return turns_of(record, value)


def _repeats(record: Record, chosen: list[Turn], rejected: list[Turn]) -> bool:
    """Return whether both answers are whole conversations, beside a prompt that is a text."""
    starts = all(turns[0].role != "assistant" for turns in (chosen, rejected))
    return starts and isinstance(record.get("prompt"), str)


def _check_text(record: Record, prompt: list[Turn]) -> None:
    """Raise BadSample unless a prompt that is a text is one of the conversation's."""
    text = record.get("prompt")
    if text is not None and all(turn.text != text for turn in prompt):
        raise record.bad("prompt is none of the turns that chosen and rejected have in common")


def _common(first: list[Turn], second: list[Turn]) -> list[Turn]:
    """Return the turns that two conversations begin with in common."""
    same = takewhile(lambda turns: turns[0] == turns[1], zip(first, second, strict=False))
    return [turn for turn, _ in same]


def _reward(record: Record, name: str) -> float:
    value: Any = record.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
        raise record.bad(f"{name} must be a number of at most {MOST:g} in size, got {value!r}")
    return float(value)


def _checked(record: Record, prompt: list[Turn], answers: list[Answer]) -> Answers:
    """Return prompt and answers, with the system's text; raise BadSample where roles are wrong."""
    system = record.get("system")
    if system is not None:
        if any(turn.role == "system" for turn in prompt):
            raise record.bad("it has a system text, and its messages have one too")
        prompt = [Turn("system", record.checked_text("system", system)), *prompt]
    if not prompt or prompt[-1].role != "user":
        raise record.bad("the prompt must end with a user's turn, before the answers differ")
    for answer in answers:
        if not answer.turns or answer.turns[0].role != "assistant":
            raise record.bad("an answer must begin with a turn of the assistant")
        if any(IMAGE_MARKER in turn.text for turn in answer.turns):
            raise record.bad(f"{IMAGE_MARKER} in an answer; pictures are of the prompt")
    return Answers([replace(turn, trained=False) for turn in prompt], answers)
