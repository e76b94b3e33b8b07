"""What a RAG run is worth: recall before and after reranking, answers way by way, and traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from nvmm.evaluation.refusals import REFUSALS, unanswerable_accuracy
from nvmm.evaluation.squad import squad_exact_match, squad_f1
from nvmm.jobs.rag.questions import Chunk, Question, Relevance
from nvmm.jobs.rerank import reordered
from nvmm.jobs.search import rankings_of

Scores = Mapping[str, float | None]
_TRACED = 20
"""Chunks of a ranking that a trace shows."""


def reranked(ranking: Sequence[str], scores: Scores, candidates: int | None = None) -> list[str]:
    """Return a ranking with its first `candidates` in the order of their scores.

    Those behind them follow in the order of the search; None: all that have been scored.
    """
    first = ranking[:candidates]
    ids, _ = reordered(ranking, [scores.get(name) for name in first])
    return ids


@dataclass(frozen=True)
class Results:
    """The outputs of a run.

    found: rows of the search. scores: question id -> chunk id -> P(True), None without one.
    answers: way -> rows. refusal: what to say where there is no answer, beside ChatQA's phrases.
    """

    questions: Sequence[Question]
    chunks: Mapping[str, Chunk]
    relevance: Relevance
    found: pa.Table
    scores: Mapping[str, Scores]
    answers: Mapping[str, pa.Table]
    refusal: str

    @cached_property
    def searched(self) -> dict[str, list[str]]:
        """Question id -> chunk ids, best first."""
        return rankings_of(self.found)

    def tables(self, cutoffs: Sequence[int], candidates: Sequence[int]) -> dict[str, Any]:
        """Return the tables: name -> column -> number, in "recall" and "answers".

        recall@k is the share of questions with a relevant chunk among the first k, of those that
        say what is relevant; `questions` counts them.
        """
        rankings = {"searched": self.searched} | {
            f"reranked, N={top}": {
                name: reranked(ranking, self.scores[name], top)
                for name, ranking in self.searched.items()
            }
            for top in candidates
        }
        return {
            "relevance": self.relevance,
            "recall": {name: self._recall(ids, cutoffs) for name, ids in rankings.items()},
            "answers": {name: self._answers(name) for name in self.answers},
        }

    def _recall(self, rankings: Mapping[str, Sequence[str]], cutoffs: Sequence[int]) -> Any:
        judged = [question for question in self.questions if question.judged(self.relevance)]
        ranks = [self._first_relevant(question, rankings[question.id]) for question in judged]
        row: dict[str, Any] = {
            f"recall_at_{k}": sum(rank <= k for rank in ranks) / len(ranks) if ranks else None
            for k in cutoffs
        }
        return row | {"questions": len(judged)}

    def _first_relevant(self, question: Question, ranking: Sequence[str]) -> float:
        for rank, name in enumerate(ranking, 1):
            if question.finds(self.chunks[name], self.relevance):
                return rank
        return float("inf")

    def _answers(self, way: str) -> dict[str, Any]:
        """Return the means of a way of answering; a question without an answer counts as 0.

        The accuracies are ChatQA's: a refusal is right where a question cannot be answered, and
        anything else where it can; of the latter, those whose chunks are all irrelevant are left
        out.
        """
        rows = self._rows(way)
        scored = [question for question in self.questions if question.answers]
        judged = [self._judge(question, rows[question.id]) for question in scored]
        row = {name: _mean([one[name] for one in judged]) for name in ("f1", "exact_match")}
        said = [
            (rows[question.id]["text"] or "", question.answerable)
            for question in self.questions
            if not question.answerable or self._sees(question, rows[question.id])
        ]
        if {answerable for _, answerable in said} == {True, False}:
            accuracies = unanswerable_accuracy(said, (*REFUSALS, self.refusal))
            row |= {f"{name}_accuracy": value for name, value in accuracies.items()}
        return row | {
            "questions": len(scored),
            "errors": sum(one["error"] is not None for one in rows.values()),
            "prompt_tokens": _mean([one["prompt_tokens"] for one in rows.values()]),
            "saved_tokens": _mean([one["saved_tokens"] for one in rows.values()]),
        }

    def _sees(self, question: Question, row: Mapping[str, Any]) -> bool:
        """Return False where all of a question's contexts are chunks that are not relevant."""
        shown = [self.chunks[name] for name in row["contexts"] if name in self.chunks]
        if not shown or not question.judged(self.relevance):
            return True
        return any(question.finds(chunk, self.relevance) for chunk in shown)

    def _judge(self, question: Question, row: Mapping[str, Any]) -> dict[str, float]:
        if row["error"] is not None:
            return {"f1": 0.0, "exact_match": 0.0}
        given = {"prediction": row["text"], "answers": list(question.answers)}
        return {"f1": squad_f1(**given), "exact_match": squad_exact_match(**given)}

    def _rows(self, way: str) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.answers[way].to_pylist()}

    def metrics(
        self, tables: Mapping[str, Any], stages: Mapping[str, pa.Table]
    ) -> dict[str, float]:
        """Return the numbers of the tables by one name each, and the tokens that prefixes saved."""
        numbers = {
            f"{name} {column}": value
            for part in ("recall", "answers")
            for name, row in tables[part].items()
            for column, value in row.items()
            if value is not None
        }
        for total in ("prompt_tokens", "saved_tokens"):
            numbers[total] = sum(
                sum(rows[total].to_pylist())
                for rows in stages.values()
                if total in rows.column_names
            )
        return numbers

    def traces(self) -> Iterator[dict[str, Any]]:
        """Yield each question with its chunks, scores, prompts, answers and their scores."""
        ways = {name: self._rows(name) for name in self.answers}
        scores = {
            row["query_id"]: dict(zip(row["ids"], row["scores"], strict=True))
            for row in self.found.to_pylist()
        }
        for question in self.questions:
            name = question.id
            ranking = self.searched[name]
            trace: dict[str, Any] = {
                "id": name,
                "messages": list(question.messages),
                "answers": list(question.answers),
                "answerable": question.answerable,
                "searched": self._traced(question, ranking, scores[name]),
            }
            if name in self.scores:
                again = reranked(ranking, self.scores[name])
                trace["reranked"] = self._traced(question, again, self.scores[name])
            trace["ways"] = {
                way: {key: value for key, value in rows[name].items() if key != "key"}
                | (self._judge(question, rows[name]) if question.answers else {})
                for way, rows in ways.items()
            }
            yield trace

    def _traced(self, question: Question, ids: Sequence[str], scores: Scores) -> list[Any]:
        return [
            {
                "id": name,
                "score": scores.get(name),
                "relevant": question.finds(self.chunks[name], self.relevance),
                "text": self.chunks[name].text,
            }
            for name in ids[:_TRACED]
        ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
