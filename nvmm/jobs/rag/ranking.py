"""Chunks in the order of P(True): the probability that the answer to a ranking prompt is True."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from torch import Tensor

from nvmm.config.choices import require
from nvmm.data.samples.contexts import Ranking as RankingForm
from nvmm.data.samples.record import members_of
from nvmm.inference.prefix import saved_tokens
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest
from nvmm.jobs.prompts import asking, batches, build
from nvmm.jobs.rag.questions import Chunk, Question
from nvmm.jobs.rerank import reordered

Probability = Literal["normalised", "raw"]


@dataclass(frozen=True)
class Ranking:
    """How the best chunks of a search are ranked anew.

    form: the ranking prompt, and the words for relevant and irrelevant; one chunk a prompt. Earlier
        turns of a dialogue are kept, and the prompt asks for its latest question.
    top: chunks of a question that are scored, the best searched (N).
    probability: of the word for relevant: among the two words ("normalised"), or among all tokens
        ("raw"). RankRAG does not say which.
    """

    form: RankingForm
    top: int = 100
    probability: Probability = "normalised"

    def __post_init__(self) -> None:
        require("job.ranking.probability", self.probability, Probability)
        if self.top < 1:
            raise ValueError(f"job.ranking.top={self.top} must be at least 1")

    def scores(self, table: Tensor) -> list[float]:
        """Return the scores of log-probabilities [prompts, 2] of the two words."""
        shares = table.softmax(1) if self.probability == "normalised" else table.exp()
        values: list[float] = shares[:, 0].tolist()
        return values


@dataclass(frozen=True, eq=False)
class Rank(Job):
    """Rank the best chunks of each question anew.

    A row has `query_id`, `ids` (the scored chunks best first, then the others in their order),
    `scores` (null for the others), `error` (why a chunk has no score, else null), and the tokens of
    the prompts: all, and those that a shared prefix saved.

    rankings: chunk ids of each question, in the order of `questions`. source: a digest of them.
    """

    ranking: Ranking
    questions: Sequence[Question]
    chunks: Mapping[str, Chunk]
    rankings: Sequence[Sequence[str]]
    source: str
    share_prefixes: bool
    batch_size: int
    part_size: int
    name: str = "rerank"

    def prepare(self, model: Restored | None) -> Work:
        """Make the prompts' builder; ValueError for an embedder."""
        model = self.require(model)
        form, top = self.ranking.form, self.ranking.top
        asks = asking(model, form)
        words = [asks.answer_tokens(word) for word in (form.relevant, form.irrelevant)]
        room = model.max_sequence_length - max(map(len, words))

        def members(pair: int) -> dict[str, Any]:
            number, place = divmod(pair, top)
            question, name = self.questions[number], self.rankings[number][place]
            record = {
                "question": question.text,
                "passages": [self.chunks[name].text],
                "messages": list(question.messages[:-1]),
            }
            return dict(members_of(record, source=f"{question.id}, {name}"))

        def rows(numbers: range) -> pa.Table:
            own = {
                number: [number * top + place for place in range(len(self.rankings[number][:top]))]
                for number in numbers
            }
            pairs = [pair for some in own.values() for pair in some]
            samples, errors = build(members, pairs, asks.prompt, room)
            scores: dict[int, float] = {}
            saved: dict[int, int] = {}
            share = self.share_prefixes
            for chosen in batches(samples, self.batch_size, share_prefix=share):
                prompts = [samples[pair] for pair in chosen]
                table = model.score_continuations(prompts, words, share_prefix=share)
                scores |= dict(zip(chosen, self.ranking.scores(table), strict=True))
                if share:
                    saved |= dict(zip(chosen, saved_tokens(prompts), strict=True))
            records = []
            for number, some in own.items():
                ids, values = reordered(self.rankings[number], [scores.get(pair) for pair in some])
                records.append(
                    {
                        "query_id": self.questions[number].id,
                        "ids": ids,
                        "scores": values,
                        "error": next((errors[pair] for pair in some if pair in errors), None),
                        "prompt_tokens": sum(
                            samples[pair].num_tokens for pair in some if pair in samples
                        ),
                        "saved_tokens": sum(saved.get(pair, 0) for pair in some),
                    }
                )
            return pa.Table.from_pylist(records, _SCHEMA)

        asked = [list(question.messages) for question in self.questions]
        return Work(len(self.questions), {"questions": digest(asked), "ranking": self.source}, rows)


_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
        "error": pa.string(),
        "prompt_tokens": pa.int64(),
        "saved_tokens": pa.int64(),
    }
)
