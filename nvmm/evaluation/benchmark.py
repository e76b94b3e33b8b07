"""Benchmarks ask a model questions and score its answers."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nvmm.config.choices import require
from nvmm.config.nested import merged
from nvmm.evaluation.corpus import FAULTS, all_answers, of_all, prepared
from nvmm.evaluation.images import MAX_IMAGES, image_fields, sound_fields
from nvmm.evaluation.option_accuracy import likeliest, option_tokens
from nvmm.io.progress import progress

if TYPE_CHECKING:
    from nvmm.batch import Sample
    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.record import Record
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

log = logging.getLogger(__name__)
_NAMED = 20
"""The number of questions without a score that metrics.json names; skipped.jsonl has all."""

Choose = Literal["text", "likelihood"]
Encode = Callable[[Sequence[str], str | None, int], Tensor]
"""A function from (texts, instruction or None, QUERY or POSITIVE) to vectors [texts, h]."""


def finite(vectors: Tensor, what: str) -> Tensor:
    """Return vectors [n, h]; raise ValueError where one has a value that is not finite."""
    broken = int((~torch.isfinite(vectors)).any(1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(vectors)} vectors of {what} are not finite")
    return vectors


class Metric(Protocol):
    """A score of one prediction against the accepted answers, in [0, 1] but for CIDEr-D's 10.

    One with a method `prepared` is of a corpus: it gets the answers to all questions of the data,
    asked or not, and returns the metric that scores a prediction. One with `among` is of closed
    questions: it gets a question's options and answers, and returns the metric of that question.
    """

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float: ...


@dataclass(frozen=True)
class Example:
    """One question, ready for the model.

    prompt: the sample up to where the answer begins. question: its last turn, without images.
    answers: the accepted ones, at least one. kind: the group it is reported under.
    metric, max_new_tokens: this question's own; None: the benchmark's. options: the labels of a
    closed question.
    """

    prompt: Sample
    question: str
    answers: list[str]
    kind: str
    metric: Metric | None = None
    max_new_tokens: int | None = None
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Prediction:
    """One answer and its score."""

    sample_id: int
    source: str
    kind: str
    question: str
    answers: list[str]
    prediction: str
    score: float


@dataclass(frozen=True)
class Skipped:
    """A question that has no score. bad: it cannot be asked; else it has no accepted answer."""

    sample_id: int
    source: str
    bad: bool
    reason: str


@dataclass(frozen=True)
class Settings:
    """Options of running a benchmark; a benchmark refuses those that it has no use for.

    batch_size: samples of a forward pass. num_samples: ask so many, the first ones; None: all.
    max_new_tokens: replaces the benchmark's. temperature, top_p, use_cache, seed: options of
    generation. max_bad_fraction: the evaluation is refused when more of its questions cannot be
    asked; one may always be bad, unless this is 0.
    """

    batch_size: int = 8
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    use_cache: bool = True
    seed: int = 1234
    max_bad_fraction: float = 0.01


@dataclass(frozen=True)
class Result:
    """The result of a benchmark, the same on every rank.

    summary: content of metrics.json. scores: key of a run's summary.json -> value. text: the result
    for a person to read. images: returns the lines of images.jsonl; called on one rank.
    """

    summary: dict[str, Any]
    scores: dict[str, Any]
    text: str
    images: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())


def refuse_settings(settings: Settings, keep: Sequence[str]) -> None:
    """Raise ValueError for settings of another value than their default, but those in `keep`."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.name not in keep and value != setting.default:
            raise ValueError(f"{setting.name}={value} does nothing in this benchmark: leave it out")


class Benchmark(ABC):
    """A choice of `benchmark=`: `run` asks a restored model and scores its answers.

    name: name of the output folder. builder: parameters of the checkpoint's sample builder to
    change.
    """

    name: str
    builder: Mapping[str, Any]

    @property
    def changes(self) -> Mapping[str, Any]:
        """The parameters of the checkpoint's sample builder that are changed."""
        return self.builder

    @abstractmethod
    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Run on all ranks together; raise ValueError for settings that it has no use for.

        journal: keeps what is known so far, for an evaluation that is killed and goes on.
        """


@dataclass(frozen=True)
class Questions(Benchmark):
    """Questions in shards, each with accepted answers, read as the checkpoint's training data are.

    The form and the fields of the checkpoint's sample builder read questions and answers. A sample
    that cannot be read or asked, and one without an accepted answer, has no score: it is counted
    and named. Too many of the first kind end the evaluation, and so does a lack of scores.

    Args:
        name: name of the output directory.
        shards: file patterns of tar shards.
        metric: score of one answer; the benchmark's score is the mean over its questions.
        metric_by_kind: another metric for questions of some kinds.
        suffix: text put on a line of its own behind every question.
        question, answers: names of these fields in the records, where they have others than
            training's (`builder.fields`).
        kind: field of the record; a sample without it is reported under "all" alone.
        options: labels of all questions, for a metric that is `among` options; None: each record's.
        choose: how a closed question is answered: text: by generation, of which the metric finds
            the option; likelihood: by the option of the greatest log-probability.
        also: more metrics by name, whose values over all answers stand in metrics.json.
        max_new_tokens: tokens of the longest answer.
        builder: parameters of the checkpoint's sample builder to change, e.g. `max_tiles: 12` or
            `template: {system: ...}`.
    """

    name: str
    shards: str | Sequence[str]
    metric: Metric
    metric_by_kind: Mapping[str, Metric] = field(default_factory=dict)
    suffix: str = ""
    question: str = "question"
    answers: str = "answers"
    kind: str = "kind"
    options: Sequence[str] | None = None
    choose: Choose = "text"
    also: Mapping[str, Metric] = field(default_factory=dict)
    max_new_tokens: int = 32
    builder: Mapping[str, Any] = field(default_factory=dict)

    line: ClassVar[type[Prediction]] = Prediction
    """What a line of predictions.jsonl holds."""

    def __post_init__(self) -> None:
        require("benchmark.choose", self.choose, Choose)
        if not self.closed and (self.options is not None or self.choose != "text"):
            raise ValueError(
                f"benchmark.options and choose={self.choose} do nothing with benchmark.metric="
                f"{self.metric_name}, which is not of closed questions"
            )
        if self.closed and self.metric_by_kind:
            raise ValueError(
                f"benchmark.metric_by_kind does nothing with benchmark.metric={self.metric_name},"
                " which is of closed questions"
            )

    @property
    def closed(self) -> bool:
        """Whether the answers are among options."""
        return hasattr(self.metric, "among")

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.shards={self.shards}"

    @property
    def metric_name(self) -> str:
        """The name of the metric's function."""
        metric: Any = self.metric
        function = getattr(metric, "func", metric)
        return str(getattr(function, "__name__", type(function).__name__))

    @property
    def changes(self) -> Mapping[str, Any]:
        """The parameters of the checkpoint's sample builder that are changed."""
        named = {"question": self.question, "answers": self.answers}
        fields = {ours: theirs for ours, theirs in named.items() if theirs != ours}
        return merged({"fields": fields}, self.builder) if fields else self.builder

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Answer the questions and score the answers; ranks share the questions."""
        from megatron.core import parallel_state

        from nvmm.inference.decoding import share

        dataset = self.data(model)
        total = len(dataset)
        if settings.num_samples is not None:
            total = min(total, settings.num_samples)
        if self.choose == "likelihood":
            refuse_settings(settings, ("batch_size", "num_samples", "max_bad_fraction"))
        if any(hasattr(metric, "prepared") for metric in (self.metric, *self.also.values())):
            answers = all_answers(dataset, model.builder)
            also = {name: prepared(metric, answers) for name, metric in self.also.items()}
            whole = replace(self, metric=prepared(self.metric, answers), also=also)
            return whole.run(model, settings, journal)
        # 1. Take the answers that an evaluation before this one has written.
        predictions, skipped = _known(journal, dataset, self.line)
        known = {*(line.sample_id for line in predictions), *(line.sample_id for line in skipped)}
        predictions = [line for line in predictions if line.sample_id < total]
        skipped = [line for line in skipped if line.sample_id < total]
        numbers = [number for number in range(total) if number not in known]
        # 2. Answer the others, a batch on every data-parallel rank, and write each step's lines.
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        first = torch.distributed.get_rank() == 0
        step = settings.batch_size * size
        self._check(predictions, skipped, total, settings, finished=False)
        with progress(len(numbers), self.name, "question", disable=not first) as bar:
            for start in range(0, len(numbers), step):
                some = numbers[start : start + step]
                local = [some[i] for i in share(len(some), rank, size)]
                new = _gathered(self._answer(model, dataset, local, settings))
                answered = [line for line in new if isinstance(line, Prediction)]
                left_out = [line for line in new if isinstance(line, Skipped)]
                if first:
                    journal.append(list(map(asdict, answered)), list(map(asdict, left_out)))
                    for line in left_out:
                        log.warning(f"{line.reason} (question {line.sample_id} has no score)")
                predictions += answered
                skipped += left_out
                self._check(predictions, skipped, total, settings, finished=False)
                bar.update(len(some))
        # 3. Score them, if there is something to score.
        self._check(predictions, skipped, total, settings, finished=True)
        return self.result(model, dataset, predictions, skipped, settings)

    def data(self, model: Restored) -> Any:
        """Return the questions: a length, `members(number)`, and a `fingerprint` of them all."""
        from nvmm.data.shards.dataset import Dataset

        return Dataset(self.shards, model.builder)

    def result(
        self,
        model: Restored,
        dataset: Any,
        predictions: list[Prediction],
        skipped: list[Skipped],
        settings: Settings,
    ) -> Result:
        """Return the scores of all answers, at least one."""
        first = torch.distributed.get_rank() == 0
        summary = summarize(predictions) | counted(skipped)
        kinds = {kind: group["score"] for kind, group in summary["kinds"].items()}
        unheard = [kind for kind in self.metric_by_kind if kind not in kinds]
        if first and settings.num_samples is None and unheard:
            log.warning(
                f"no question is of the kind {', '.join(unheard)} of benchmark.metric_by_kind: are"
                f" kinds in the field benchmark.kind={self.kind}? There are {', '.join(kinds)}"
            )
        scores = {f"{self.name}_{self.metric_name}": {"overall": summary["score"], **kinds}}
        if self.also:
            pairs = [(line.prediction, line.answers) for line in predictions]
            more = {name: of_all(metric, pairs) for name, metric in self.also.items()}
            summary["also"] = more
            scores |= {f"{self.name}_{name}": {"overall": value} for name, value in more.items()}
        return Result(
            summary,
            scores,
            table(summary, self.name),
            lambda: _images(model, dataset, predictions),
        )

    def _check(
        self,
        predictions: Sequence[Prediction],
        skipped: Sequence[Skipped],
        total: int,
        settings: Settings,
        *,
        finished: bool,
    ) -> None:
        """Raise ValueError where too many questions are bad, or in the end none has a score."""
        bad = [line for line in skipped if line.bad]
        limit = settings.max_bad_fraction
        if len(bad) > (max(1.0, limit * total) if limit else 0):
            raise ValueError(
                f"{len(bad)} of {total} questions of {self.where} are bad, more"
                f" than max_bad_fraction={limit}; the first: {bad[0].reason}"
            )
        if finished and not predictions:
            first = f"; the first: {skipped[0].reason}" if skipped else ""
            raise ValueError(
                f"no question of {self.where} has a score: {len(bad)} are bad,"
                f" {len(skipped) - len(bad)} have no accepted answer{first}"
            )

    def _answer(
        self, model: Restored, dataset: Any, numbers: Sequence[int], settings: Settings
    ) -> list[Prediction | Skipped]:
        """Answer a batch of questions and score the answers."""
        lines: dict[int, Prediction | Skipped] = {}
        examples: dict[int, Example] = {}
        limits: dict[int, list[int]] = {}
        for number in numbers:
            source = f"question {number}"
            try:
                members = dataset.members(number)
                source = f"{members['__url__']}:{members['__key__']}"
                example = self.ask(members, model.builder)
            except FAULTS as error:
                reason = str(error)
                if not isinstance(error, ValueError):
                    reason = f"{source}: {type(error).__name__}: {error}"
                lines[number] = Skipped(number, source, True, reason)
                continue
            new_tokens = self._new_tokens(example, settings, model.builder)
            needed = example.prompt.num_tokens + new_tokens
            if needed > model.max_sequence_length:
                reason = (
                    f"{source}: prompt and answer may have {needed} tokens, more than the model's"
                    f" max_sequence_length={model.max_sequence_length}"
                )
                lines[number] = Skipped(number, source, True, reason)
            elif example.answers:
                prompt = replace(example.prompt, sample_id=number)
                examples[number] = replace(example, prompt=prompt)
                limits.setdefault(new_tokens, []).append(number)
            else:
                reason = f"{source}: it has no accepted answer"
                lines[number] = Skipped(number, source, False, reason)
        for new_tokens, some in limits.items():
            texts = self._texts(model, [examples[number] for number in some], new_tokens, settings)
            for number, text in zip(some, texts, strict=True):
                example = examples[number]
                lines[number] = Prediction(
                    sample_id=number,
                    source=example.prompt.source,
                    kind=example.kind,
                    question=example.question,
                    answers=example.answers,
                    prediction=text,
                    score=self.score(text, example.answers, example.kind, example.metric),
                )
        return [lines[number] for number in numbers]

    def _texts(
        self, model: Restored, examples: Sequence[Example], new_tokens: int, settings: Settings
    ) -> list[str]:
        """Return the answers to questions."""
        if self.choose == "likelihood":
            return likeliest(model, [(example.prompt, example.options) for example in examples])
        return model.generate(
            [example.prompt for example in examples],
            new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            use_cache=settings.use_cache,
        )

    def _new_tokens(self, example: Example, settings: Settings, builder: Builder) -> int:
        """Return the tokens of the longest answer to a question."""
        if self.choose == "likelihood":
            return max(len(option_tokens(builder, option)) for option in example.options)
        own = self.max_new_tokens if example.max_new_tokens is None else example.max_new_tokens
        return own if settings.max_new_tokens is None else settings.max_new_tokens

    def ask(self, members: Mapping[str, Any], builder: Builder) -> Example:
        """Return the question in one sample's members, as `builder` reads it.

        Raises ValueError, naming the sample, where there is none.
        """
        record = builder.record(members)
        kind = record.get(self.kind)
        if not isinstance(kind, str | int | float | None):
            raise record.bad(f"{self.kind} must be text, got {kind!r}")
        answers = builder.references(members)
        options, metric = self._among(record, members, builder, answers)
        return Example(
            builder.prompt(members, suffix=f"\n{self.suffix}")
            if self.suffix
            else builder.prompt(members),
            builder.question(members),
            answers,
            "all" if kind is None else str(kind),
            metric,
            options=options,
        )

    def _among(
        self,
        record: Record,
        members: Mapping[str, Any],
        builder: Builder,
        answers: Sequence[str],
    ) -> tuple[Sequence[str], Metric | None]:
        """Return the options and the metric of a closed question; none of an open one."""
        if not self.closed:
            return (), None
        options = builder.options(members) if self.options is None else self.options
        if not options:
            raise record.bad("it has no options; give benchmark.options=[...]")
        metric: Any = self.metric
        try:
            return options, metric.among(options, answers)
        except ValueError as error:
            raise record.bad(str(error)) from error

    def score(
        self, prediction: str, answers: Sequence[str], kind: str, own: Metric | None = None
    ) -> float:
        """Return the score of one answer under the metric of its kind, or the question's own.

        Raises ValueError without accepted answers, as such a question has no score, and for a score
        that is no finite number.
        """
        if not answers:
            raise ValueError("a question without an accepted answer has no score")
        metric = own or self.metric_by_kind.get(kind, self.metric)
        score = float(metric(prediction=prediction, answers=answers))
        if not math.isfinite(score):
            raise ValueError(f"benchmark.metric gives {score} for {prediction!r} and {answers}")
        return score


def _known(
    journal: Journal, dataset: Any, kind: type[Prediction]
) -> tuple[list[Prediction], list[Skipped]]:
    """Return what the journal has already, predictions as `kind`; the same on every rank."""
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            lines, left_out = journal.start(dataset.fingerprint)
            known = [kind(**line) for line in lines], [Skipped(**line) for line in left_out]
            _check_known(journal, *known)
            found = [known]
        except (ValueError, TypeError, OSError) as error:
            found = [str(error)]
    # A refusal must reach every rank, or the others would wait for ever.
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    predictions, skipped = found[0]
    return predictions, skipped


def _check_known(
    journal: Journal, predictions: Sequence[Prediction], skipped: Sequence[Skipped]
) -> None:
    """Raise ValueError for lines that were edited: without a number, or of a question twice."""
    seen: set[int] = set()
    lines: list[Prediction | Skipped] = [*predictions, *skipped]
    for line in lines:
        score = getattr(line, "score", 0.0)
        plain = type(line.sample_id) is int and isinstance(score, int | float)
        if not plain or not math.isfinite(score) or line.sample_id in seen:
            raise ValueError(
                f"{journal.folder}: the line of question {line.sample_id!r} is damaged, or not the"
                " only one; remove the folder to begin anew, or name another with output=DIR"
            )
        seen.add(line.sample_id)


def _gathered(local: Sequence[Prediction | Skipped]) -> list[Prediction | Skipped]:
    """Return the lines of all data-parallel ranks, in the order of the questions."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    shares: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(shares, list(local), group=group)
    return sorted((line for lines in shares for line in lines), key=lambda line: line.sample_id)


def _images(
    model: Restored, dataset: Any, predictions: Sequence[Prediction]
) -> Iterator[dict[str, Any]]:
    """Yield the images and sounds of the first few predictions, for the report."""
    for prediction in predictions[:MAX_IMAGES]:
        members = dataset.members(prediction.sample_id)
        media = model.builder.prompt(members).text.media
        drawn = image_fields(model.builder.record(members), media)
        drawn |= sound_fields(model.builder, members)
        if drawn:
            yield {"sample_id": prediction.sample_id, **drawn}


def counted(skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Return how many questions have no score, and why the first few have none."""
    bad = sum(line.bad for line in skipped)
    return {
        "num_bad": bad,
        "num_without_answer": len(skipped) - bad,
        "skipped": [line.reason for line in skipped[:_NAMED]],
    }


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return mean score and number of questions, overall and for each kind, kinds sorted."""
    kinds = sorted({prediction.kind for prediction in predictions})
    return _mean(predictions) | {
        "kinds": {kind: _mean([p for p in predictions if p.kind == kind]) for kind in kinds}
    }


def table(summary: Mapping[str, Any], name: str) -> str:
    """Return the summary as text: one line for each kind, one for all, and what was left out."""
    rows = [*summary["kinds"].items(), (name, summary)]
    width = max(len(label) for label in [*(label for label, _ in rows), *summary.get("also", {})])
    lines = [
        f"{label:<{width}}  {row['score']:8.4f}  {row['num_samples']:7d}" for label, row in rows
    ]
    lines += [f"{label:<{width}}  {value:8.4f}" for label, value in summary.get("also", {}).items()]
    bad, without = summary.get("num_bad", 0), summary.get("num_without_answer", 0)
    if bad or without:
        lines.append(f"left out: {bad} bad, {without} without an accepted answer (skipped.jsonl)")
    return "\n".join(lines)


def _mean(predictions: Sequence[Prediction]) -> dict[str, Any]:
    total = sum(prediction.score for prediction in predictions)
    return {"score": total / max(1, len(predictions)), "num_samples": len(predictions)}
