"""Put media features at their placeholders among the embeddings, or behind their tags.

    tiles [n, ...]      tokens of a row (_ is a placeholder)     merged row
      tile 0  -> f0     a  _  _  _  b  _  _  _  c           a f0 f0 f0 b f1 f1 f1 c
      tile 1  -> f1        |________|  |________|
                           positions = [1, 5], tokens_per_item = 3

Each tile's features [tokens_per_item, h], or the first `counts` of them, take the places of one run
of placeholders, which begins at the tile's position in its row; words keep their embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvmm.batch import Batch, Media
from nvmm.kernels.merge import merge_rows
from nvmm.modules.spans import key_bounds


def merge(hidden: Tensor, features: Tensor, media: Media, batch: Batch) -> Tensor:
    """Replace the placeholders' embeddings by features, out of place.

    Args:
        hidden: embeddings [s, b, h] of `batch.tokens`.
        features: [n, tokens_per_item, h], one row per tile of `media`.
        media: where each tile's run of placeholders begins.

    Returns: [s, b, h]; gradients flow to the other embeddings and to every feature.
    Raises ValueError, naming both numbers and the samples, when the features are not exactly as
    many as the placeholders, or a tile's position does not begin a run of them.
    """
    # 1. The connector must give as many tokens a tile as the builder left room for.
    n, length = media.values.shape[0], media.tokens_per_item
    if tuple(features.shape[:2]) != (n, length):
        raise ValueError(
            f"the encoder and connector give {features.shape[0]} tiles x {features.shape[1]}"
            f" tokens, the batch has {n} tiles x {length} placeholders; the builder's"
            " tokens_per_tile must be the model's (grid / downsample)^2"
        )
    # 2. Column and row of every feature, [features], which must be the placeholders'.
    s, b, h = hidden.shape
    places = torch.arange(length, device=hidden.device)
    columns = media.positions[:, None] + places
    rows = media.rows[:, None].expand_as(columns)
    values = features
    if media.counts is not None:
        # Of a window that ends in silence the last features are nobody's.
        kept = places < media.counts[:, None]
        columns, rows, values = columns[kept], rows[kept], features[kept]
    _check(columns.flatten(), rows.flatten(), media, batch)
    # 3. Hidden states are [s, b]: the flat index of (column, row) is column * b + row.
    index = (columns * b + rows).flatten()
    values = values.reshape(-1, h).to(hidden.dtype)
    return merge_rows(hidden.reshape(s * b, h), values, index).view(s, b, h)


def behind_tags(features: Tensor, tags: Tensor, media: Media) -> Tensor:
    """Put each tile's features behind the embeddings of its tag, tile by tile.

    Args:
        features: [n, tokens_per_item, h], one row per tile of `media`.
        tags: embeddings [t, h] of the tokens in `media.tag_ids`, row by row.

    Returns: [n * tokens_per_item + t, h] in the dtype of `tags`.
    """
    assert media.tag_ids is not None
    device, length = features.device, media.tokens_per_item
    words = media.tag_ids >= 0
    bounds = torch.tensor(key_bounds(media), device=device)
    of_features = bounds[1:, None] - length + torch.arange(length, device=device)
    of_tags = bounds[:-1, None] + torch.arange(words.shape[1], device=device)
    values = features.flatten(0, 1).to(tags.dtype)
    return merge_rows(tags, values, of_features.flatten(), of_tags[words])


def _check(columns: Tensor, rows: Tensor, media: Media, batch: Batch) -> None:
    """Compare the positions with the placeholders in the tokens. It waits for the device once."""
    b, s = batch.tokens.shape
    placeholders = batch.tokens == media.placeholder_id
    inside = (columns >= 0) & (columns < s) & (rows >= 0) & (rows < b)
    covered = torch.zeros_like(placeholders)
    covered[rows.clamp(0, b - 1), columns.clamp(0, s - 1)] = True
    num_features = columns.numel()
    num_placeholders, agrees = torch.stack(
        [placeholders.sum(), inside.all() & (covered == placeholders).all()]
    ).tolist()
    if num_placeholders != num_features:
        each = media.tokens_per_item if media.counts is None else media.counts.tolist()
        raise ValueError(
            f"{media.values.shape[0]} tiles x {each} tokens = {num_features}"
            f" features, but the tokens have {num_placeholders} placeholders"
            f" (id {media.placeholder_id});"
            f" samples {batch.sample_ids.tolist()}"
        )
    if not agrees:
        starts = list(zip(media.rows.tolist(), media.positions.tolist(), strict=True))
        raise ValueError(
            f"the {num_placeholders} placeholders (id {media.placeholder_id}) are not the runs of"
            f" {media.tokens_per_item} or less that begin at (row, position) {starts};"
            f" samples {batch.sample_ids.tolist()}"
        )
