"""A needle in a haystack: one sentence hidden at a depth of a long text, and asked for.

Kamradt 2023 (the test that ChatQA 2 reports to 128K). Recall is the share of the needle's parts
that the answer has, so that no judge is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nvmm.evaluation.benchmark import Prediction, Result, Settings
from nvmm.evaluation.haystack import (
    Haystack,
    check_lengths,
    exactly,
    hidden,
    recall,
    refuse_max_new_tokens,
)
from nvmm.evaluation.items import Item, Items, Listed, TextBenchmark
from nvmm.io.files import write

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

HEATMAP = "heatmap.png"
NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny"
    " day."
)


@dataclass(frozen=True)
class Needle(TextBenchmark):
    """A grid of lengths and depths, a question a cell; recall in each, and a heat map of it.

    Args:
        haystack: text files; joined, and repeated where a length needs more.
        lengths: tokens of prompt and answer together, which a model's context must hold; the prompt
            has exactly `length - max_new_tokens`.
        depths: where the needle is, in percent of the haystack, moved back to a sentence's end.
        needle, question, answers: what is hidden, how it is asked for, and the parts that an answer
            must have; recall is their share.
        prompt: the user's turn, of {haystack} and {question}.
        repeats: questions a cell, each with a part of the haystack that the seed chooses.
        seed: chooses the haystack's parts; a length's parts are the same at every depth.
        max_new_tokens: tokens of the longest answer.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    haystack: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float] = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    needle: str = NEEDLE
    question: str = "What is the best thing to do in San Francisco?"
    answers: Sequence[str] = ("sandwich", "Dolores Park", "sunny day")
    prompt: str = "{haystack}\n\n{question}"
    repeats: int = 1
    seed: int = 0
    max_new_tokens: int = 64
    name: str = "needle"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or not self.answers or self.repeats < 1:
            raise ValueError("benchmark needs lengths, depths, answers and repeats of 1 at least")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"benchmark.depths={list(self.depths)} must be percent, 0 to 100")
        for key, values in (("lengths", self.lengths), ("depths", self.depths)):
            if len({float(value) for value in values}) < len(values):
                raise ValueError(f"benchmark.{key}={list(values)} has a value twice")
        if {self.prompt.count(part) for part in ("{haystack}", "{question}")} != {1}:
            raise ValueError(
                f"benchmark.prompt={self.prompt!r} must have {{haystack}} and {{question}} once"
            )

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.haystack={list(self.haystack)}"

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Ask the grid; `max_new_tokens` is the benchmark's, as lengths depend on it."""
        refuse_max_new_tokens(settings)
        _figure()  # a package that is missing is missed now
        return super().run(model, settings, journal)

    def items(self, model: Restored) -> Items:
        """Return the cells' questions."""
        check_lengths(self.lengths, model)
        text = Haystack(self.haystack, model.builder)
        cells = [
            (
                f"length {length}, depth {depth}",
                str(repeat),
                {"length": length, "depth": depth, "haystack": text.digest},
            )
            for length in self.lengths
            for depth in self.depths
            for repeat in range(self.repeats)
        ]

        def make(source: str, key: str, cell: Mapping[str, Any]) -> Item:
            return Item(
                source=f"{source}, repeat {key}",
                key=key,
                kind=f"{cell['length']}/{cell['depth']}",
                answers=list(self.answers),
                metric=recall,
                max_new_tokens=self.max_new_tokens,
                text=self._text(cell["length"], cell["depth"], int(key), text, model.builder),
            )

        return Listed(cells, make)

    def _text(self, length: int, depth: float, repeat: int, text: Haystack, builder: Any) -> str:
        """Return a cell's question, whose prompt has exactly length - max_new_tokens tokens."""
        start = Random(f"{self.seed}/{length}/{repeat}").randrange(len(text))

        def written(size: int, filler: str) -> str:
            hay = text.part(start, size).rstrip() + filler
            hay = hidden(hay, [(depth / 100, self.needle)])
            return self.prompt.replace("{question}", self.question).replace("{haystack}", hay)

        return exactly(length - self.max_new_tokens, written, builder)

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return the recall of every cell, and of all; rank 0 draws the heat map."""
        cells: dict[tuple[int, float], list[float]] = {}
        for line in predictions:
            length, _, percent = line.kind.partition("/")
            cells.setdefault((int(length), float(percent)), []).append(line.score)
        grid = [
            [_mean(cells.get((length, float(depth)))) for length in self.lengths]
            for depth in self.depths
        ]
        overall = fmean(line.score for line in predictions)
        if dist.get_rank() == 0:
            write(folder / HEATMAP, heatmap(grid, self.lengths, self.depths))
        summary = {
            "score": overall,
            "num_samples": len(predictions),
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "recall": grid,
        }
        width = max(8, *(len(str(length)) + 1 for length in self.lengths))
        rows = [f"{'depth %':>8}" + "".join(f"{length:>{width}}" for length in self.lengths)]
        for depth, row in zip(self.depths, grid, strict=True):
            values = ("-" if value is None else f"{value:.2f}" for value in row)
            rows.append(f"{depth:>8}" + "".join(f"{value:>{width}}" for value in values))
        scores = {f"{self.name}_recall": {"overall": overall}}
        return Result(summary, scores, "\n".join([*rows, f"recall {overall:.4f}"]))


def heatmap(
    grid: Sequence[Sequence[float | None]], lengths: Sequence[int], depths: Sequence[float]
) -> bytes:
    """Return a PNG of recall [depths, lengths], red 0 to green 1; cells without score are grey."""
    import numpy as np

    figure = _figure()(figsize=(2 + 0.6 * len(lengths), 1.5 + 0.35 * len(depths)), dpi=120)
    axes = figure.add_subplot()
    values = np.array([[np.nan if v is None else v for v in row] for row in grid], dtype=float)
    axes.set_facecolor("lightgrey")
    drawn = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(drawn, label="recall")
    figure.tight_layout()
    stream = io.BytesIO()
    # Without the writer's name and date, the same grid is the same file.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the heat map needs matplotlib: install nvmm[eval]") from error
    return Figure


def _mean(values: Sequence[float] | None) -> float | None:
    return fmean(values) if values else None
