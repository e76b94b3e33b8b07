"""The columns of media that each position of the decoder may see, and attention over them.

A span is (first column, last column + 1): two numbers a position instead of a mask of all pairs.
They live on the host, where they decide which keys a block of queries reads without waiting for
the device. The columns are the keys of a micro-batch's media as one list, tile by tile: the tag's
embeddings where the keys hold them, then the features.

With tiles of 4 keys, two tiles in image A and one in image B, and text_sees="preceding":

    column          0       4       8      12
                    | A, 1  | A, 2  | B, 1  |
    position        |       |       |       |
    word            .       .       .       .      span (0, 0): there is no image yet
    tag of A, 1     #########       .       .      span (0, 4)
    tag of A, 2     .       #########       .      span (4, 8)
    word            #################       .      span (0, 8)
    tag of B, 1     .       .       #########      span (8, 12)
    word            #########################      span (0, 12)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch, Media
from nvmm.config.choices import require
from nvmm.modules.masks import QUERY_BLOCK, bias_of, made_again

TextSees = Literal["preceding", "last", "nothing", "preceding_or_first"]


def key_bounds(media: Media) -> list[int]:
    """Return the first key of every tile of attended media and the number of keys, n + 1 in all."""
    lengths = torch.full((media.positions.numel(),), media.tokens_per_item)
    if media.tag_ids is not None:
        lengths = lengths + (media.tag_ids >= 0).sum(1).cpu()
    return [0, *lengths.cumsum(0).tolist()]


def query_spans(
    media: Media, batch: Batch, text_sees: TextSees = "preceding", num_following: int = 0
) -> Tensor:
    """Return each position's span of keys, int32 [s + num_following, b, 2] on the host.

    Equal ends mean that it sees none. Tokens of a tile's tag see that tile alone. Other words see
    nothing before the first image of their own text. From an image's last tag on, `text_sees`
    decides: all images so far ("preceding"), the one before the word ("last"), or none ("nothing").
    With "preceding_or_first" that is all images so far, and words before the first one see it too
    (Audio Flamingo). Packed neighbours see nothing of each other.

    num_following: positions after the row's end to add, as decoding appends them to padded rows.
    Raises ValueError when the tiles are not in the order of their texts and items.
    """
    require("model.cross_attention.text_sees", text_sees, TextSees)
    b, s = batch.tokens.shape
    spans = torch.zeros(s + num_following, b, 2, dtype=torch.int32)
    bounds = key_bounds(media)
    # The end of each text: its row's end, or its segment's in a packed row.
    stops = [s + num_following] * b
    if batch.cu_seqlens is not None:
        stops = batch.cu_seqlens[1:].tolist()
    starts = [0] * b if batch.cu_seqlens is None else batch.cu_seqlens[:-1].tolist()
    text_first, previous = 0, (-1, -1)
    for text, item, tiles in _items(media):
        if (text, item) <= previous:
            raise ValueError(f"attended tiles are not in order: {previous}, then {(text, item)}")
        low, high = bounds[tiles[0][0]], bounds[tiles[-1][0] + 1]
        is_first, previous = text != previous[0], (text, item)
        row, end = tiles[0][1], max(tile[3] for tile in tiles)
        if is_first:
            text_first = low
            if text_sees == "preceding_or_first":
                spans[starts[text] : end, row] = torch.tensor([low, high], dtype=torch.int32)
        # Words behind the image, up to the end of their text; a later image overwrites its part.
        if text_sees != "nothing":
            first = low if text_sees == "last" else text_first
            spans[end : stops[text], row] = torch.tensor([first, high], dtype=torch.int32)
        for number, _, start, stop in tiles:
            tile_span = torch.tensor(bounds[number : number + 2], dtype=torch.int32)
            spans[start:stop, row] = tile_span
    return spans


def _items(media: Media) -> Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """Yield (text, item, tiles); a tile is (number, row, tag's first and last + 1 position)."""
    assert media.ends is not None
    fields = (media.texts, media.items, media.rows, media.positions, media.ends)
    rows = enumerate(torch.stack(fields, dim=1).tolist())
    for (text, item), tiles in itertools.groupby(rows, key=lambda row: tuple(row[1][:2])):
        yield text, item, [(number, *values[2:]) for number, values in tiles]


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T) v over each query's own span of keys; 0 for a query that sees none.

    Works on blocks of queries: a block reads the keys between its first and last one, and needs a
    mask of that size only where its queries differ in what they see.

    Args:
        query: [s, b, heads, d].
        key, value: [n, groups, d], the keys of all rows.
        spans: int32 [s, b, 2] on the host.
        scale: of the products; None for 1 / sqrt(d).

    Returns: [s, b, heads * d].
    """
    blocks = zip(query.split(QUERY_BLOCK), spans.split(QUERY_BLOCK), strict=True)
    return torch.cat([_block(q, key, value, block, scale, dropout) for q, block in blocks])


def _block(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float | None, dropout: float
) -> Tensor:
    first, last = spans.unbind(-1)
    seen = first < last
    low = torch.where(seen, first, key.shape[0]).amin(0)
    width = int((torch.where(seen, last, 0).amax(0) - low).max())
    if width <= 0:
        return query.new_zeros(*query.shape[:2], query[0, 0].numel())
    columns = low[:, None] + torch.arange(width)
    bias: Tensor | None = None
    again: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not bool((seen & (first == low) & (last == low + width)).all()):
        # [s, b, width] -> [b, 1, s, width]. A softmax over no key is NaN, so a query that sees
        # nothing sees all here, and its result is set to 0 at the end.
        def make() -> Tensor:
            inside = (columns >= first[..., None]) & (columns < last[..., None]) | ~seen[..., None]
            return bias_of(inside.transpose(0, 1).unsqueeze(1).to(query.device), query.dtype)

        bias = make()
        again = made_again(bias, make)
    index = columns.clamp(max=key.shape[0] - 1).to(query.device)
    repeat = query.shape[2] // key.shape[1]
    k, v = (x[index].transpose(1, 2).repeat_interleave(repeat, dim=1) for x in (key, value))
    with again:
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )
    out = out.permute(2, 0, 1, 3).flatten(2)
    if bias is None:
        return out
    return out.masked_fill(~seen[..., None].to(out.device), 0.0)
