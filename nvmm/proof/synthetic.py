"""Batches of random tokens and tiles, as uneven as real ones, for comparisons of layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nvmm.batch import ATTENDED, IGNORE_INDEX, IMAGE, Batch, Media
from nvmm.parallel.setup import Parallel

PLACEHOLDER = 508


@dataclass(frozen=True)
class SyntheticTokenizer:
    """Stands for the tokenizer of a run without text."""

    digest: str = "synthetic"


class SyntheticData:
    """A few steps of synthetic micro-batches behind the loader's interface."""

    log_samples = False

    def __init__(self, steps: list[list[Batch]]) -> None:
        self.steps = steps
        self.tokenizer = SyntheticTokenizer()

    def batches(self, *, rank: int, size: int, start: int, **kwargs: Any) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step, dealt as the loader deals them."""
        for step in self.steps[start:]:
            yield step[rank::size]

    def position(self, step: int) -> dict[str, int]:
        """The data's place before a step."""
        return {"step": step}

    def count(self, batches: list[Batch]) -> dict[str, float]:
        """No datasets, so no counts of them."""
        return {}

    def check_bad(self, totals: dict[str, Any]) -> None:
        """No sample is bad."""


def synthetic_steps(
    config: dict[str, Any],
    num_steps: int,
    num_micro_batches: int,
    *,
    packed: bool = False,
    merge: int = 1,
) -> list[list[Batch]]:
    """Micro-batches with images unevenly spread, some without any; ragged rows; an odd vocabulary.

    `config["attended"]` says which tiles have no placeholders but are for cross-attention.

    Every second micro-batch of odd steps has no image at all, so with two data-parallel ranks one
    sees none in the whole step; of even steps the last micro-batch has none. Every `merge` of them
    become one (all: no gradient accumulation). Rows and packed segments are padded as
    `config["parallel"]` needs, rows to a multiple of `config["row_multiple"]` at least; the tokens
    are the same at any layout.

    For an embedder a micro-batch is two samples of a query, its positive and a hard negative.
    """
    parallel = Parallel(**config.get("parallel", {}))
    multiple = math.lcm(4, parallel.sequence_multiple, config.get("row_multiple", 1))
    segment = parallel.segment_multiple if packed else 1
    texts = 3 if "pooling" in config["model"] else 1
    generator = torch.Generator().manual_seed(11)
    steps = []
    for step in range(num_steps):
        groups = []
        for index in range(num_micro_batches):
            bare = index % 2 == 1 if step % 2 == 0 else index == num_micro_batches - 1
            model = None if bare or "vision" not in config["model"] else config["model"]
            groups.append(
                [
                    _row(
                        generator,
                        model,
                        1 - i * (index % 2 == 0),
                        config.get("attended", "none"),
                    )
                    for i in range(2 * texts)
                ]
            )
        groups = [list(chain(*groups[i : i + merge])) for i in range(0, len(groups), merge)]
        steps.append(
            [
                _collate(rows, 100 * step + 10 * i, packed, multiple, segment)
                for i, rows in enumerate(groups)
            ]
        )
    if texts > 1:
        return [[_as_retrieval(batch) for batch in step] for step in steps]
    return steps


def _as_retrieval(batch: Batch) -> Batch:
    """Every three rows as a query, its positive and a hard negative; some masked, some alike."""
    lengths = batch.lengths[batch.lengths > 0].long()
    role = torch.arange(len(lengths)) % 3
    starts = batch.cu_seqlens[: len(role)].long() if batch.cu_seqlens is not None else 0
    rows = 0 if batch.cu_seqlens is not None else torch.arange(len(role))
    first = batch.tokens[rows, starts]
    return batch.replace(
        sample_ids=batch.sample_ids[::3],
        extras={
            "role": role,
            "pool_from": torch.where(role == 0, 3, 0),
            # Some documents are alike, also across micro-batches: false negatives.
            "document_id": first % 17,
            "text_hash": first,
            "answers": (first[:, None] + torch.tensor([3, 6])) % 17,
            "in_batch": first % 5 != 0,
            "teacher": lengths.float() / 10,
        },
    )


@dataclass(frozen=True)
class _Row:
    """tokens [n + 1]; tiles uint8 [k, 3, size, size]; starts of the placeholders of the first of
    them; the others are attended, their tags columns [start, stop) of the text or `tags`."""

    tokens: Tensor
    starts: list[int]
    tiles: Tensor
    tokens_per_tile: int
    attended: list[tuple[int, int]]
    tags: Tensor


def _row(
    generator: torch.Generator,
    model: dict[str, Any] | None,
    least_tiles: int,
    attended: str = "none",
) -> _Row:
    count, size, per_tile = 0, 0, 0
    if model is not None:
        size = model["vision"]["image_size"]
        grid = size // model["vision"]["patch_size"] // model["connector"].get("downsample", 2)
        per_tile = grid * grid
        count = int(torch.randint(least_tiles, 4, (), generator=generator))
    # Like NVLM-D's, -H's or -X's rows: all tiles, the first one or none in the sequence.
    placed = {"none": count, "regular": min(count, 1), "all": 0}[attended]
    length = int(torch.randint(9, 14, (), generator=generator)) + placed * (per_tile + 1)
    tokens = torch.randint(0, PLACEHOLDER, (length + 1,), generator=generator)
    starts = [2 + i * (per_tile + 1) for i in range(placed)]
    for start in starts:
        tokens[start : start + per_tile] = PLACEHOLDER
    shape = (count, 3, size, size)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    in_text = attended == "all"
    spans = [(1 + 2 * i, 3 + 2 * i) if in_text else (1, 1) for i in range(count - placed)]
    tags = torch.randint(0, PLACEHOLDER, (len(spans), 0 if in_text else 2), generator=generator)
    tags[1::2, 1:] = -1  # tags of two lengths
    return _Row(tokens, starts, tiles, per_tile, spans, tags)


def _collate(
    rows: list[_Row], first_id: int, packed: bool, multiple: int, segment_multiple: int
) -> Batch:
    lengths = [len(row.tokens) - 1 for row in rows]
    padded = [-(-length // segment_multiple) * segment_multiple for length in lengths]
    width = -(-(sum(padded) if packed else max(lengths)) // multiple) * multiple
    shape = (1 if packed else len(rows), width)
    tokens = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    position_ids = torch.arange(width).repeat(shape[0], 1)
    where: list[tuple[int, int, int, int]] = []
    outside: list[tuple[int, int, int, int, int]] = []
    bounds = [0]
    for index, row in enumerate(rows):
        line, start = (0, bounds[-1]) if packed else (index, 0)
        end = start + lengths[index]
        tokens[line, start:end] = row.tokens[:-1]
        target = row.tokens[1:].clone()
        target[target == PLACEHOLDER] = IGNORE_INDEX
        target[: 1 + index % 2] = IGNORE_INDEX  # two rows of a group
        labels[line, start:end] = target
        if packed:
            position_ids[line, start : start + padded[index]] = torch.arange(padded[index])
        where += [(line, start + s, index, tile) for tile, s in enumerate(row.starts)]
        outside += [
            (line, start + first, start + stop, index, tile)
            for tile, (first, stop) in enumerate(row.attended)
        ]
        bounds.append(start + padded[index])
    if packed and bounds[-1] < width:
        position_ids[0, bounds[-1] :] = torch.arange(width - bounds[-1])
        bounds.append(width)
        lengths.append(0)
    media = {}
    if where:
        lines, positions, samples, tiles = torch.tensor(where).unbind(1)
        with_tiles = [row for row in rows if row.starts]
        media[IMAGE] = Media(
            values=torch.cat([row.tiles[: len(row.starts)] for row in with_tiles]),
            rows=lines,
            positions=positions,
            samples=samples,
            items=torch.zeros_like(lines),
            tiles=tiles,
            placeholder_id=PLACEHOLDER,
            tokens_per_item=with_tiles[0].tokens_per_tile,
        )
    if outside:
        media[ATTENDED] = _attended(rows, torch.tensor(outside))
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        position_ids=position_ids,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        sample_ids=torch.arange(first_id, first_id + len(rows)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if packed else None,
        media=media,
    )


def _attended(rows: list[_Row], outside: Tensor) -> Media:
    """Tiles for cross-attention, two an image; outside: [n, (row, start, stop, sample, tile)]."""
    lines, positions, ends, samples, tiles = outside.unbind(1)
    with_tiles = [row for row in rows if row.attended]
    return Media(
        values=torch.cat([row.tiles[len(row.starts) :] for row in with_tiles]),
        rows=lines,
        positions=positions,
        samples=samples,
        items=tiles // 2,
        tiles=tiles % 2 + 1,
        placeholder_id=-1,
        tokens_per_item=with_tiles[0].tokens_per_tile,
        ends=ends,
        tag_ids=torch.cat([row.tags for row in with_tiles]),
    )
