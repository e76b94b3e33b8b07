"""InfiniteBench: its files, prompts and metrics.

Zhang et al. 2024, "InfiniteBench" (arXiv:2402.13718), and its scripts. ChatQA 2 reports four tasks:
longbook_sum_eng, longbook_qa_eng, longbook_choice_eng and longdialogue_qa_eng.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nvmm.evaluation.benchmark import Prediction, Result, summarize, table
from nvmm.evaluation.items import Item, Items, Listed, TextBenchmark, task_records
from nvmm.evaluation.rouge import rouge
from nvmm.evaluation.squad import squad_f1

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

_LETTERS = "ABCD"
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
_ALL_MARKS = {ord(mark): None for mark in string.punctuation + _CHINESE}


@dataclass(frozen=True)
class InfiniteBench(TextBenchmark):
    """Tasks of InfiniteBench; the score is the mean of each task and over tasks.

    Args:
        folder: where TASK.jsonl are, with id, context, input, answer, options.
        prompts: task -> its prompt: {context} and {input}; {question} (the same as {input});
            {OPTION_A} ... {OPTION_D}; {prefix} of math_find; {func} and {func_call} of code_run.
        max_new_tokens: task -> tokens of its longest answer.
        only: names of the tasks to ask; None: all of `prompts`.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    folder: str
    prompts: Mapping[str, str]
    max_new_tokens: Mapping[str, int]
    only: Sequence[str] | None = None
    name: str = "infinitebench"
    builder: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.folder={self.folder}"

    def items(self, model: Restored) -> Items:
        """Return the questions of all tasks that are asked."""
        records = task_records(self.folder, self.only, self.prompts, self.max_new_tokens, METRICS)
        return Listed(records, self._item)

    def _item(self, source: str, task: str, record: Mapping[str, Any]) -> Item:
        label = _label(record, source, task)
        text = _filled(self.prompts[task], _values(record, source, task), source)
        metric = partial(METRICS[task], label)
        answers = [str(part) for part in label] if isinstance(label, list) else [str(label)]
        return Item(
            source,
            str(record.get("id", source)),
            task,
            answers,
            _scored(metric),
            self.max_new_tokens[task],
            text=text,
            middle=True,
        )

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return each task's mean, and their mean."""
        summary = summarize(predictions)
        means = {kind: group["score"] for kind, group in summary["kinds"].items()}
        average = fmean(means.values())
        text = f"{table(summary, 'all questions')}\naverage of tasks {average:.4f}"
        scores = {f"{self.name}_score": {"average": average, **means}}
        return Result(summary | {"average": average}, scores, text)


def _label(record: Mapping[str, Any], source: str, name: str) -> Any:
    """Return the accepted answer as the scripts have it, with its letter if there are options."""
    answer = record.get("answer")
    if answer is None or answer == []:
        raise ValueError(f"{source} has no answer")
    if name in ("longbook_choice_eng", "code_debug"):
        values = [answer] if isinstance(answer, str) else answer
        options = record.get("options")
        if not isinstance(options, list) or len(options) != len(_LETTERS):
            raise ValueError(f"{source}: options must be four, got {options!r}")
        if len(values) == 2 and values[1] in _LETTERS:
            return list(values)
        if len(values) != 1 or values[0] not in options:
            raise ValueError(f"{source}: the answer {answer!r} is none of its options")
        return [values[0], _LETTERS[options.index(values[0])]]
    if name in ("longbook_qa_eng", "longbook_qa_chn", "longdialogue_qa_eng", "longbook_sum_eng"):
        return answer if isinstance(answer, list) else [answer]
    if name == "math_calc":
        if not isinstance(answer, list):
            raise ValueError(f"{source}: the answer must be a list of numbers, got {answer!r}")
        return answer[0] if isinstance(answer[0], list) else answer
    return answer[0] if isinstance(answer, list) else answer


def _values(record: Mapping[str, Any], source: str, name: str) -> dict[str, str]:
    """Return what a prompt may name of a record."""
    for key in ("context", "input"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{source}: {key} must be text, got {record.get(key)!r}")
    values = {"context": record["context"], "input": record["input"], "question": record["input"]}
    options = record.get("options") or []
    values |= {f"OPTION_{a}": str(o) for a, o in zip(_LETTERS, options, strict=False)}
    if name == "math_find":
        found = re.search(r"The (.+) of", record["input"])
        if found is None:
            raise ValueError(f"{source}: its input names no number: {record['input']!r}")
        values["prefix"] = f"What is the {found[1].lower()} in the following list?"
    if name == "code_run":
        call = re.search(r"(func_\d+)\(\s*-?\d+\s*\)", record["input"])
        if call is None:
            raise ValueError(f"{source}: its input calls no function: {record['input']!r}")
        values |= {"func": call[1], "func_call": call[0]}
    return values


def _filled(prompt: str, values: Mapping[str, str], source: str) -> str:
    """Return a prompt with its names filled in; text that is filled in may have braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{source}: benchmark.prompts names {match[0]}, which it has not")
        return values[match[1]]

    return re.sub(r"\{(\w+)\}", value, prompt)


def _scored(metric: Callable[[str], float]) -> Any:
    """Return a metric of the prediction alone as one of prediction and answers."""

    def score(*, prediction: str, answers: Sequence[str]) -> float:
        return float(metric(prediction))

    return score


def _words(text: str, marks: str) -> list[str]:
    return text.translate({ord(mark): " " for mark in marks}).split()


def first_number(label: Any, prediction: str) -> float:
    """Passkey and number string: the first run of digits is the label."""
    found = re.search(r"[0-9]+", prediction)
    return float((found[0] if found else "") == str(label))


def named(label: Any, prediction: str) -> float:
    """Retrieval of a value: it is one of the words."""
    return float(str(label) in _words(prediction, "\n:\"'.,?!{}"))


def last_number(label: Any, prediction: str) -> float:
    """A function's value: the last word is the label, a whole number."""
    words = _words(prediction.strip(), "\n.`'\":")
    return float(
        bool(words)
        and re.fullmatch(r"[+-]?\d+", words[-1]) is not None
        and int(words[-1]) == int(label)
    )


def debugged(label: Sequence[str], prediction: str) -> float:
    """The function with an error: its letter first, or letter or name behind "answer is:"."""
    name, letter = label
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    leads = ("answer is:", "is:", "answer:", "correct option is:")
    return float(_behind(re.sub(" +", " ", text), leads, [letter, name]) or 0)


def chosen(label: Sequence[str], prediction: str) -> float:
    """The right choice: a letter first, or behind "answer is", or else the first one at all."""
    said = prediction.strip()
    if not said:
        return 0.0
    if said[0] in _LETTERS or said in label:
        return float(said in label or said[0] in label)
    text = said.translate({ord(mark): " " for mark in "\n\"'.,?!{}"})
    text = re.sub(" +", " ", text)
    leads = ("answer is:", "answer:", "answer is", "option is")
    found = _behind(text, leads, label)
    if found is not None:
        return float(found)
    word = next((word for word in text.split() if word in _LETTERS), None)
    return float(word is not None and word in label)


def _behind(text: str, leads: Sequence[str], accepted: Sequence[str]) -> bool | None:
    """Return whether an accepted text stands behind the first lead, None where there is no lead."""
    for lead in leads:
        place = text.find(lead)
        if place >= 0:
            rest = text[place + len(lead) + 1 :]
            return bool(rest) and any(rest.startswith(answer) for answer in accepted)
    return None


def character(label: Sequence[str], prediction: str) -> float:
    """The character of a dialogue: the first accepted name is one of the words, in capitals."""
    words = _words(prediction, "\n:\"'.,?!{}")
    return float(label[0] in [word.upper() for word in words])


def summarised(label: Sequence[str], prediction: str) -> float:
    """A book's summary: rougeLsum by `rouge-score`."""
    return rouge("rougeLsum", prediction=prediction, answers=label)


def answered(label: Sequence[str], prediction: str) -> float:
    """A question on an English book: F1."""
    return squad_f1(prediction=prediction, answers=label)


def answered_in_chinese(label: Sequence[str], prediction: str) -> float:
    """A question on a Chinese book: F1 of characters without marks and white space."""

    def characters(text: str) -> str:
        return "".join(text.lower().translate(_ALL_MARKS).split())

    guess, best = characters(prediction), 0.0
    for answer in map(characters, label):
        common = sum((Counter(guess) & Counter(answer)).values())
        best = max(best, 2 * common / (len(guess) + len(answer)) if common else 0.0)
    return best


def found_number(label: Any, prediction: str) -> float:
    """A number of a list: the first whole or decimal number is the label."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None or (isinstance(label, int) and "." in found[0]):
        return 0.0
    return float(float(found[0]) == float(label))


def calculated(label: Sequence[int], prediction: str) -> float:
    """Intermediate results: the share that is right before the first wrong one."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", prediction)]
    right = 0
    for number, expected in zip(numbers, label, strict=False):
        if number != expected:
            break
        right += 1
    return right / len(label)


METRICS: dict[str, Callable[[Any, str], float]] = {
    "passkey": first_number,
    "number_string": first_number,
    "kv_retrieval": named,
    "longbook_sum_eng": summarised,
    "longbook_qa_eng": answered,
    "longbook_choice_eng": chosen,
    "longbook_qa_chn": answered_in_chinese,
    "longdialogue_qa_eng": character,
    "math_find": found_number,
    "math_calc": calculated,
    "code_run": last_number,
    "code_debug": debugged,
}
"""Task -> its metric of (label, prediction), as InfiniteBench's compute_scores.py has it."""
