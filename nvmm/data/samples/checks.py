"""Samples that must not be trained on, refused by shard and key whatever builder made them.

The label shift has its own guard in `nvmm.data.collate`, where it happens.
"""

from __future__ import annotations

from torch import Tensor

from nvmm.batch import MediaKind, Sample, Text, TextMedia


def check_sample(sample: Sample) -> None:
    """Raise ValueError, naming shard, key and number, for a sample that would train wrongly.

    Such a sample has a text without tokens, no supervised token, or another number of placeholders
    than its media have features, or a media span that is cut by the sample's end or has text
    inside, or tags of attended media outside of it.
    """
    where = f"{sample.source} (sample {sample.sample_id})"
    for text in sample.texts:
        if not len(text.tokens):
            raise ValueError(f"{where}: a text has no tokens")
        if len(text.weights) != len(text.tokens):
            raise ValueError(
                f"{where}: {len(text.weights)} weights in the loss mask for"
                f" {len(text.tokens)} tokens"
            )
        for kind, media in text.media.items():
            if media.ends is not None:
                _check_attended(len(text.tokens), media, media.ends, where)
            else:
                _check_placed(text, kind, media, where)
    # The first token follows nothing: its weight never meets a label.
    if not any(bool((text.weights[1:] != 0).any()) for text in sample.texts):
        raise ValueError(
            f"{where}: no supervised token; its answer is empty, cut off or not an assistant turn"
        )


def _check_attended(size: int, media: TextMedia, ends: Tensor, where: str) -> None:
    """Raise ValueError unless every tile of attended media has a tag within the text."""
    inside = (media.positions >= 0) & (media.positions <= ends) & (ends <= size)
    if len({len(media.values), len(media.positions), len(ends)}) > 1 or not bool(inside.all()):
        tags = list(zip(media.positions.tolist(), ends.tolist(), strict=False))
        raise ValueError(
            f"{where}: tags of {len(media.values)} attended tiles at {tags}; each must lie within"
            f" the text's {size} tokens"
        )


def _check_placed(text: Text, kind: MediaKind, media: TextMedia, where: str) -> None:
    """Raise ValueError unless the placeholders in the text are those that the tiles need."""
    size, lengths = len(text.tokens), media.num_features
    ends = media.positions + lengths
    if len(media.positions) and int(ends.max()) > size:
        last = int(ends.argmax())
        raise ValueError(
            f"{where}: truncated media span: {kind.modality} placeholders"
            f" {int(media.positions[last])}..{int(ends[last]) - 1}, the text ends after {size}"
            " tokens"
        )
    placeholders = text.tokens == media.placeholder_id
    count, features = int(placeholders.sum()), int(lengths.sum())
    if count != features:
        each = media.tokens_per_item if media.counts is None else lengths.tolist()
        raise ValueError(
            f"{where}: {count} placeholders (id {media.placeholder_id}) for {features}"
            f" {kind.modality} features ({len(media.values)} tiles x {each})"
        )
    for tile, (start, end) in enumerate(zip(media.positions.tolist(), ends.tolist(), strict=True)):
        if not bool(placeholders[start:end].all()):
            raise ValueError(
                f"{where}: {kind.modality} tile {tile} has other tokens among its placeholders"
                f" {start}..{end - 1}"
            )
