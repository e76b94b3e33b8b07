"""LongBench: its files, prompts and metrics.

Bai et al. 2023, "LongBench" (arXiv:2308.14508), and its scripts: a prompt that is too long loses
its middle, and each task has one metric, of which the best over the answers counts. The tasks that
need a splitter of Chinese words (multifieldqa_zh, dureader, vcsum) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nvmm.evaluation.benchmark import Metric, Prediction, Result, summarize, table
from nvmm.evaluation.items import Item, Items, Listed, TextBenchmark, task_records
from nvmm.evaluation.rouge import longbench_rouge
from nvmm.evaluation.squad import squad_f1

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Tasks of whose answer the first line counts."""
_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks that are asked without a template: they are examples, or code, to go on with."""
_LENGTHS = ((4000, "0-4k"), (8000, "4-8k"))


@dataclass(frozen=True)
class LongBench(TextBenchmark):
    """Tasks of LongBench; the score is the mean of each task and over tasks.

    Args:
        folder: where TASK.jsonl are, with input, context, answers, length, all_classes, _id.
        prompts: task -> its prompt, of {context} and {input}.
        max_new_tokens: task -> tokens of its longest answer.
        only: names of the tasks to ask; None: all of `prompts`.
        suffix: behind a task's name in its file's name; LongBench-E's is `_e`, whose scores are
            also reported by the length of their documents.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    folder: str
    prompts: Mapping[str, str]
    max_new_tokens: Mapping[str, int]
    only: Sequence[str] | None = None
    suffix: str = ""
    name: str = "longbench"
    builder: Mapping[str, Any] = field(default_factory=dict)
    _by_length: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.folder={self.folder}"

    def items(self, model: Restored) -> Items:
        """Return the questions of all tasks that are asked."""
        records = task_records(
            self.folder, self.only, self.prompts, self.max_new_tokens, METRICS, self.suffix
        )
        # Of all records: this rank does not ask all of them, and some were answered before.
        self._by_length.update((source, _group(record)) for source, _, record in records)
        return Listed(records, self._item)

    def _item(self, source: str, task: str, record: Mapping[str, Any]) -> Item:
        texts = [record.get(key) for key in ("context", "input")]
        answers = record.get("answers")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{source}: context and input must be texts")
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise ValueError(f"{source}: answers must be a list of texts, got {answers!r}")
        metric: Metric = METRICS[task]
        if task in ("trec", "lsht"):
            classes = record.get("all_classes")
            if not isinstance(classes, list) or not classes:
                raise ValueError(f"{source}: all_classes must be a list, got {classes!r}")
            metric = partial(classification, classes)
        if task in _FIRST_LINE:
            metric = partial(_of_first_line, metric)
        if self.suffix and not isinstance(record.get("length"), int):
            raise ValueError(f"{source}: length must be a number, got {record.get('length')!r}")
        context, asked = texts
        text = re.sub(
            r"\{(context|input)\}",
            lambda match: str(context if match[1] == "context" else asked),
            self.prompts[task],
        )
        return Item(
            source,
            str(record.get("_id", source)),
            task,
            answers,
            metric,
            self.max_new_tokens[task],
            text=text,
            plain=task in _PLAIN,
            middle=True,
        )

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return each task's mean, their mean, and for LongBench-E the means by length."""
        summary = summarize(predictions)
        means = {kind: group["score"] for kind, group in summary["kinds"].items()}
        more: dict[str, Any] = {"average": fmean(means.values())}
        text = [table(summary, "all questions"), f"average of tasks {more['average']:.4f}"]
        if self.suffix:
            groups: dict[str, list[float]] = {}
            for line in predictions:
                groups.setdefault(self._by_length[line.source], []).append(line.score)
            more["lengths"] = {name: fmean(scores) for name, scores in sorted(groups.items())}
            text += [f"{name:<6} {value:.4f}" for name, value in more["lengths"].items()]
        scores = {f"{self.name}_score": {"average": more["average"], **means}}
        return Result(summary | more, scores, "\n".join(text))


def _group(record: Mapping[str, Any]) -> str:
    """Return the group of LongBench-E that a record's length, in words, belongs to."""
    length = record.get("length")
    words = length if isinstance(length, int) else _LENGTHS[-1][0]
    return next((name for most, name in _LENGTHS if words < most), "8k+")


def _of_first_line(metric: Metric, *, prediction: str, answers: Sequence[str]) -> float:
    return metric(prediction=prediction.lstrip("\n").split("\n")[0], answers=answers)


def classification(classes: Sequence[str], *, prediction: str, answers: Sequence[str]) -> float:
    """Return 1 / classes that the prediction names if the answer is one of them, else 0.

    A class that is a part of the answer and not the whole of it is no rival.
    """
    best = 0.0
    for answer in answers:
        named = [name for name in classes if name in prediction]
        # The script takes names out of the list that it goes through, and so passes over some.
        for name in named:
            if name in answer and name != answer:
                named.remove(name)
        best = max(best, 1 / len(named) if answer in named else 0.0)
    return best


def numbered(pattern: str, *, prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the prediction's whole numbers that are the answer's.

    pattern: finds the answer's number, its only group.
    """
    numbers = re.findall(r"\d+", prediction)
    best = 0.0
    for answer in answers:
        right = re.findall(pattern, answer)
        best = max(best, numbers.count(right[0]) / len(numbers) if numbers and right else 0.0)
    return best


def code_similarity(*, prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity of the prediction's first line of code and the best answer.

    The first line without a back tick, `#` and `//` counts. Similarity is that of `difflib`, in
    whole hundredths, as `fuzz.ratio` has it without its C part.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    if not code:
        return 0.0
    ratios = (SequenceMatcher(None, code, answer).ratio() for answer in answers)
    return max((round(100 * ratio) / 100 for ratio in ratios), default=0.0)


def _f1(*, prediction: str, answers: Sequence[str]) -> float:
    return squad_f1(prediction=prediction, answers=answers)


_WHOLE = partial(numbered, r"^(.*)$")
METRICS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), _f1),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), _f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), longbench_rouge),
    **dict.fromkeys(("trec", "lsht"), classification),
    "passage_retrieval_en": partial(numbered, r"Paragraph (\d+)"),
    "passage_retrieval_zh": partial(numbered, r"段落(\d+)"),
    "passage_count": _WHOLE,
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
"""Task -> its metric, as LongBench's eval.py has it."""
