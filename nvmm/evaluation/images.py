"""Images and tiles of a question, small enough for a line of predictions.jsonl."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nvmm.batch import ATTENDED, MediaKind, TextMedia

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 12
"""Samples of a benchmark whose images are kept, and drawn by the report."""
_IMAGE_SIZE, _TILE_SIZE = 640, 112


def image_fields(
    members: Mapping[str, Any], media: Mapping[MediaKind, TextMedia]
) -> dict[str, Any]:
    """Return what a line of `predictions.jsonl` needs for its first image to be drawn.

    Args:
        members: of the shard's sample (extension -> bytes).
        media: what a sample builder has made of it.

    Returns: {image: base64 PNG of the image, tiles: [base64 PNG of each tile, the grid
    row-major, then the thumbnail], grid: [cols, rows]}, images made smaller for the page;
    empty if the sample has none.
    """
    from PIL.Image import fromarray

    from nvmm.data.samples.decode import IMAGES
    from nvmm.data.samples.images import choose_grid, decode_image

    kinds = [kind for kind in media if kind.modality == "image"]
    numbers = {}  # "png" alone, or numbered: "0.png", "1.png", ...
    for name in members:
        number, _, extension = name.rpartition(".")
        if extension in IMAGES and (not number or number.isdecimal()):
            numbers[name] = int(number or 0)
    if not numbers or not kinds:
        return {}
    first = min(numbers, key=numbers.__getitem__)
    image = decode_image(members[first], source=first)
    # Tiles may be in the sequence or outside of it; a thumbnail comes after its tiles.
    kinds.sort(key=lambda kind: kind.placement != ATTENDED)
    items, tiles, values = (
        torch.cat([getattr(media[kind], name) for kind in kinds])
        for name in ("items", "tiles", "values")
    )
    count = max(1, int((tiles[items == 0] != 0).sum()))
    grid = choose_grid(image.width, image.height, min_tiles=count, max_tiles=count)
    shown = [fromarray(tile.permute(1, 2, 0).numpy()) for tile in values[items == 0]]
    return {
        "image": _encode(image, _IMAGE_SIZE),
        "tiles": [_encode(tile, _TILE_SIZE) for tile in shown],
        "grid": list(grid),
    }


def _encode(image: Image, size: int) -> str:
    image = image.convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
