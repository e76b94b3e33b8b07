"""Images, tiles and sounds of a question, small enough for a line of images.jsonl."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from nvmm.batch import ATTENDED, MediaKind, TextMedia

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.record import Record

MAX_IMAGES = 12
"""The number of a benchmark's samples whose images and sounds are kept for the report."""
_IMAGE_SIZE, _TILE_SIZE = 640, 112
_RATE = 16_000
"""Samples a second of a sound on the page, at most."""


def image_fields(record: Record, media: Mapping[MediaKind, TextMedia]) -> dict[str, Any]:
    """Return the fields of a line of `images.jsonl` from which its first image is drawn.

    Args:
        record: the shard's sample, as its builder reads it.
        media: the media that a sample builder has made of it.

    Returns: {image: base64 PNG of the image, tiles: [base64 PNG of each tile, the grid
    row-major, then the thumbnail], grid: [cols, rows]}, images made smaller for the page;
    empty if the sample has none.
    """
    from PIL.Image import fromarray

    from nvmm.data.samples.images import choose_grid

    # 1. Take the first image.
    kinds = [kind for kind in media if kind.modality == "image"]
    image = record.first_image() if kinds else None
    if image is None:
        return {}
    # 2. Take its tiles. They may be in the sequence or outside of it; a thumbnail comes last.
    kinds.sort(key=lambda kind: kind.placement != ATTENDED)
    items, tiles, values = (
        torch.cat([getattr(media[kind], name) for kind in kinds])
        for name in ("items", "tiles", "values")
    )
    # 3. The media do not say the grid, but their number of tiles allows one alone.
    count = max(1, int((tiles[items == 0] != 0).sum()))
    grid = choose_grid(image.width, image.height, min_tiles=count, max_tiles=count)
    shown = [fromarray(tile.permute(1, 2, 0).numpy()) for tile in values[items == 0]]
    return {
        "image": _encode(image, _IMAGE_SIZE),
        "tiles": [_encode(tile, _TILE_SIZE) for tile in shown],
        "grid": list(grid),
    }


def sound_fields(builder: Builder, members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a line of `images.jsonl` from which the last sound is drawn and played.

    Returns: {sound: base64 WAV of what is heard, spectrogram: base64 PNG of what the encoder gets};
    empty where the sample has no sound.
    """
    from nvmm.data.samples.drawn_sounds import spectrogram_png, wav

    heard = builder.heard(members)
    if not heard:
        return {}
    front = cast("Any", builder).front_end
    windows = front.log_mel(front.windows(heard[-1]))
    drawn = {
        "sound": wav(heard[-1], front.rate, _RATE),
        "spectrogram": spectrogram_png(windows, front.hop_samples / front.frame_hop),
    }
    return {name: base64.b64encode(data).decode() for name, data in drawn.items()}


def _encode(image: Image, size: int) -> str:
    """Return an image as base64 PNG, at most `size` pixels wide and high."""
    image = image.convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
