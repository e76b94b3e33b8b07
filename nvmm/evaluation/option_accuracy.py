"""Accuracy over closed options: which of a question's labels an answer names.

Audio Flamingo scores classification by generated text; its rule is not published, and this one is
ours: of texts in lower case without punctuation, the option that the answer is, else the longest
one that it begins with, else the only one whose words it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PUNCTUATION = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True)
class OptionAccuracy:
    """The metric of closed questions: an answer is right where it names an accepted option.

    `among` gives that of one question. Without options an answer must be an accepted one.
    """

    options: tuple[str, ...] = ()

    def among(self, options: Sequence[str], answers: Sequence[str]) -> OptionAccuracy:
        """Return the metric of a question with these options.

        Raises ValueError for options that differ by nothing but case and punctuation, and for an
        accepted answer that is none of them.
        """
        plain = [_plain(option) for option in options]
        if not all(plain) or len(set(plain)) < len(plain):
            raise ValueError(f"the options {list(options)} must be different words")
        if lost := [answer for answer in answers if _plain(answer) not in plain]:
            raise ValueError(f"the answer {lost[0]!r} is none of the options {list(options)}")
        return OptionAccuracy(tuple(options))

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float:
        """Return 1.0 or 0.0."""
        right = {_plain(answer) for answer in answers}
        number = named(prediction, self.options)
        said = _plain(prediction if number is None else self.options[number])
        return float(said in right and (number is not None or not self.options))


def named(text: str, options: Sequence[str]) -> int | None:
    """Return the number of the option that a text names, None where it names none or several."""
    said = _plain(text)
    plain = [_plain(option) for option in options]
    if said in plain:
        return plain.index(said)
    begins = [number for number, option in enumerate(plain) if f"{said} ".startswith(f"{option} ")]
    if begins:
        return max(begins, key=lambda number: len(plain[number]))
    within = [number for number, option in enumerate(plain) if f" {option} " in f" {said} "]
    # "bark" is no option of its own in "dog bark".
    longest = [
        number
        for number in within
        if not any(
            f" {plain[number]} " in f" {plain[other]} " for other in within if other != number
        )
    ]
    return longest[0] if len(longest) == 1 else None


def likeliest(model: Any, asked: Sequence[tuple[Any, Sequence[str]]]) -> list[str]:
    """Return the option of the greatest log-probability after each prompt, with the answer's end.

    model: a `Restored`. asked: prompt and options of each question; those of the same options share
    a pass.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, (_, options) in enumerate(asked):
        groups.setdefault(tuple(options), []).append(number)
    found: dict[int, str] = {}
    for options, numbers in groups.items():
        tokens = [option_tokens(model.builder, option) for option in options]
        table = model.score_continuations([asked[number][0] for number in numbers], tokens)
        best = table.argmax(1).tolist()
        found |= {number: options[one] for number, one in zip(numbers, best, strict=True)}
    return [found[number] for number in range(len(asked))]


def option_tokens(builder: Any, option: str) -> list[int]:
    """Return the tokens of an option as an answer, with its end: "dog" is no part of "dog bark"."""
    return [*builder.answer_tokens(option), builder.stop_ids[0]]


def _plain(text: str) -> str:
    """Return the words of a text in lower case, with one space between two."""
    return " ".join(_PUNCTUATION.sub(" ", text.casefold()).split())
