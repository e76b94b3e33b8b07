"""Answers to the prompts in shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work
from nvmm.jobs.prompts import batches, build, open_shards


@dataclass(frozen=True)
class Generate(Job):
    """Ask a checkpoint the prompt of every sample.

    A row has `key` (the sample's), `text` (its answer) and `error` (why it has none, else null).

    Args:
        shards: file patterns of tar shards, in the form that the checkpoint's builder reads.
        max_new_tokens: tokens of the longest answer.
        temperature, top_p: as of `nvmm.generate`; a sampled answer depends on the seed and the
            sample's number alone.
        seed: seed of sampling.
        batch_size: prompts decoded together.
        part_size: samples of a part file.
    """

    shards: str | Sequence[str]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234
    batch_size: int = 8
    part_size: int = 1024
    name: str = "generate"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"job.max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"job.temperature={self.temperature} must be at least 0, and"
                f" job.top_p={self.top_p} above 0 and at most 1"
            )
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"job.top_p={self.top_p} does nothing with job.temperature=0")

    def prepare(self, model: Restored | None) -> Work:
        """Open the shards with the checkpoint's builder."""
        model = self.require(model)
        model.require_answers()
        dataset, inputs = open_shards(self.shards, model)

        def rows(numbers: range) -> pa.Table:
            room = model.max_sequence_length - self.max_new_tokens
            prompts, errors = build(dataset.members, numbers, model.builder.prompt, room)
            texts: dict[int, str] = {}
            for chosen in batches(prompts, self.batch_size):
                answers = model.generate(
                    [prompts[number] for number in chosen],
                    self.max_new_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=self.seed,
                )
                texts |= dict(zip(chosen, answers, strict=True))
            return pa.table(
                {
                    "key": [dataset.index.key(number) for number in numbers],
                    "text": pa.array([texts.get(number) for number in numbers], pa.string()),
                    "error": pa.array([errors.get(number) for number in numbers], pa.string()),
                }
            )

        return Work(len(dataset), inputs, rows)
