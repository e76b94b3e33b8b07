"""Whether a model says that it cannot answer: ChatQA's unanswerable questions.

Liu et al. 2024, "ChatQA" (arXiv:2401.10225), section 5, and the scripts of ChatRAG Bench: a refusal
is found by phrases, replaced by one sentence before F1, and counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from nvmm.data.samples.contexts import SORRY

UNANSWERABLE = SORRY
"""The answer to a question that its contexts do not answer: ChatQA's training target, and gold."""
REFUSALS = (
    *("cannot find", "can't find", "can not find", "could not find", "couldn't find"),
    *("not able to", "unable to", "do not have", "don't have", "don't know"),
    *("cannot provide", "does not provide", "doesn't provide", "not provided"),
    *("cannot answer", "can't answer", "couldnot answer", "couldn't answer"),
    *("cannot be found", "cannot be determined", "there is no", "no information"),
    *("does not mention", "doesn't mention", "not mentioned", "not explicitly mentioned"),
    *("not explicitly explain", "does not specify", "doesn't specify"),
    *("does not include", "doesn't include", "does not contain", "doesn't contain"),
    *("does not indicate", "doesn't indicate", "does not disclose", "doesn't disclose"),
)
"""Phrases in lower case of which one makes a refusal: those of ChatRAG Bench's scripts."""


def refuses(prediction: str, refusals: Sequence[str] = REFUSALS) -> bool:
    """Return whether a phrase of `refusals` occurs in the prediction, in any case."""
    text = prediction.lower()
    return any(phrase.lower() in text for phrase in refusals)


def replaced(prediction: str, refusals: Sequence[str] = REFUSALS, by: str = UNANSWERABLE) -> str:
    """Return the prediction, or `by` where it refuses: what F1 then compares with the gold."""
    return by if refuses(prediction, refusals) else prediction


def unanswerable_accuracy(
    answers: Iterable[tuple[str, bool]], refusals: Sequence[str] = REFUSALS
) -> dict[str, float]:
    """Return the accuracies on unanswerable and on answerable questions, and their mean, `both`.

    An unanswerable question is right if the prediction refuses, an answerable one if it does not,
    whatever else it says.

    answers: (prediction, whether the question is answerable). ChatQA leaves out answerable ones
        whose contexts lack the gold passage; the caller does so.

    Raises ValueError where there are no questions of one kind: the mean needs both.
    """
    right: dict[bool, list[bool]] = {False: [], True: []}
    for prediction, answerable in answers:
        right[answerable].append(refuses(prediction, refusals) is not answerable)
    for answerable, name in ((False, "unanswerable"), (True, "answerable")):
        if not right[answerable]:
            raise ValueError(f"there are no {name} questions to take the accuracy of")
    unanswerable, answerable_ = fmean(right[False]), fmean(right[True])
    return {
        "unanswerable": unanswerable,
        "answerable": answerable_,
        "both": (unanswerable + answerable_) / 2,
    }
