"""RewardBench and RewardBench 2: does a reward model score the right answers highest?

RewardBench (arXiv:2403.13787) has pairs in 23 subsets, RewardBench 2 (arXiv:2506.01937) one right
and three wrong answers, and questions with several right ones (Ties). Subsets, weights and scores
are those of the public code (github.com/allenai/reward-bench).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from nvmm.data.prepare.json_records import read_records
from nvmm.data.prepare.tables import parquet_rows
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import Turn
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.evaluation.benchmark import (
    Benchmark,
    Prediction,
    Questions,
    Result,
    Settings,
    Skipped,
    counted,
    refuse_settings,
)
from nvmm.evaluation.rewardbench_scores import (
    CATEGORIES,
    PRIOR_SETS,
    Item,
    Scored,
    accuracies,
    best,
    ties,
)

if TYPE_CHECKING:
    from nvmm.batch import Sample
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored


@dataclass(frozen=True)
class Line(Prediction):
    """A question's line of predictions.jsonl. Its answer is the one that scores highest, a wrong
    one where several do.

    scores: of all its answers, the right ones first.
    """

    scores: list[float]


@dataclass(frozen=True)
class _RewardBench(Benchmark):
    """What both benchmarks share; a subclass has `name` and `_summary`."""

    path: str
    weights: Sequence[float] | None = None
    name: str = ""
    builder: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Score all answers; ranks share the questions, and what is scored is kept.

        A question with a text that is too long is left out and counted, and too many of them end
        the evaluation.
        """
        refuse_settings(settings, keep=("batch_size", "seed", "num_samples", "max_bad_fraction"))
        scored = _Scoring(
            name=self.name, shards=self.path, metric=is_right, builder=self.builder, bench=self
        )
        return scored.run(model, settings, journal)

    def _items(self) -> list[Item]:
        try:
            items = read(self.path)
        except OSError as error:
            raise ValueError(f"benchmark.path={self.path} cannot be read ({error})") from error
        if not items:
            raise ValueError(f"benchmark.path={self.path} has no questions")
        return items

    def _summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        raise NotImplementedError


@dataclass(frozen=True)
class RewardBench(_RewardBench):
    """Pairs of answers: the share whose chosen one scores strictly higher.

    Args:
        path: RewardBench's rows as a .jsonl or .parquet file: prompt, chosen, rejected, subset.
        weights: of the model's outputs, whose sum is compared; null: 1 of a single output, and
            those of Nemotron-4-340B-Reward's card of nine.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    name: str = "rewardbench"

    def _items(self) -> list[Item]:
        items = super()._items()
        known = {*PRIOR_SETS, *(subset for group in CATEGORIES.values() for subset in group)}
        for item in items:
            if item.subset not in known:
                allowed = ", ".join(sorted(known))
                raise ValueError(f"{item.source}: subset {item.subset!r} is none of {allowed}")
            if len(item.chosen) != 1 or len(item.rejected) != 1:
                raise ValueError(f"{item.source} must have one chosen and one rejected answer")
        return items

    def _summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Return accuracies: "overall", of each category, then of each subset."""
        right = defaultdict(list)
        for each in scored:
            right[each.item.subset].append(each.right[0] > each.wrong[0])
        return accuracies({subset: fmean(values) for subset, values in right.items()})


@dataclass(frozen=True)
class RewardBench2(_RewardBench):
    """The best of several answers, and ties.

    Args:
        path: RewardBench 2's rows as a .jsonl or .parquet file: prompt, chosen and rejected (lists
            of answers), subset, id.
        weights, name, builder: see RewardBench.
    """

    name: str = "rewardbench2"

    def _items(self) -> list[Item]:
        items = super()._items()
        for item in items:
            if len(item.chosen) != 1 and not _is_ties(item.subset):
                raise ValueError(
                    f"{item.source} has {len(item.chosen)} chosen answers; only those of the subset"
                    " Ties have several"
                )
        return items

    def _summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Return "overall", the plain mean over subsets, and the score of each subset."""
        subsets = defaultdict(list)
        for each in scored:
            subsets[each.item.subset].append(each)
        scores = {
            subset: ties(group) if _is_ties(subset) else fmean(map(best, group))
            for subset, group in sorted(subsets.items())
        }
        return {"overall": fmean(scores.values()), **scores}


@dataclass(frozen=True)
class _Items:
    """The questions of a file."""

    items: list[Item]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> list[Any]:
        """What tells these questions from others."""
        content = json.dumps([asdict(item) for item in self.items])
        return [len(self.items), hashlib.sha256(content.encode()).hexdigest()]


def _is_ties(subset: str) -> bool:
    return subset.lower() == "ties"


def is_right(*, prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the answer that scores highest is a right one."""
    return float(prediction in answers)


@dataclass(frozen=True)
class _Scoring(Questions):
    """The questions of a benchmark; a line has the scores of its answers."""

    bench: _RewardBench | None = None

    line: ClassVar[type[Prediction]] = Line

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.path={self.shards}"

    def data(self, model: Restored) -> _Items:
        """Return the rows; ValueError for a checkpoint that is no reward model of conversations."""
        if not isinstance(model.builder, InstructBuilder):
            raise ValueError(
                f"{model.path} scores no conversations: its data.train.build is"
                f" {type(model.builder).__name__}"
            )
        assert self.bench is not None
        return _Items(self.bench._items())

    def _answer(
        self, model: Restored, dataset: Any, numbers: Sequence[int], settings: Settings
    ) -> list[Prediction | Skipped]:
        """Score the answers of a batch of questions.

        Raises ValueError for a score that is not finite: it would win or lose by chance.
        """
        from nvmm.inference.scoring import scalars

        assert self.bench is not None
        lines: dict[int, Prediction | Skipped] = {}
        samples: dict[int, list[Sample]] = {}
        for number in numbers:
            try:
                samples[number] = _conversations(model, dataset.items[number])
            except BadSample as error:
                lines[number] = Skipped(number, dataset.items[number].source, True, str(error))
        texts = [sample for some in samples.values() for sample in some]
        values: list[float] = []
        for scores in model.rewards(texts, settings.batch_size):
            values += scalars(scores, self.bench.weights, "benchmark.weights").tolist()
        found = iter(values)
        for number, some in samples.items():
            each = [next(found) for _ in some]
            lines[number] = self._line(number, dataset.items[number], each)
        return [lines[number] for number in numbers]

    def _line(self, number: int, item: Item, scores: list[float]) -> Line:
        """Return the line of a question; ValueError for a score that is not finite."""
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"{item.source} has a score that is not finite: {scores}")
        answers = [*item.chosen, *item.rejected]
        highest = answers[max(reversed(range(len(scores))), key=scores.__getitem__)]
        return Line(
            sample_id=number,
            source=item.source,
            kind=item.subset,
            question=next((t.text for t in reversed(item.prompt) if t.role == "user"), ""),
            answers=item.chosen,
            prediction=highest,
            score=self.score(highest, item.chosen, item.subset),
            scores=scores,
        )

    def result(
        self,
        model: Restored,
        dataset: Any,
        predictions: list[Prediction],
        skipped: list[Skipped],
        settings: Settings,
    ) -> Result:
        """Return the benchmark's scores."""
        assert self.bench is not None
        scored = [_scored(dataset.items[line.sample_id], line) for line in predictions]
        scores = self.bench._summary(scored)
        text = "\n".join(f"{name:<28} {value:8.4f}" for name, value in scores.items())
        if skipped:
            text += f"\nleft out: {len(skipped)} questions that cannot be scored (skipped.jsonl)"
        counts = {"num_samples": len(scored)} | counted(skipped)
        del counts["num_without_answer"]
        return Result(counts | scores, {f"{self.name}_rewards": scores}, text)


def _conversations(model: Restored, item: Item) -> list[Sample]:
    """Return the question with each answer as a text; BadSample where one is too long."""
    builder = model.builder
    assert isinstance(builder, InstructBuilder), "checked with the data"
    samples = [builder.conversation(turns, item.source) for turns in item.conversations]
    longest = max(sample.num_tokens for sample in samples)
    if longest > model.max_sequence_length:
        limit = f"max_sequence_length={model.max_sequence_length}"
        raise BadSample(item.source, f"{longest} tokens, and the model's {limit}")
    return samples


def _scored(item: Item, line: Prediction) -> Scored:
    """Return a question with the scores of its line; ValueError where that was edited."""
    assert isinstance(line, Line)
    count, scores = len(item.chosen), line.scores
    numbers = isinstance(scores, list) and all(isinstance(x, int | float) for x in scores)
    if (
        not numbers
        or len(scores) != count + len(item.rejected)
        or not all(map(math.isfinite, scores))
    ):
        raise ValueError(
            f"predictions.jsonl: the line of question {line.sample_id} is damaged; remove the"
            " folder to begin anew, or name another with output=DIR"
        )
    return Scored(item, scores[:count], scores[count:])


def read(path: str) -> list[Item]:
    """Read the rows of a .jsonl, .json or .parquet file.

    A prompt is a text, or a list of messages. Raises ValueError naming the row that is none.
    """
    file = Path(path).expanduser()
    rows = list(parquet_rows([file])) if file.suffix == ".parquet" else read_records(file)
    return [_item(row, f"{path}: row {number}") for number, row in enumerate(rows)]


def _item(row: Mapping[str, Any], source: str) -> Item:
    source = f"{source} (id {row.get('id')})"
    prompt, answers = row.get("prompt"), {}
    for key in ("chosen", "rejected"):
        value = row.get(key)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(map(_is_text, listed)):
            raise ValueError(f"{source}: {key} must be an answer, or a list of answers")
        answers[key] = listed
    if isinstance(prompt, str):
        turns = [Turn("user", prompt)]
    elif isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        turns = [Turn(message["role"], message["content"], trained=False) for message in prompt]
    else:
        raise ValueError(f"{source}: prompt must be a text, or a list of messages")
    if not isinstance(row.get("subset"), str):
        raise ValueError(f"{source} has no subset")
    return Item(source, str(row.get("id")), row["subset"], turns, **answers)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_text(value.get(k)) for k in ("role", "content"))
