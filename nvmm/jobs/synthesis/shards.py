"""The step that ends a pipeline: tar shards that training reads as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvmm.config.choices import require
from nvmm.data.prepare.records import to_sample
from nvmm.data.shards.dataset import write_shards
from nvmm.jobs.synthesis.records import (
    OWN,
    Made,
    Record,
    answer_ids,
    conversation_of,
    digest,
)
from nvmm.jobs.synthesis.step import Desk, Local

Form = Literal["sft", "preference", "answers"]
_KEPT = ("instruction_id_list", "kwargs", "reference")


@dataclass(frozen=True, kw_only=True)
class Write(Local):
    """Writes shards to the output's folder `shards`.

    A sample's `json` has what its builder reads, and the record's `id`, `parents` and `lineage`.
    `sft` (InstructBuilder): `messages` that end with an answer. `preference` (PreferenceBuilder):
    `prompt`, as messages, `chosen`, `rejected` and their rewards. `answers`, for job=reward: a
    sample for each answer of a record, `messages` that end with it, under the record's id and the
    answer's number. A record that has them not is left out.

    Args:
        form: sft, preference or answers.
        name: the shards are NAME-00000.tar, ...; null: the step's name.
        samples_per_shard: their number.
        share: the digest of a record's first turn of a user, as a number in [0, 1), is from the
            first up to the second. So disjoint shares have no prompt in common: those for SFT and
            those for preferences.
    """

    form: Form
    name: str | None = None
    samples_per_shard: int = 1000
    share: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require("form", self.form, Form)
        if len(self.share) != 2 or not 0 <= self.share[0] < self.share[1] <= 1:
            raise ValueError(f"share={list(self.share)} must be two numbers, 0 <= from < to <= 1")

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the sample of a record, or why it has none."""
        asked = next(turn for turn in conversation_of(item) if turn["role"] == "user")
        place = int(digest(asked["content"])[:13], 16) / 16**13
        if not self.share[0] <= place < self.share[1]:
            return Made([], [f"{item['id']} is of another share"])
        own = {name: item[name] for name in (*OWN, *_KEPT) if name in item}
        own |= {"shard": self.name or desk.step}
        if self.form == "answers":
            if not item.get("answers"):
                return Made([], [f"{item['id']} has no answers"])
            return Made(
                [
                    {
                        "messages": [*conversation_of(item), _said(answer)],
                        **own,
                        "id": name,
                        "parents": [item["id"]],
                    }
                    for name, answer in zip(answer_ids(item), item["answers"], strict=True)
                ]
            )
        if self.form == "sft":
            messages = item.get("messages") or []
            if not messages or messages[-1]["role"] != "assistant":
                return Made([], [f"{item['id']} has no messages that end with an answer"])
            content = {"messages": messages}
        else:
            names = ("chosen", "rejected", "chosen_reward", "rejected_reward")
            missing = [name for name in names[:2] if name not in item]
            if missing:
                return Made([], [f"{item['id']} has no {missing[0]}"])
            content = {"prompt": conversation_of(item)}
            content |= {name: item[name] for name in names if name in item}
        return Made([{**content, **own}])

    def finish(self, records: list[Record], folder: Path) -> list[Path]:
        """Write the shards, and return them: the same records give the same bytes."""
        if not records:
            raise ValueError(f"{folder}: no record is left to write as form={self.form}")
        names = {record["id"] for record in records}
        if len(names) < len(records):
            raise ValueError(f"{folder}: records to write have an id in common")
        samples = (
            to_sample(record["id"], {k: v for k, v in record.items() if k != "shard"})
            for record in records
        )
        return write_shards(
            folder / "shards",
            records[0]["shard"],
            samples,
            samples_per_shard=self.samples_per_shard,
        )


def _said(answer: Record) -> dict[str, str]:
    return {"role": "assistant", "content": answer["text"]}
