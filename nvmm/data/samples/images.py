"""Images become tiles: decoding, grid choice, cutting, thumbnail (NVLM section 3.2, InternVL).

    image of 3:2    grid (cols 3, rows 2)    tiles in order       numbers
    +---------+     +--+--+--+
    |         | --> |1 |2 |3 |     -->       1 2 3 4 5 6 t        1 2 3 4 5 6 0
    |         |     +--+--+--+
    +---------+     |4 |5 |6 |               t is the thumbnail: the image resized to one tile
                    +--+--+--+

Everything here is a pure function of its arguments. Pixels stay uint8; the encoder normalises them
on its device.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from nvmm.data.samples.bad_sample import BadSample

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024
"""The default limit on width * height; a larger image is refused before it is decompressed."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> the transposition that undoes it."""
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
# Editors leave some MB of text in a PNG. Pillow refuses the picture for more than 1 MiB of it.
PngImagePlugin.MAX_TEXT_CHUNK = 6 * 1024 * 1024


class Size(NamedTuple):
    """The size of an image in pixels."""

    width: int
    height: int


ImageOrSize = Image.Image | Size
"""An image, or its size, from which its tiles can be planned."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of one image.

    values: uint8 [n, 3, tile_size, tile_size]; the grid row-major, the thumbnail last.
    tiles: int64 [n]; 1..k row-major, 0 for the thumbnail (and for the only tile of an image).
    grid: (cols, rows).
    """

    values: Tensor
    tiles: Tensor
    grid: tuple[int, int]


@lru_cache(maxsize=64)
def _candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return the grids (cols, rows) of so many tiles, those of fewer tiles first."""
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
    """Return the (cols, rows) whose aspect ratio is nearest to the image's.

    On an exact tie a grid of more tiles wins if the image has more than half its pixels
    (InternVL's rule, kept by NVLM and Megatron-LM). Sizes are in pixels.

    Raises ValueError for an empty image, and unless 1 <= min_tiles <= max_tiles.
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
    """Return the number of each tile of an image: 1..k, then 0 for the thumbnail; [0] if k is 1."""
    count = grid[0] * grid[1]
    if count == 1:
        return [0]
    return [*range(1, count + 1), *([0] if use_thumbnail else [])]


@dataclass(frozen=True)
class ImageLayout:
    """The tiles of an image, as the sequence needs to know them.

    grid: (cols, rows).
    tiles: number of each tile, 1..k row-major and 0 for the thumbnail.
    """

    grid: tuple[int, int]
    tiles: Sequence[int]

    @staticmethod
    def of(grid: tuple[int, int], *, use_thumbnail: bool = True) -> ImageLayout:
        """Return the layout of an image cut to `grid`."""
        return ImageLayout(grid, tile_indices(grid, use_thumbnail=use_thumbnail))


def square(image: ImageOrSize) -> Size:
    """Return the size of the smallest square that an image fits in."""
    side = max(image.width, image.height)
    return Size(side, side)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Put an image in the middle of a square of one colour (R, G, B), as LLaVA does.

    Of an odd margin the smaller part is above or on the left.
    """
    size = square(image)
    if image.size == size:
        return image
    padded = Image.new("RGB", size, colour)
    corner = ((size.width - image.width) // 2, (size.height - image.height) // 2)
    padded.paste(image.convert("RGB"), corner)
    return padded


def tile_image(
    image: Image.Image,
    *,
    min_tiles: int = 1,
    max_tiles: int = 6,
    tile_size: int = 448,
    use_thumbnail: bool = True,
    pad: tuple[int, int, int] | None = None,
) -> Tiles:
    """Resize an image to the chosen grid (bicubic), cut it, append the thumbnail.

    The aspect ratio is not kept and nothing is padded, unless `pad` is the colour that makes the
    image a square before. An image of one tile has no thumbnail.
    """
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if pad is not None:
        image = pad_to_square(image, pad)
    grid = choose_grid(
        image.width, image.height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    cols, rows = grid
    indices = torch.tensor(tile_indices(grid, use_thumbnail=use_thumbnail))
    values = torch.empty(len(indices), 3, tile_size, tile_size, dtype=torch.uint8)
    # The channels of a grey image are equal: one is resized, and copying spreads it to three.
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
    # The aspect ratio gives way, so that the grid's tiles cover the image without padding.
    resized = _resized(pixels, rows * tile_size, cols * tile_size)
    cut = resized.view(-1, rows, tile_size, cols, tile_size).permute(1, 3, 0, 2, 4)
    values[: rows * cols].view(rows, cols, 3, tile_size, tile_size).copy_(cut)
    # The thumbnail comes last and shows the image at the tiles' size.
    if len(indices) > rows * cols:
        values[-1] = _resized(pixels, tile_size, tile_size)
    return Tiles(values=values, tiles=indices, grid=grid)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [c, h, w] to [c, height, width].

    The filter is Pillow's antialiased bicubic one in uint8, four times as fast as Pillow's own; on
    images they agree to 2 levels of 255 (tests/data/samples/test_images.py).
    """
    if pixels.shape[1:] == (height, width):
        return pixels.contiguous()
    size = (height, width)
    return F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].contiguous()


def decode_image(data: bytes, *, source: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of a picture of `FORMATS` to an upright 8-bit image in mode RGB or L.

    EXIF's rotation is applied, as far as its data can be read; palettes and CMYK become RGB;
    transparent pixels show white; the upper 8 of 16 bits are kept, and the first frame of an
    animation.

    Raises BadSample, naming the image `source`, for damaged or truncated bytes, other formats,
    a TIFF of several pages or of 12 bits, and more than `max_pixels`, which are not decompressed.
    """
    with _open(data, source, max_pixels) as image:
        turn = _turn(image)
        image.load()
        colour = image.info.get("transparency")
        if isinstance(colour, tuple) and _has_16_bits(data):
            # Pillow keeps the upper bytes of 16-bit pixels, but all of their transparent colour.
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        return _eight_bits(image if turn is None else image.transpose(turn))


def read_size(data: bytes, *, source: str, max_pixels: int = MAX_PIXELS) -> Size:
    """Return the size that `decode_image` gives, or raise its error, from the header alone."""
    with _open(data, source, max_pixels) as image:
        turned = _turn(image) in _SIDEWAYS
        return Size(image.height, image.width) if turned else Size(image.width, image.height)


@contextmanager
def _open(data: bytes, source: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image before its pixels are read; an error from there on becomes a BadSample."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            size = f"{image.width}x{image.height}"
            raise BadSample(source, f"image of {size} pixels exceeds max_pixels={max_pixels}")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
        yield image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(source, str(error)) from error
    except (
        Exception
    ) as error:  # Pillow raises SyntaxError, KeyError, AssertionError, struct.error ...
        # Pillow's own message for this names an address in memory.
        why: object = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        reason = f"cannot decode image ({why}); allowed are {', '.join(FORMATS)}"
        raise BadSample(source, reason) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright, as far as the header tells."""
    exif = Image.Exif()
    # The pixels are sound whatever stands in the metadata.
    with suppress(Exception):
        exif.load(image.info["exif"])
        return _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
    return None


def _has_16_bits(data: bytes) -> bool:
    """Return whether a picture is a PNG of 16 bits a channel."""
    return data[:4] == b"\x89PNG" and data[24:25] == b"\x10"


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise ValueError for a TIFF that Pillow would read, but not as it looks."""
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"TIFF of {image.n_frames} pages; write each page as a picture")
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
    inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode.startswith("I;16") and (set(bits) != {16} or inverted):
        raise ValueError(f"TIFF of {bits[0]} bits, inverted: {inverted}; convert it to 8 bits")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB or L."""
    if image.mode.startswith("I;16"):
        # Pillow keeps the upper byte of 16-bit colours by itself, but not that of 16-bit grey.
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")
        return Image.fromarray(
            grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has no defined range; convert it to 8 bits a channel")
    return image.convert("RGB")
