"""Accuracy over choices: which of the offered answers a text names (FEVER, QuALITY).

There is no one official script; this rule is ours: a letter or a choice's whole text, at the
beginning or behind "answer is".
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from nvmm.evaluation.squad import normalize

_LEAD = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*", re.IGNORECASE)


def choice_accuracy(choices: Sequence[str], *, prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction names a choice that is an accepted answer, else 0.0.

    answers: letters (A is the first choice) or the choices' texts. A prediction that names no
    choice is wrong.

    Raises ValueError for an answer that is no choice.
    """
    right = set()
    for answer in answers:
        number = _exactly(answer, choices)
        if number is None:
            raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)}")
        right.add(number)
    return float(chosen(prediction, choices) in right)


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the number of the choice that a text names, None where it names none.

    A whole text that is a choice or its letter, else the first letter or choice behind "answer",
    "option" or "choice" (is), else one that the text begins with: "B", "(B)", "B. Paris", "Paris,".
    """
    whole = _exactly(prediction, choices)
    if whole is not None:
        return whole
    for lead in _LEAD.finditer(prediction):
        named = _beginning(prediction[lead.end() :], choices)
        if named is not None:
            return named
    return _beginning(prediction, choices)


def _letters(choices: Sequence[str]) -> str:
    if len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"{len(choices)} choices are more than the letters from A to Z")
    return string.ascii_uppercase[: len(choices)]


def _exactly(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice that a text is, by its words or its letter."""
    plain = normalize(text)
    same = [number for number, choice in enumerate(choices) if normalize(choice) == plain]
    if len(same) == 1:
        return same[0]
    # "A" is an article to `normalize`.
    letter = text.strip().strip("().:").strip().upper()
    letters = _letters(choices)
    return letters.index(letter) if len(letter) == 1 and letter in letters else None


def _beginning(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice that a text begins with: the longest one, or a letter that stands alone."""
    plain = normalize(text)
    named = [
        (len(normalize(choice)), number)
        for number, choice in enumerate(choices)
        if normalize(choice) and f"{plain} ".startswith(f"{normalize(choice)} ")
    ]
    if named:
        return max(named)[1]
    match = re.match(rf"\s*\(?([{_letters(choices)}])(?:[).:,]|\s*$|\s*\n)", text)
    return None if match is None else _letters(choices).index(match[1])
