"""Samples become one micro-batch: padded or packed, with labels shifted here and nowhere else.

padded on the right     a a a a .        packed (one row)    a a a a b b c c c .
                        b b . . .        cu_seqlens          0       4   6     9 10
                        c c c . .        padding             a segment of its own, length 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, Batch, Media, MediaKind, Sample, Text, TextMedia


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    pad_multiple: int = 1,
    segment_multiple: int = 1,
    packed: bool = False,
    padding: Literal["right", "left"] = "right",
) -> Batch:
    """Return padded rows [b, s], or with `packed` one row [1, s] of segments; a text is a row.

    s is rounded up to `pad_multiple`, each segment of a packed row to `segment_multiple`; the
    layout needs these (`Parallel.sequence_multiple`, `Parallel.segment_multiple`). Label t is token
    t + 1 of the same text; a text's last position, padding, and every label of weight 0 are
    IGNORE_INDEX.

    padding: side of padded rows that is filled up. Generation pads on the left, so that the next
        tokens of all rows are one column; positions begin behind the padding.

    Raises ValueError naming the samples when a text is empty, when texts differ in their extras,
    or when media of one kind disagree on their placeholder.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    if pad_multiple < 1 or segment_multiple < 1 or pad_multiple % segment_multiple:
        raise ValueError(
            f"pad_multiple={pad_multiple} must be a multiple of"
            f" segment_multiple={segment_multiple}, both at least 1"
        )
    # 1. List all texts in order, and the sample that each belongs to.
    texts = [text for sample in samples for text in sample.texts]
    owners = [number for number, sample in enumerate(samples) for _ in sample.texts]
    sources = [f"{samples[i].source} (sample {samples[i].sample_id})" for i in owners]
    sizes = [len(text.tokens) for text in texts]
    if 0 in sizes:
        raise ValueError(f"{sources[sizes.index(0)]}: a text has no tokens")
    padded_sizes = [_round_up(size, segment_multiple) for size in sizes]
    rows, width = (1, sum(padded_sizes)) if packed else (len(texts), max(sizes))
    width = _round_up(width, pad_multiple)

    # 2. Put every text at its row and first column.
    places: list[tuple[int, int]] = []
    offset = 0
    for number, size in enumerate(sizes):
        left = width - size if padding == "left" else 0
        places.append((0, offset) if packed else (number, left))
        offset += padded_sizes[number]
    tokens = torch.full((rows, width), pad_id, dtype=torch.int64)
    labels = torch.full((rows, width), IGNORE_INDEX, dtype=torch.int64)
    loss_mask = torch.zeros(rows, width, dtype=torch.float32)
    position_ids = torch.arange(width).repeat(rows, 1)
    for text, size, room, (row, start) in zip(texts, sizes, padded_sizes, places, strict=True):
        tokens[row, start : start + size] = text.tokens
        # 3. Shift the labels: position t predicts the token after it, with that token's weight.
        weights = text.weights[1:]
        loss_mask[row, start : start + size - 1] = weights
        labels[row, start : start + size - 1] = text.tokens[1:].masked_fill(
            weights == 0, IGNORE_INDEX
        )
        if packed:
            position_ids[row, start : start + room] = torch.arange(room)
        elif padding == "left":
            position_ids[row] = (position_ids[row] - start).clamp(min=0)

    # 4. The rest of a packed row is a segment of padding, which attends to itself alone.
    cu_seqlens = None
    if packed:
        if width > offset:
            position_ids[0, offset:] = torch.arange(width - offset)
            padded_sizes.append(width - offset)
            sizes.append(0)
        cu_seqlens = torch.tensor([0, *padded_sizes]).cumsum(0).to(torch.int32)
    batch = Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=position_ids,
        lengths=torch.tensor(sizes, dtype=torch.int32),
        sample_ids=torch.tensor([sample.sample_id for sample in samples]),
        owners=torch.tensor(owners),
        cu_seqlens=cu_seqlens,
        media=_media(texts, places, sources),
        extras=_extras(texts, sources),
    )
    if padding == "right":
        check_shift(batch, sources)
    return batch


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def check_shift(batch: Batch, sources: Sequence[str] = ()) -> None:
    """Raise ValueError unless every supervised label is the next token of its own segment.

    Labels that equal the inputs at their own position (a missing shift) train a copy of the
    input and show a loss that falls to zero. `sources` names the batch's samples.
    """
    following = torch.roll(batch.tokens, -1, dims=1)
    ends = torch.zeros_like(batch.tokens, dtype=torch.bool)
    if batch.cu_seqlens is None:
        ends.scatter_(1, (batch.lengths.long() - 1).clamp(min=0)[:, None], True)
    else:
        stops = batch.cu_seqlens[:-1].long() + batch.lengths.long()
        ends[0, stops[batch.lengths > 0] - 1] = True
    supervised = batch.labels != IGNORE_INDEX
    if bool((supervised != (batch.loss_mask != 0)).any()):
        raise ValueError("Batch.loss_mask must be 0 exactly where Batch.labels is IGNORE_INDEX")
    wrong = supervised & ((batch.labels != following) | ends)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        copied = bool((batch.labels == batch.tokens)[supervised].all())
        number = row
        if batch.cu_seqlens is not None:
            number = int((batch.cu_seqlens[1:] <= column).sum())
        source = f"{sources[number]}: " if number < len(sources) else ""
        raise ValueError(
            f"{source}Batch.labels[{row}, {column}] is not the next token of its sample"
            + ("; the labels equal the inputs: they were not shifted" if copied else "")
        )


def _extras(texts: Sequence[Text], sources: Sequence[str]) -> dict[str, Tensor]:
    """Stack the extras of all texts, [num_texts, ...]; raise ValueError when their names differ."""
    for text, source in zip(texts, sources, strict=True):
        if text.extras.keys() != texts[0].extras.keys():
            raise ValueError(
                f"{source}: a text has the extras {sorted(text.extras)}, the micro-batch's first"
                f" one ({sources[0]}) {sorted(texts[0].extras)}"
            )
    return {name: torch.stack([text.extras[name] for text in texts]) for name in texts[0].extras}


def _media(
    texts: Sequence[Text], places: Sequence[tuple[int, int]], sources: Sequence[str]
) -> dict[MediaKind, Media]:
    """Join the media of all texts, kind by kind, moved to the row and first column of their text.

    Raises ValueError when texts differ in the placeholder or the format of a kind.
    """
    merged: dict[MediaKind, Media] = {}
    for kind in sorted({kind for text in texts for kind in text.media}):
        entries = [
            (number, text.media[kind], *places[number])
            for number, text in enumerate(texts)
            if kind in text.media
        ]
        formats = {
            (
                media.placeholder_id,
                media.tokens_per_item,
                media.values.dtype,
                media.values.shape[1:],
            )
            for _, media, _, _ in entries
        }
        if len(formats) > 1:
            names = ", ".join(dict.fromkeys(sources[number] for number, *_ in entries))
            raise ValueError(
                f"media {kind} of {names} differ in (placeholder_id, tokens_per_item, dtype,"
                f" shape): {sorted(map(str, formats))}"
            )
        counts = torch.tensor([len(media.positions) for _, media, _, _ in entries])

        def spread(values: list[int], counts: Tensor = counts) -> Tensor:
            return torch.repeat_interleave(torch.tensor(values), counts)

        merged[kind] = Media(
            values=torch.cat([media.values for _, media, _, _ in entries]),
            rows=spread([row for _, _, row, _ in entries]),
            positions=torch.cat([media.positions + start for _, media, _, start in entries]),
            texts=spread([number for number, *_ in entries]),
            items=torch.cat([media.items for _, media, _, _ in entries]),
            tiles=torch.cat([media.tiles for _, media, _, _ in entries]),
            placeholder_id=entries[0][1].placeholder_id,
            tokens_per_item=entries[0][1].tokens_per_item,
            **_attended([(media, start) for _, media, _, start in entries]),
            **_extents([media for _, media, _, _ in entries]),
        )
    return merged


def _extents(each: Sequence[TextMedia]) -> dict[str, Tensor]:
    """Return `extents` and `counts` where a text has them; windows of others are whole."""
    if all(media.extents is None for media in each):
        return {}
    extents = [
        torch.full_like(media.positions, media.values.shape[-1])
        if media.extents is None
        else media.extents
        for media in each
    ]
    counts = [media.num_features for media in each]
    return {"extents": torch.cat(extents), "counts": torch.cat(counts)}


def _attended(media_and_starts: Sequence[tuple[TextMedia, int]]) -> dict[str, Tensor]:
    """Return `ends` and `tag_ids` of attended media, texts moved by their starts."""
    ends = [media.ends + start for media, start in media_and_starts if media.ends is not None]
    tags = [media.tag_ids for media, _ in media_and_starts if media.tag_ids is not None]
    merged = {"ends": torch.cat(ends)} if ends else {}
    if tags:
        width = max(ids.shape[1] for ids in tags)
        merged["tag_ids"] = torch.cat([F.pad(t, (0, width - t.shape[1]), value=-1) for t in tags])
    return merged
