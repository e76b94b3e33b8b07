"""ROUGE-L of captions as COCO's evaluation has it (Lin 2004; Chen et al. 2015, arXiv:1504.00325).

Over several references it is F of the greatest precision and the greatest recall, with beta 1.2;
`nvmm.evaluation.rouge` is the plain F-measure of summaries.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvmm.evaluation.cider import words

_BETA_SQUARED = 1.2**2


def caption_rouge_l(*, prediction: str, answers: Sequence[str]) -> float:
    """Return ROUGE-L in [0, 1] of one caption; words are those of CIDEr-D."""
    candidate = words(prediction)
    references = [words(answer) for answer in answers]
    common = [_common(candidate, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(hit / len(ref) for hit, ref in zip(common, references, strict=True) if ref)
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for column, other in enumerate(second):
            longer = before[column] + 1 if word == other else max(before[column + 1], row[column])
            row.append(longer)
    return row[-1]
