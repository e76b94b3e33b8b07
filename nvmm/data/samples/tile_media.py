"""The tiles of a text's images become its media: in the sequence, or attended from outside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvmm.batch import ATTENDED_IMAGE, IMAGE, MediaKind, TextMedia
from nvmm.data.samples.chat import Attended, is_attended
from nvmm.data.samples.images import Tiles
from nvmm.data.samples.rendered import Rendered


def tile_media(
    images: Sequence[Tiles],
    rendered: Rendered,
    attended: Attended,
    *,
    tokens_per_tile: int,
    placeholder_id: int,
) -> dict[MediaKind, TextMedia]:
    """Return the tiles by their placement: in the sequence, or attended.

    images: the tiles of each, those that the text was rendered with.
    """
    if not images:
        return {}
    values = torch.cat([cut.values for cut in images])
    tiles = torch.cat([cut.tiles for cut in images])
    counts = torch.tensor([len(cut.tiles) for cut in images])
    items = torch.repeat_interleave(torch.arange(len(images)), counts)
    outside = torch.tensor([is_attended(tile, attended) for tile in tiles.tolist()])

    def chosen(mask: Tensor, **fields: Any) -> TextMedia:
        return TextMedia(
            values=values[mask],
            items=items[mask],
            tiles=tiles[mask],
            tokens_per_item=tokens_per_tile,
            **fields,
        )

    media = {}
    if not outside.all():
        media[IMAGE] = chosen(
            ~outside,
            positions=torch.tensor(rendered.positions),
            placeholder_id=placeholder_id,
        )
    if outside.any():
        tags = [torch.tensor(tile.tag_ids, dtype=torch.int64) for tile in rendered.attended]
        media[ATTENDED_IMAGE] = chosen(
            outside,
            positions=torch.tensor([tile.start for tile in rendered.attended]),
            placeholder_id=-1,
            ends=torch.tensor([tile.stop for tile in rendered.attended]),
            tag_ids=torch.nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=-1),
        )
    return media
