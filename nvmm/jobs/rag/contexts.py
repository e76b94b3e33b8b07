"""Which texts stand before a question, and in which order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nvmm.config.choices import require

Source = Literal["none", "gold", "document", "searched", "reranked"]
Order = Literal["best_first", "reverse", "swing", "random"]
_RANKED = ("searched", "reranked")


@dataclass(frozen=True)
class Contexts:
    """One way of answering: a row of the table.

    source: nothing; the relevant chunks by their place; the whole document (long context); or the
        best chunks of the search, or of the reranking.
    k: so many chunks; None for sources that are not ranked: all relevant ones, or one document.
    candidates: of a reranking, so many of the best searched chunks (N); None: all that were scored.
    order: of ranked chunks in the prompt: best first, the best last (reverse), the best at both
        ends (swing: ranks 1, 3, 5, 4, 2, as ChatQA compares), or random.
    seed: of a random order, which depends on it and the question's id alone.
    """

    source: Source
    k: int | None = None
    candidates: int | None = None
    order: Order = "best_first"
    seed: int | None = None

    def __post_init__(self) -> None:
        require("job.answers.source", self.source, Source)
        require("job.answers.order", self.order, Order)
        ranked = self.source in _RANKED
        if ranked != (self.k is not None) or (self.k is not None and self.k < 1):
            raise ValueError(
                f"job.answers: k={self.k} with source={self.source}; k is at least 1 with"
                f" {' and '.join(_RANKED)}, and null with the others"
            )
        if self.candidates is not None and (self.source != "reranked" or self.candidates < 1):
            raise ValueError(
                f"job.answers: candidates={self.candidates} is of source=reranked, at least 1"
            )
        if self.order != "best_first" and not ranked:
            raise ValueError(f"job.answers: order={self.order} is of ranked chunks")
        if (self.seed is not None) != (self.order == "random"):
            raise ValueError(f"job.answers: seed={self.seed} goes with order=random, and only so")

    def ordered(self, ranking: Sequence[str], question: str) -> list[str]:
        """Return the k best of a ranking, best first, in the order of the prompt."""
        best = list(ranking[: self.k])
        if self.order == "reverse":
            return best[::-1]
        if self.order == "swing":
            return best[::2] + best[1::2][::-1]
        if self.order == "random":
            digest = hashlib.blake2b(f"{self.seed}/{question}".encode(), digest_size=8).digest()
            random.Random(int.from_bytes(digest, "big")).shuffle(best)
        return best
