"""Samples -> one micro-batch: padding or packing, and the label shift (here and nowhere else)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, Batch, Media, Sample, SampleMedia


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    pad_multiple: int = 1,
    segment_multiple: int = 1,
    packed: bool = False,
) -> Batch:
    """Padded rows [b, s], or with `packed` one row [1, s] of segments.

    s is rounded up to `pad_multiple`, each segment of a packed row to `segment_multiple` (what the
    layout needs: `Parallel.sequence_multiple`, `Parallel.segment_multiple`). Label t is token t + 1
    of the same sample; a sample's last position, padding, and every label of weight 0 are
    IGNORE_INDEX. Raises ValueError naming the samples when media of one kind disagree on their
    placeholder.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    if any(sample.segments for sample in samples):
        texts = [text for sample in samples for text in _texts(sample)]
        batch = collate(
            texts,
            pad_id=pad_id,
            pad_multiple=pad_multiple,
            segment_multiple=segment_multiple,
            packed=packed,
        )
        return batch.replace(
            sample_ids=torch.tensor([sample.sample_id for sample in samples]),
            extras={
                name: torch.cat([sample.extras[name] for sample in samples])
                for name in samples[0].extras
            },
        )
    if pad_multiple < 1 or segment_multiple < 1 or pad_multiple % segment_multiple:
        raise ValueError(
            f"pad_multiple={pad_multiple} must be a multiple of"
            f" segment_multiple={segment_multiple}, both at least 1"
        )
    sizes = [len(sample.tokens) for sample in samples]
    padded = [_round_up(size, segment_multiple) for size in sizes]
    rows, width = (1, sum(padded)) if packed else (len(samples), max(sizes))
    width = _round_up(width, pad_multiple)

    tokens = torch.full((rows, width), pad_id, dtype=torch.int64)
    labels = torch.full((rows, width), IGNORE_INDEX, dtype=torch.int64)
    loss_mask = torch.zeros(rows, width, dtype=torch.float32)
    position_ids = torch.arange(width).repeat(rows, 1)
    places: list[tuple[int, int]] = []
    offset = 0
    for number, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        row, start = (0, offset) if packed else (number, 0)
        places.append((row, start))
        offset += padded[number]
        tokens[row, start : start + size] = sample.tokens
        weights = sample.loss_mask[1:]
        loss_mask[row, start : start + size - 1] = weights
        labels[row, start : start + size - 1] = sample.tokens[1:].masked_fill(
            weights == 0, IGNORE_INDEX
        )
        if packed:
            position_ids[row, start : start + padded[number]] = torch.arange(padded[number])

    cu_seqlens = None
    if packed:
        if width > offset:
            position_ids[0, offset:] = torch.arange(width - offset)
            padded.append(width - offset)
            sizes.append(0)
        cu_seqlens = torch.tensor([0, *padded]).cumsum(0).to(torch.int32)
    batch = Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=position_ids,
        lengths=torch.tensor(sizes, dtype=torch.int32),
        sample_ids=torch.tensor([sample.sample_id for sample in samples]),
        cu_seqlens=cu_seqlens,
        media=_media(samples, places),
    )
    check_shift(batch, [f"{sample.source} (sample {sample.sample_id})" for sample in samples])
    return batch


def _texts(sample: Sample) -> list[Sample]:
    """A sample of several texts as samples of one."""
    if sample.media:
        raise ValueError(f"{sample.source}: a sample of several texts cannot have media yet")
    return [
        dataclasses.replace(sample, tokens=tokens, loss_mask=loss_mask, segments=(), extras={})
        for tokens, loss_mask in zip(
            sample.tokens.split(list(sample.segments)),
            sample.loss_mask.split(list(sample.segments)),
            strict=True,
        )
    ]


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


def _media(samples: Sequence[Sample], places: Sequence[tuple[int, int]]) -> dict[str, Media]:
    merged: dict[str, Media] = {}
    for kind in sorted({kind for sample in samples for kind in sample.media}):
        having = [
            (number, sample.media[kind], *places[number])
            for number, sample in enumerate(samples)
            if kind in sample.media
        ]
        formats = {(media.placeholder_id, media.tokens_per_item) for _, media, _, _ in having}
        if len(formats) > 1:
            names = ", ".join(samples[number].source for number, *_ in having)
            raise ValueError(
                f"media {kind} of {names} differ in (placeholder_id, tokens_per_item): "
                f"{sorted(formats)}"
            )
        placeholder_id, tokens_per_item = formats.pop()
        counts = torch.tensor([len(media.positions) for _, media, _, _ in having])

        def spread(values: list[int], counts: Tensor = counts) -> Tensor:
            return torch.repeat_interleave(torch.tensor(values), counts)

        merged[kind] = Media(
            values=torch.cat([media.values for _, media, _, _ in having]),
            rows=spread([row for _, _, row, _ in having]),
            positions=torch.cat([media.positions + start for _, media, _, start in having]),
            samples=spread([number for number, *_ in having]),
            items=torch.cat([media.items for _, media, _, _ in having]),
            tiles=torch.cat([media.tiles for _, media, _, _ in having]),
            placeholder_id=placeholder_id,
            tokens_per_item=tokens_per_item,
            **_attended([(media, start) for _, media, _, start in having]),
        )
    return merged


def _attended(parts: Sequence[tuple[SampleMedia, int]]) -> dict[str, Tensor]:
    """`ends` and `tag_ids` of attended media, samples moved by their starts."""
    ends = [media.ends + start for media, start in parts if media.ends is not None]
    tags = [media.tag_ids for media, _ in parts if media.tag_ids is not None]
    merged = {"ends": torch.cat(ends)} if ends else {}
    if tags:
        width = max(ids.shape[1] for ids in tags)
        merged["tag_ids"] = torch.cat([F.pad(t, (0, width - t.shape[1]), value=-1) for t in tags])
    return merged
