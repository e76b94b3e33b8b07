"""Scores of the answers in shards, by a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nvmm.batch import Sample
from nvmm.data.samples.preference import PreferenceBuilder
from nvmm.data.samples.reward import RewardBuilder
from nvmm.inference.restore import Restored
from nvmm.inference.scoring import scalars
from nvmm.jobs.job import Job, Work
from nvmm.jobs.prompts import batches, build, open_shards


@dataclass(frozen=True)
class Reward(Job):
    """Score the answers of every sample of shards by a reward model's checkpoint.

    A row has `key`, `scores` (for each text of the sample a list, one number an output), `rewards`
    (for each text their weighted sum) and `error`. A text is an answer: a labelled sample has one
    (labels are not needed here), as has a conversation that ends with one; a pair has the chosen
    and the rejected one.

    Args:
        shards: file patterns of tar shards, in the form that the checkpoint's builder reads.
        weights: of the outputs; null: 1 of a single output, and those of
            Nemotron-4-340B-Reward's card of nine.
        batch_size: samples of a forward pass.
        part_size: samples of a part file.
    """

    shards: str | Sequence[str]
    weights: Sequence[float] | None = None
    batch_size: int = 8
    part_size: int = 1024
    name: str = "reward"

    def prepare(self, model: Restored | None) -> Work:
        """Open the shards with the checkpoint's builder."""
        model = self.require(model)
        dataset, inputs = open_shards(self.shards, model)
        builder = model.builder
        make: Callable[[dict[str, Any]], Sample] = (
            builder.scored
            if isinstance(builder, RewardBuilder | PreferenceBuilder)
            else builder.__call__
        )

        def rows(numbers: range) -> pa.Table:
            samples, errors = build(dataset.members, numbers, make, model.max_sequence_length)
            found: dict[int, dict[str, Any]] = {}
            for chosen in batches(samples, self.batch_size):
                scored = model.rewards([samples[number] for number in chosen], len(chosen))
                for number, scores in zip(chosen, scored, strict=True):
                    rewards = scalars(scores, self.weights, "job.weights")
                    found[number] = {"scores": scores.tolist(), "rewards": rewards.tolist()}
            return pa.Table.from_pylist(
                [
                    {"key": dataset.index.key(number), "error": errors.get(number)}
                    | found.get(number, {})
                    for number in numbers
                ],
                _SCHEMA,
            )

        return Work(len(dataset), inputs, rows)


_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "scores": pa.list_(pa.list_(pa.float64())),
        "rewards": pa.list_(pa.float64()),
        "error": pa.string(),
    }
)
