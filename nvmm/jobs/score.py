"""Log-probabilities: of the answers in shards, or of given continuations of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nvmm.batch import Sample
from nvmm.config.choices import require
from nvmm.data.samples.preference import TooLong
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work
from nvmm.jobs.prompts import batches, build, continuation_tokens, open_shards


@dataclass(frozen=True)
class Score(Job):
    """Score every sample of shards by a checkpoint.

    Without `continuations`, a row has `key`, `log_probability` (the sum over the tokens that
    training would supervise), `tokens` (their number) and `error`. Where the builder's samples are
    answers to compare, they are `log_probabilities` and `tokens`, a list of one a text: the
    references of preference training (`data.train.build.reference`). With them, it has `key`,
    `log_probabilities` (a list, one a continuation), `probability` (of the first one among them:
    P(True) of `[True, False]`) and `error`.

    Args:
        shards: file patterns of tar shards, in the form that the checkpoint's builder reads.
        preferences: read the shards as answers to compare, whatever builder trained the checkpoint,
            with those of its settings that pairs have; samples that are too long are left out
            ("drop"), or "cut".
        continuations: texts that may follow a prompt. The prompt runs once for all of them,
            through the KV cache.
        batch_size: samples of a forward pass.
        part_size: samples of a part file.
    """

    shards: str | Sequence[str]
    preferences: TooLong | None = None
    continuations: Sequence[str] | None = None
    batch_size: int = 8
    part_size: int = 1024
    name: str = "score"

    def __post_init__(self) -> None:
        if self.preferences is not None:
            require("job.preferences", self.preferences, TooLong)
            if self.continuations is not None:
                raise ValueError(
                    "job.preferences scores the data's answers, job.continuations those of its own;"
                    " give one of them"
                )

    @property
    def build(self) -> dict[str, Any]:
        """The builder of preferences, where it is asked for."""
        if self.preferences is None:
            return {}
        target = "nvmm.data.samples.preference.PreferenceBuilder"
        return {"_target_": target, "too_long": self.preferences}

    def prepare(self, model: Restored | None) -> Work:
        """Open the shards with the checkpoint's builder.

        Raises ValueError for a continuation without tokens, and for two of the same tokens.
        """
        model = self.require(model)
        model.require_answers()
        dataset, inputs = open_shards(self.shards, model)
        room = model.max_sequence_length
        compares = model.builder.compares and self.continuations is None
        if self.continuations is None:
            make = model.builder.__call__
        else:
            make = model.builder.prompt
            tokens = continuation_tokens(model.tokenizer, self.continuations)
            room -= max(map(len, tokens))

        def scored(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            if compares:
                return [
                    dict(zip(("log_probabilities", "tokens"), zip(*row, strict=True), strict=True))
                    for row in model.score_texts(samples, batch_size=len(samples))
                ]
            if self.continuations is None:
                return [
                    {"log_probability": total, "tokens": count}
                    for total, count in model.score(samples, batch_size=len(samples))
                ]
            table = model.score_continuations(samples, tokens)
            first = table.softmax(1)[:, 0]
            return [
                {"log_probabilities": values, "probability": probability}
                for values, probability in zip(table.tolist(), first.tolist(), strict=True)
            ]

        def rows(numbers: range) -> pa.Table:
            samples, errors = build(dataset.members, numbers, make, room)
            scores: dict[int, dict[str, Any]] = {}
            for chosen in batches(samples, self.batch_size):
                results = scored([samples[number] for number in chosen])
                scores |= dict(zip(chosen, results, strict=True))
            return pa.Table.from_pylist(
                [
                    {"key": dataset.index.key(number), "error": errors.get(number)}
                    | scores.get(number, {})
                    for number in numbers
                ],
                self._schema(compares),
            )

        return Work(len(dataset), inputs, rows)

    def _schema(self, compares: bool) -> pa.Schema:
        """Return the columns of a row."""
        columns: dict[str, pa.DataType]
        if compares:
            columns = {"log_probabilities": pa.list_(pa.float64()), "tokens": pa.list_(pa.int32())}
        elif self.continuations is None:
            columns = {"log_probability": pa.float64(), "tokens": pa.int32()}
        else:
            columns = {"log_probabilities": pa.list_(pa.float64()), "probability": pa.float64()}
        return pa.schema({"key": pa.string(), **columns, "error": pa.string()})
