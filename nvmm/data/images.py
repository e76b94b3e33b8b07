"""Images to tiles: decoding, the grid choice, cutting, the thumbnail (NVLM section 3.2, InternVL).

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
"""Default limit on width * height; a larger picture is refused before it is decompressed."""


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Tiles:
    """One image, cut.

    values: uint8 [n, 3, tile_size, tile_size]; the grid row-major, the thumbnail last.
    tiles: int64 [n]; 1..k row-major, 0 for the thumbnail (and for the only tile of an image).
    grid: (cols, rows).
    """

    values: Tensor
    tiles: Tensor
    grid: tuple[int, int]


@lru_cache(maxsize=64)
def _candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    pairs = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= cols * rows <= max_tiles
    ]
    return tuple(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def choose_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 6, tile_size: int = 448
) -> tuple[int, int]:
    """The (cols, rows) whose aspect ratio is nearest to the image's.

    On an exact tie a grid of more tiles wins if the image has more than half its pixels
    (InternVL's rule, kept by NVLM and Megatron-LM). Sizes are in pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} pixels: both sides must be at least 1")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles={min_tiles}, max_tiles={max_tiles}: need 1 <= min <= max")
    ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for cols, rows in _candidates(min_tiles, max_tiles):
        difference = abs(ratio - cols / rows)
        if difference < best_difference:
            best, best_difference = (cols, rows), difference
        elif difference == best_difference:
            if width * height > 0.5 * tile_size * tile_size * cols * rows:
                best = (cols, rows)
    return best


def tile_indices(grid: tuple[int, int], *, use_thumbnail: bool = True) -> list[int]:
    """Place of each tile of an image: 1..k, then 0 for the thumbnail; [0] if k is 1."""
    count = grid[0] * grid[1]
    if count == 1:
        return [0]
    return [*range(1, count + 1), *([0] if use_thumbnail else [])]


def tile_image(
    image: Image.Image,
    *,
    min_tiles: int = 1,
    max_tiles: int = 6,
    tile_size: int = 448,
    use_thumbnail: bool = True,
) -> Tiles:
    """Resize the whole image to the chosen grid (bicubic), cut it, append the thumbnail.

    The aspect ratio is not kept and nothing is padded. An image of one tile has no thumbnail.
    """
    grid = choose_grid(
        image.width, image.height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    # RGB before the resize: PIL resizes palette images by nearest neighbour. The three channels
    # of a grey image are equal, so it is resized once and spread afterwards.
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    cols, rows = grid
    tiles = _resized(image, cols * tile_size, rows * tile_size)
    tiles = tiles.reshape(rows, tile_size, cols, tile_size, -1).transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(rows * cols, -1, tile_size, tile_size)
    if rows * cols > 1 and use_thumbnail:
        thumbnail = _resized(image, tile_size, tile_size).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, thumbnail[None]])
    if tiles.shape[1] == 1:
        tiles = np.broadcast_to(tiles, (len(tiles), 3, tile_size, tile_size))
    values = torch.from_numpy(np.array(tiles, order="C"))
    indices = torch.tensor(tile_indices(grid, use_thumbnail=use_thumbnail))
    return Tiles(values=values, tiles=indices, grid=grid)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return pixels.reshape(height, width, -1)


def decode_image(data: bytes, *, source: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode PNG, JPEG or WebP bytes; `source` names the picture in errors.

    Raises ValueError for damaged bytes, 16-bit and float pictures, and more than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= max_pixels:
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{source}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(
            f"{source}: cannot decode image ({error}); allowed are {', '.join(FORMATS)}"
        ) from error
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{source}: image of {image.width}x{image.height} pixels exceeds "
            f"max_pixels={max_pixels}"
        )
    if image.mode[0] in "IF":
        raise ValueError(
            f"{source}: image mode {image.mode} (16-bit or float) has no defined range; "
            "convert it to 8 bits a channel"
        )
    return image


def read_size(data: bytes, *, source: str, max_pixels: int = MAX_PIXELS) -> Size:
    """The size that `decode_image` would give, from the picture's header.

    Raises ValueError for bytes without one, and more than `max_pixels`.
    """
    try:
        size = Size(*Image.open(io.BytesIO(data), formats=FORMATS).size)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{source}: cannot read the image's size ({error})") from error
    if size.width * size.height > max_pixels:
        raise ValueError(f"{source}: image of {size} exceeds max_pixels={max_pixels}")
    return size
