"""The label shift, padding, packing, and media bookkeeping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvmm.batch import IGNORE_INDEX, IMAGE, Sample, Text, TextMedia
from nvmm.data.collate import check_shift, collate

X = IGNORE_INDEX
PLACEHOLDER = 90


def sample(tokens: list[int], weights: list[float], number: int = 0, tiles: int = 0) -> Sample:
    """`tiles` tiles of one placeholder each stand at positions 1, 2, ..."""
    media = {}
    if tiles:
        media[IMAGE] = TextMedia(
            values=torch.full((tiles, 3, 2, 2), number, dtype=torch.uint8),
            positions=torch.arange(1, tiles + 1),
            items=torch.zeros(tiles, dtype=torch.int64),
            tiles=torch.arange(tiles),
            placeholder_id=PLACEHOLDER,
            tokens_per_item=1,
        )
    text = Text(torch.tensor(tokens), torch.tensor(weights), media)
    return Sample((text,), number, f"s.tar:{number}")


LONG = sample([5, PLACEHOLDER, PLACEHOLDER, 6, 7], [0, 0, 0, 1, 0.5], 11, tiles=2)
SHORT = sample([8, 9, 4], [0, 0, 1], 22)
LAST = sample([3, PLACEHOLDER, 2], [1, 0, 1], 33, tiles=1)


def test_padded_rows() -> None:
    batch = collate([LONG, SHORT], pad_id=1, pad_multiple=4)
    assert batch.tokens.tolist() == [[5, 90, 90, 6, 7, 1, 1, 1], [8, 9, 4, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[X, X, 6, 7, X, X, X, X], [X, 4, X, X, X, X, X, X]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 0.5, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.lengths.tolist() == [5, 3]
    assert batch.sample_ids.tolist() == [11, 22]
    assert batch.cu_seqlens is None
    assert batch.num_tokens == 3


def test_packed_row_ends_in_a_padding_segment() -> None:
    batch = collate([LONG, SHORT, LAST], pad_id=1, pad_multiple=8, packed=True)
    assert batch.tokens.tolist() == [[5, 90, 90, 6, 7, 8, 9, 4, 3, 90, 2, 1, 1, 1, 1, 1]]
    # the first token of a segment is nobody's label, whatever its weight
    assert batch.labels.tolist() == [[X, X, 6, 7, X, X, 4, X, X, 2, X, X, X, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 11, 16]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths.tolist() == [5, 3, 3, 0]


def test_packed_segments_are_padded_to_a_multiple() -> None:
    batch = collate([LONG, SHORT, LAST], pad_id=1, pad_multiple=8, segment_multiple=4, packed=True)
    assert batch.tokens.tolist() == [[5, 90, 90, 6, 7, 1, 1, 1, 8, 9, 4, 1, 3, 90, 2, 1]]
    assert batch.labels.tolist() == [[X, X, 6, 7, X, X, X, X, X, 4, X, X, X, 2, X, X]]
    assert batch.position_ids.tolist() == [[*range(8), *range(4), *range(4)]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.lengths.tolist() == [5, 3, 3]
    assert batch.media[IMAGE].positions.tolist() == [1, 2, 13]
    longer = collate([SHORT, LAST], pad_id=1, pad_multiple=12, segment_multiple=4, packed=True)
    assert longer.cu_seqlens is not None
    assert longer.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert longer.lengths.tolist() == [3, 3, 0]


def test_a_label_at_the_end_of_a_padded_segment_is_refused() -> None:
    batch = collate([SHORT, LAST], pad_id=1, pad_multiple=4, segment_multiple=4, packed=True)
    labels, mask = batch.labels.clone(), batch.loss_mask.clone()
    labels[0, 2], mask[0, 2] = 1, 1.0  # the padding token that follows the first sample
    with pytest.raises(ValueError, match=r"Batch\.labels\[0, 2\] is not the next token"):
        check_shift(batch.replace(labels=labels, loss_mask=mask))


def test_packed_row_without_padding_has_no_empty_segment() -> None:
    batch = collate([SHORT, SHORT], pad_id=1, pad_multiple=3, packed=True)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 6]


@pytest.mark.parametrize("packed", [False, True])
def test_media_point_at_their_placeholders(packed: bool) -> None:
    batch = collate([LONG, SHORT, LAST], pad_id=1, packed=packed)
    media = batch.media[IMAGE]
    assert media.texts.tolist() == [0, 0, 2]
    assert media.rows.tolist() == ([0, 0, 0] if packed else [0, 0, 2])
    assert media.positions.tolist() == ([1, 2, 9] if packed else [1, 2, 1])
    assert media.values[:, 0, 0, 0].tolist() == [11, 11, 33]
    assert media.tiles.tolist() == [0, 1, 0]
    assert (batch.tokens[media.rows, media.positions] == PLACEHOLDER).all()
    assert int((batch.tokens == PLACEHOLDER).sum()) == len(media.positions)


def test_rows_longer_than_16_bits_count() -> None:
    """Borders of segments, lengths and places of media beyond 32,767."""
    one = sample([5] * 40_000, [1.0] * 40_000, tiles=1)
    media = replace(one.text.media[IMAGE], positions=torch.tensor([39_990]))
    one = replace(one, texts=(replace(one.text, media={IMAGE: media}),))
    batch = collate([one, one], pad_id=0, packed=True)
    assert batch.cu_seqlens.tolist() == [0, 40_000, 80_000]
    assert batch.lengths.tolist() == [40_000, 40_000]
    assert batch.media[IMAGE].positions.tolist() == [39_990, 79_990]
    assert int(batch.position_ids.max()) == 39_999


def test_text_only_batch_has_no_media() -> None:
    assert collate([SHORT], pad_id=1).media == {}


def test_padded_and_packed_supervise_the_same_labels() -> None:
    padded = collate([LONG, SHORT, LAST], pad_id=1)
    packed = collate([LONG, SHORT, LAST], pad_id=1, packed=True)
    for batch in (padded, packed):
        assert batch.labels[batch.labels != X].tolist() == [6, 7, 4, 2]
    assert padded.num_tokens == packed.num_tokens == 4


@pytest.mark.parametrize("packed", [False, True])
def test_labels_equal_to_the_inputs_are_refused(packed: bool) -> None:
    batch = collate([LONG, SHORT], pad_id=1, packed=packed)
    mask = torch.ones_like(batch.loss_mask)
    with pytest.raises(ValueError, match="the labels equal the inputs: they were not shifted"):
        check_shift(batch.replace(labels=batch.tokens.clone(), loss_mask=mask))


@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_label_is_named_by_its_sample(packed: bool) -> None:
    batch = collate([LONG, SHORT], pad_id=1, packed=packed)
    labels = batch.labels.clone()
    labels[labels == 4] = 3  # in SHORT
    with pytest.raises(ValueError, match=r"^second: Batch\.labels\["):
        check_shift(batch.replace(labels=labels), ["first", "second"])


def test_labels_across_a_segment_end_are_refused() -> None:
    batch = collate([SHORT, LAST], pad_id=1, packed=True)
    labels, mask = batch.labels.clone(), batch.loss_mask.clone()
    labels[0, 2], mask[0, 2] = 3, 1.0
    with pytest.raises(ValueError, match=r"Batch\.labels\[0, 2\] is not the next token"):
        check_shift(batch.replace(labels=labels, loss_mask=mask))
    with pytest.raises(ValueError, match="0 exactly where"):
        check_shift(batch.replace(loss_mask=mask))


def test_refuses_unequal_placeholders_and_nothing() -> None:
    media = {IMAGE: replace(LAST.text.media[IMAGE], placeholder_id=91)}
    other = replace(LAST, texts=(replace(LAST.text, media=media),))
    message = r"media image \(sequence\) of s\.tar:11 \(sample 11\), s\.tar:33 \(sample 33\) differ"
    with pytest.raises(ValueError, match=message):
        collate([LONG, other], pad_id=1)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_id=1)
    with pytest.raises(ValueError, match="pad_multiple=0"):
        collate([SHORT], pad_id=1, pad_multiple=0)
    with pytest.raises(ValueError, match="pad_multiple=6 must be a multiple of segment_multiple=4"):
        collate([SHORT], pad_id=1, pad_multiple=6, segment_multiple=4)
