"""Token F1 and exact match of normalised answers: SQuAD, and what question answering took from it.

Rajpurkar et al. 2016, arXiv:1606.05250, and SQuAD 2.0's evaluation script. ChatRAG Bench, LongBench
and InfiniteBench use the same F1; `punctuation` says how they clean a text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Punctuation = Literal["removed", "spaced"]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS: dict[str, dict[int, str | None]] = {
    "removed": dict.fromkeys(map(ord, string.punctuation)),
    "spaced": dict.fromkeys(map(ord, string.punctuation), " "),
}


def squad_f1(
    punctuation: Punctuation = "removed", *, prediction: str, answers: Sequence[str]
) -> float:
    """Return the best F1 of the prediction's words and any answer's, in [0, 1].

    Words are normalised and counted as often as they occur. Where prediction or answer has none,
    the score is 1 if neither has, else 0 (SQuAD 2.0's rule; the others' scripts give 0).
    """
    guess = normalize(prediction, punctuation).split()
    return max((f1(guess, normalize(a, punctuation).split()) for a in answers), default=0.0)


def squad_exact_match(
    punctuation: Punctuation = "removed", *, prediction: str, answers: Sequence[str]
) -> float:
    """Return 1.0 if the prediction is one of the answers, normalised, else 0.0."""
    guess = normalize(prediction, punctuation)
    return float(any(normalize(answer, punctuation) == guess for answer in answers))


def normalize(text: str, punctuation: Punctuation = "removed") -> str:
    """Return a text in lower case, without ASCII punctuation and English articles.

    punctuation: `removed` joins what it stood between (SQuAD: "don't" is one word); `spaced` parts
        it (ChatRAG Bench, ParlAI: "don t").
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_MARKS[punctuation])).split())


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of a prediction's words, a multiset."""
    if not prediction or not answer:
        return float(not prediction and not answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))
