"""ROUGE by the packages that the field reports: `rouge-score`, and `rouge` where LongBench has it.

Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Both are in the `eval` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


def rouge(
    kind: Kind = "rougeL", stemmer: bool = False, *, prediction: str, answers: Sequence[str]
) -> float:
    """Return the best F-measure of the prediction and any answer by `rouge-score`.

    kind: rougeLsum takes each line for a sentence (union of longest common subsequences), rougeL
        the whole text for one.
    stemmer: reduce words by Porter's stemmer first.
    """
    scorer = _scorer(kind, stemmer)
    return max((scorer.score(answer, prediction)[kind].fmeasure for answer in answers), default=0.0)


def longbench_rouge(*, prediction: str, answers: Sequence[str]) -> float:
    """Return the best `rouge-l` F of the package `rouge`, as LongBench's script has it.

    It splits words at white space and sentences at full stops, and keeps case. A text that the
    package refuses, an empty one for instance, scores 0, as in the script.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ValueError("LongBench's ROUGE needs the package rouge: install nvmm[eval]") from error
    best = 0.0
    for answer in answers:
        try:
            [score] = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer])
        except (ValueError, RecursionError):
            continue
        best = max(best, score["rouge-l"]["f"])
    return best


def _scorer(kind: Kind, stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs the package rouge-score: install nvmm[eval]") from error
    return RougeScorer([kind], use_stemmer=stemmer)
