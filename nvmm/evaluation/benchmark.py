"""A benchmark: questions in shards, how to ask them, how to score an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Metric(Protocol):
    """Scores one prediction against the accepted answers, in [0, 1]."""

    def __call__(self, *, prediction: str, answers: Sequence[str]) -> float: ...


@dataclass(frozen=True)
class Example:
    """One question as it is asked.

    members: of the shard's sample, with the member json in the form that the sample builder of
        training reads. question: as in the data. kind: the group it is reported under.
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
class Benchmark:
    """What `benchmark=` chooses.

    Args:
        name: names the output directory.
        shards: file patterns of tar shards whose member json is `{"question", "answers"}` or a
            conversation that ends with the answer.
        metric: of one answer; the benchmark's score is the mean over its questions.
        metric_by_kind: another metric for questions of some kinds.
        suffix: text put on a line of its own behind every question.
        question, answers, kind: fields of the member json; a sample without `kind` is reported
            under "all" alone.
        max_new_tokens: longest answer.
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
        """Name of the metric's function."""
        metric: Any = self.metric
        return str(getattr(metric, "func", metric).__name__)

    def ask(self, members: Mapping[str, Any]) -> Example:
        """The question in one sample's members. Raises ValueError naming a sample without one."""
        source = f"{members.get('__url__', '')}:{members.get('__key__', '')}"
        try:
            record = json.loads(members["json"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{source}: member json is missing or damaged ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{source}: member json must be an object")
        kind = str(record.get(self.kind, "all"))
        ending = f"\n{self.suffix}" if self.suffix else ""
        turns = record.get("conversations", record.get("messages"))
        if isinstance(turns, list):
            asked = [turn for turn in turns if _role(turn) in ("human", "user")]
            if not asked:
                raise ValueError(f"{source}: the conversation has no user turn")
            text = "value" if "value" in asked[-1] else "content"
            question = str(asked[-1].get(text))
            asked[-1][text] = question + ending
        else:
            if self.question not in record:
                raise ValueError(f"{source}: member json has no field {self.question}")
            question = str(record[self.question])
            given = record.get(self.answers, record.get("answer", []))
            listed = [str(a) for a in (given if isinstance(given, list) else [given])]
            record = {"question": question + ending, "answers": listed}
        return Example({**members, "json": json.dumps(record).encode()}, question, kind)

    def score(self, prediction: str, answers: Sequence[str], kind: str) -> float:
        """Score of one answer under the metric of its kind."""
        metric = self.metric_by_kind.get(kind, self.metric)
        return float(metric(prediction=prediction, answers=answers))


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean score and number of questions, overall and for each kind in alphabetical order."""
    kinds = sorted({prediction.kind for prediction in predictions})
    return _mean(predictions) | {
        "kinds": {kind: _mean([p for p in predictions if p.kind == kind]) for kind in kinds}
    }


def table(summary: Mapping[str, Any], name: str) -> str:
    """The summary as text: one line for each kind, then the whole."""
    rows = [*summary["kinds"].items(), (name, summary)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        f"{label:<{width}}  {row['score']:8.4f}  {row['num_samples']:7d}" for label, row in rows
    )


def _mean(predictions: Sequence[Prediction]) -> dict[str, Any]:
    total = sum(prediction.score for prediction in predictions)
    return {"score": total / max(1, len(predictions)), "num_samples": len(predictions)}


def _role(turn: Any) -> Any:
    return turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
