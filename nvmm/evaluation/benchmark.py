"""Benchmarks ask a model questions and score its answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nvmm.evaluation.images import MAX_IMAGES, image_fields
from nvmm.io.progress import progress

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored


Encode = Callable[[Sequence[str], str | None], Tensor]
"""A function from (texts, instruction or None) to unit vectors [texts, h]."""


class Metric(Protocol):
    """A score of one prediction against the accepted answers, in [0, 1]."""

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float: ...


@dataclass(frozen=True)
class Example:
    """One question, ready for the model.

    members: the shard's sample, with the member json in the form that the sample builder of
        training reads. question: the question as in the data. kind: the group it is reported under.
    """

    members: dict[str, Any]
    question: str
    kind: str


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
class Settings:
    """Options of running a benchmark; a benchmark refuses those that it has no use for.

    batch_size: samples of a forward pass. num_samples: ask so many, the first ones; None: all.
    max_new_tokens: replaces the benchmark's. temperature, top_p, use_cache, seed: options of
    generation.
    """

    batch_size: int = 8
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    use_cache: bool = True
    seed: int = 1234


@dataclass(frozen=True)
class Result:
    """The result of a benchmark, the same on every rank.

    summary: content of metrics.json. scores: key of a run's summary.json -> value. text: the result
    for a person to read. lines: returns the lines of predictions.jsonl; called on one rank.
    """

    summary: dict[str, Any]
    scores: dict[str, Any]
    text: str
    lines: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())


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

    @abstractmethod
    def run(self, model: Restored, settings: Settings) -> Result:
        """Run on all ranks together; raise ValueError for settings that it has no use for."""


@dataclass(frozen=True)
class Questions(Benchmark):
    """Questions in shards, each with accepted answers.

    Args:
        name: name of the output directory.
        shards: file patterns of tar shards whose member json is `{"question", "answers"}` or a
            conversation that ends with the answer.
        metric: score of one answer; the benchmark's score is the mean over its questions.
        metric_by_kind: another metric for questions of some kinds.
        suffix: text put on a line of its own behind every question.
        question, answers, kind: fields of the member json; a sample without `kind` is reported
            under "all" alone.
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
    max_new_tokens: int = 32
    builder: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric_name(self) -> str:
        """The name of the metric's function."""
        metric: Any = self.metric
        return str(getattr(metric, "func", metric).__name__)

    def run(self, model: Restored, settings: Settings) -> Result:
        """Answer the questions and score the answers; ranks share the questions."""
        from megatron.core import parallel_state

        from nvmm.data.shards.dataset import Dataset
        from nvmm.inference.decoding import gather, share

        dataset = Dataset(self.shards, model.builder)
        num_samples = len(dataset)
        if settings.num_samples is not None:
            num_samples = min(num_samples, settings.num_samples)
        rank = parallel_state.get_data_parallel_rank()
        local_numbers = share(num_samples, rank, parallel_state.get_data_parallel_world_size())
        predictions: list[Prediction] = []
        first = torch.distributed.get_rank() == 0
        with progress(len(local_numbers), self.name, "question", disable=not first) as bar:
            for start in range(0, len(local_numbers), settings.batch_size):
                numbers = local_numbers[start : start + settings.batch_size]
                predictions += self._answer(model, dataset, numbers, settings)
                bar.update(len(numbers))
        predictions = gather(predictions, num_samples)
        summary = summarize(predictions)
        kinds = {kind: group["score"] for kind, group in summary["kinds"].items()}
        scores = {f"{self.name}_{self.metric_name}": {"overall": summary["score"], **kinds}}
        return Result(
            summary,
            scores,
            table(summary, self.name),
            lambda: _lines(model, dataset, predictions),
        )

    def _answer(
        self, model: Restored, dataset: Any, numbers: Sequence[int], settings: Settings
    ) -> list[Prediction]:
        """Answer a batch of questions and score the answers."""
        examples = [self.ask(dataset.members(number)) for number in numbers]
        prompts = [
            replace(model.builder.prompt(example.members), sample_id=number)
            for example, number in zip(examples, numbers, strict=True)
        ]
        texts = model.generate(
            prompts,
            settings.max_new_tokens or self.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            use_cache=settings.use_cache,
        )
        predictions = []
        for prompt, example, text in zip(prompts, examples, texts, strict=True):
            answers = model.builder.references(example.members)
            predictions.append(
                Prediction(
                    sample_id=prompt.sample_id,
                    source=prompt.source,
                    kind=example.kind,
                    question=example.question,
                    answers=answers,
                    prediction=text,
                    score=self.score(text, answers, example.kind),
                )
            )
        return predictions

    def ask(self, members: Mapping[str, Any]) -> Example:
        """Return the question in one sample's members; raise ValueError where there is none."""
        source = f"{members.get('__url__', '')}:{members.get('__key__', '')}"
        try:
            record = json.loads(members["json"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{source}: member json is missing or damaged ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{source}: member json must be an object")
        kind = str(record.get(self.kind, "all"))
        ending = f"\n{self.suffix}" if self.suffix else ""
        # A conversation asks with its last user turn; other records with a field of this name.
        turns = record.get("conversations", record.get("messages"))
        if isinstance(turns, list):
            objects = [turn for turn in turns if isinstance(turn, dict)]
            asked = [t for t in objects if t.get("from", t.get("role")) in ("human", "user")]
            if not asked:
                raise ValueError(f"{source}: the conversation has no user turn")
            text = "value" if "value" in asked[-1] else "content"
            question = str(asked[-1].get(text))
            asked[-1][text] = question + ending
        else:
            if self.question not in record:
                raise ValueError(f"{source}: member json has no field {self.question}")
            question = str(record[self.question])
            answers = record.get(self.answers, record.get("answer", []))
            answers = answers if isinstance(answers, list) else [answers]
            record = {"question": question + ending, "answers": [str(a) for a in answers]}
        return Example({**members, "json": json.dumps(record).encode()}, question, kind)

    def score(self, prediction: str, answers: Sequence[str], kind: str) -> float:
        """Return the score of one answer under the metric of its kind."""
        metric = self.metric_by_kind.get(kind, self.metric)
        return float(metric(prediction=prediction, answers=answers))


def _lines(
    model: Restored, dataset: Any, predictions: Sequence[Prediction]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of predictions.jsonl; the first few have the images that the report draws."""
    for number, prediction in enumerate(predictions):
        line = asdict(prediction)
        if number < MAX_IMAGES:
            members = dataset.members(prediction.sample_id)
            media = model.builder.prompt(members).text.media
            line |= image_fields(model.builder.record(members), media)
        yield line


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return mean score and number of questions, overall and for each kind, kinds sorted."""
    kinds = sorted({prediction.kind for prediction in predictions})
    return _mean(predictions) | {
        "kinds": {kind: _mean([p for p in predictions if p.kind == kind]) for kind in kinds}
    }


def table(summary: Mapping[str, Any], name: str) -> str:
    """Return the summary as text: one line for each kind, then one for all."""
    rows = [*summary["kinds"].items(), (name, summary)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        f"{label:<{width}}  {row['score']:8.4f}  {row['num_samples']:7d}" for label, row in rows
    )


def _mean(predictions: Sequence[Prediction]) -> dict[str, Any]:
    total = sum(prediction.score for prediction in predictions)
    return {"score": total / max(1, len(predictions)), "num_samples": len(predictions)}
