"""Features at their placeholders: places, gradients, and refusal of every mismatch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, IMAGE, Batch, Media
from nvmm.modules.merge import merge

X = 99  # the placeholder


def batch_of(rows: list[list[int]], starts: list[tuple[int, int]]) -> tuple[Batch, Media]:
    """Rows of tokens and the (row, position) of each tile's two placeholders."""
    tokens = torch.tensor(rows)
    where = torch.tensor(starts)
    media = Media(
        values=torch.zeros(len(starts), 3, 2, 2, dtype=torch.uint8),
        rows=where[:, 0],
        positions=where[:, 1],
        texts=where[:, 0],
        items=torch.zeros(len(starts), dtype=torch.long),
        tiles=torch.arange(len(starts)),
        placeholder_id=X,
        tokens_per_item=2,
    )
    batch = Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        loss_mask=torch.zeros(tokens.shape),
        position_ids=torch.arange(tokens.shape[1]).expand_as(tokens),
        lengths=torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int32),
        sample_ids=torch.arange(40, 40 + tokens.shape[0]),
        owners=torch.arange(tokens.shape[0]),
        media={IMAGE: media},
    )
    return batch, media


ROWS = [[1, X, X, 2, X, X, 3], [4, 5, 6, 7, 8, 9, 10], [11, 12, 13, X, X, 14, 15]]
STARTS = [(0, 1), (2, 3), (0, 4)]  # tiles need not be in order of appearance


def inputs(tiles: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, 4, generator=generator, requires_grad=True)
    return hidden, torch.randn(tiles, 2, 4, generator=generator, requires_grad=True)


def test_each_tile_replaces_its_own_placeholders() -> None:
    """Two images in one row, one in another, and a row of text alone."""
    batch, media = batch_of(ROWS, STARTS)
    hidden, features = inputs()
    before = hidden.detach().clone()
    out = merge(hidden, features, media, batch)
    assert torch.equal(hidden, before)
    expected = before.clone()
    for tile, (row, position) in enumerate(STARTS):
        for k in range(2):
            expected[position + k, row] = features[tile, k]
    assert torch.equal(out, expected)


def test_gradients_are_those_of_the_places() -> None:
    batch, media = batch_of(ROWS, STARTS)
    hidden, features = inputs()
    weight = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1))
    (merge(hidden, features, media, batch) * weight).sum().backward()
    kept = (batch.tokens != X).t()[..., None]
    assert torch.equal(hidden.grad, weight * kept)
    for tile, (row, position) in enumerate(STARTS):
        assert torch.equal(features.grad[tile], weight[position : position + 2, row])


def test_packed_row() -> None:
    batch, media = batch_of([ROWS[0] + ROWS[2]], [(0, 1), (0, 4), (0, 10)])
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    batch = replace(
        batch, cu_seqlens=bounds, lengths=bounds.diff(), sample_ids=torch.tensor([7, 8])
    )
    hidden = torch.zeros(14, 1, 4)
    out = merge(hidden, torch.ones(3, 2, 4), media, batch)
    assert torch.equal(out[:, 0, 0] == 1, batch.tokens[0] == X)


def test_too_few_placeholders_names_both_numbers_and_the_samples() -> None:
    rows = [row.copy() for row in ROWS]
    rows[2][4] = 0
    batch, media = batch_of(rows, STARTS)
    message = r"3 tiles x 2 tokens = 6 features, but the tokens have 5 placeholders \(id 99\)"
    with pytest.raises(ValueError, match=message + r"; samples \[40, 41, 42\]"):
        merge(*inputs(), media, batch)


def test_a_placeholder_without_a_tile_is_refused() -> None:
    rows = [row.copy() for row in ROWS]
    rows[1][0] = X
    batch, media = batch_of(rows, STARTS)
    with pytest.raises(ValueError, match="6 features, but the tokens have 7 placeholders"):
        merge(*inputs(), media, batch)


@pytest.mark.parametrize(
    "starts",
    [
        [(0, 1), (2, 3), (0, 3)],  # begins a token early
        [(0, 1), (2, 3), (0, 1)],  # twice the same run
        [(0, 1), (2, 3), (0, 6)],  # runs over the end
        [(0, 1), (3, 3), (0, 4)],  # no such row
    ],
)
def test_positions_that_begin_no_run_are_refused(starts: list[tuple[int, int]]) -> None:
    batch, media = batch_of(ROWS, starts)
    with pytest.raises(ValueError, match=r"the 6 placeholders \(id 99\) are not the runs of 2"):
        merge(*inputs(), media, batch)


def test_another_length_of_tile_names_both() -> None:
    batch, media = batch_of(ROWS, STARTS)
    hidden, features = inputs()
    with pytest.raises(ValueError, match="give 3 tiles x 1 tokens, the batch has 3 tiles x 2"):
        merge(hidden, features[:, :1], media, batch)
