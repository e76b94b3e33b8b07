"""A step that removes texts which are nearly the same as one before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nvmm.jobs.synthesis.records import Made, Record, conversation_of
from nvmm.jobs.synthesis.step import Desk, Local

_LITTLE = 0.05
"""What a candidate too many costs the index, where a missed one costs the rest of 1."""


@dataclass(frozen=True, kw_only=True)
class Deduplicate(Local):
    """Keeps the first of records that are nearly the same, by datasketch's MinHash and LSH.

    Two texts are, where the estimated Jaccard similarity of their sets of `ngram` words is at least
    `threshold`. Case and punctuation count for nothing. Texts of equal words always are.

    field: the text; null: all turns of the prompt. num_perm: hash functions. seed: of them.
    """

    field: str | None = None
    threshold: float = 0.7
    ngram: int = 3
    num_perm: int = 128
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or self.ngram < 1:
            raise ValueError(
                f"threshold={self.threshold} must be above 0 and at most 1, ngram={self.ngram} at"
                " least 1"
            )

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return (the record, the id of an earlier one that it is nearly the same as, or None)."""
        return list(map(list, self._compared(records)))

    def change(self, item: Any, desk: Desk) -> Made:
        """Keep a record or leave it out."""
        record, same = item
        if same is not None:
            return Made([], [f"{record['id']} is nearly the same as {same}"])
        return Made([record])

    def _compared(self, records: list[Record]) -> Iterator[tuple[Record, str | None]]:
        from datasketch import MinHash, MinHashLSH

        # The index must miss no candidate: what it proposes too much, the estimate below sorts out.
        index = MinHashLSH(
            threshold=self.threshold, num_perm=self.num_perm, weights=(_LITTLE, 1 - _LITTLE)
        )
        kept: list[tuple[str, Any]] = []
        for record in records:
            sketch = MinHash(num_perm=self.num_perm, seed=self.seed)
            sketch.update_batch([shingle.encode() for shingle in self._shingles(record)])
            # LSH proposes; the estimate decides, and the earliest of those that pass is named.
            near = [
                number
                for number in sorted(map(int, index.query(sketch)))
                if kept[number][1].jaccard(sketch) >= self.threshold
            ]
            yield record, kept[near[0]][0] if near else None
            if not near:
                index.insert(str(len(kept)), sketch)
                kept.append((record["id"], sketch))

    def _shingles(self, record: Record) -> set[str]:
        text = record.get(self.field) if self.field is not None else None
        if self.field is None:
            text = "\n".join(turn["content"] for turn in conversation_of(record))
        if not isinstance(text, str):
            raise ValueError(f"record {record['id']} has no text {self.field} to compare")
        found = re.findall(r"\w+", text.lower())
        count = max(1, len(found) - self.ngram + 1)
        return {" ".join(found[start : start + self.ngram]) for start in range(count)}
