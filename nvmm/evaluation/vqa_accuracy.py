"""VQA accuracy: VQAv2, TextVQA, OK-VQA, VizWiz.

Antol et al. 2015, "VQA: Visual Question Answering" (arXiv:1505.00468), and the notes on accuracy
at visualqa.org/evaluation.html: an answer that at least 3 of 10 people gave is fully right, and
each person is left out once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_AGREEMENTS = 3
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS.split())}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd she'd've she's
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


_RESTORED = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTIONS.split()
    for match in re.finditer("'", word)
}
"""A contraction that lost one apostrophe -> its proper form."""


def vqa_accuracy(
    normalize_unanimous: bool = True, *, prediction: str, answers: Sequence[str]
) -> float:
    """Return the mean over people of min(other people who gave this answer / 3, 1).

    With fewer than 4 answers the 3 becomes the number of other people, so that n equal answers
    are worth 1 and a single answer is an exact match.

    Args:
        answers: one of each person, usually 10.
        normalize_unanimous: normalise also where all raw answers are the same. The official script
            compares raw text there, so "Yes." misses ten times "yes"; false reproduces that.
    """
    if not answers:
        return 0.0
    guess, *truths = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)
    )
    if normalize_unanimous or len(set(truths)) > 1:
        guess = normalize(guess)
        truths = [normalize(truth) for truth in truths]
    matches = [truth == guess for truth in truths]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(_AGREEMENTS, len(matches) - 1)
    scores = [min((sum(matches) - match) / needed, 1.0) for match in matches]
    return sum(scores) / len(scores)


def normalize(text: str) -> str:
    """Normalise as officially: punctuation, lower case, number words, articles, contractions.

    A punctuation mark becomes nothing where the text has it beside a space, or has digits grouped
    by commas anywhere; else a space. Periods go unless a digit follows.
    """
    cleaned = text
    grouped = _GROUPED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or grouped else " ")
    cleaned = _PERIOD.sub("", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
