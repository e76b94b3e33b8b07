"""Tiling against the published vectors, and what decoding refuses."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import choose_grid, decode_image, read_size, tile_image
from tests.data.conftest import image_bytes

# (width, height): grid with 6 tiles, grid with 12
GRIDS = {
    (448, 448): ((1, 1), (1, 1)),
    (633, 633): ((1, 1), (1, 1)),
    (634, 634): ((2, 2), (2, 2)),
    (896, 896): ((2, 2), (2, 2)),
    (1024, 768): ((3, 2), (4, 3)),
    (640, 480): ((3, 2), (4, 3)),
    (1920, 1080): ((2, 1), (4, 2)),
    (1080, 1920): ((1, 2), (2, 4)),
    (2000, 1000): ((2, 1), (4, 2)),
    (600, 300): ((2, 1), (2, 1)),
    (896, 1344): ((2, 3), (2, 3)),
    (300, 100): ((3, 1), (3, 1)),
    (100, 2000): ((1, 6), (1, 12)),
}


@pytest.mark.parametrize("size", GRIDS)
def test_grids_of_the_reference(size: tuple[int, int]) -> None:
    assert choose_grid(*size, max_tiles=6) == GRIDS[size][0]
    assert choose_grid(*size, max_tiles=12) == GRIDS[size][1]


def test_grid_scales_with_the_tile_size() -> None:
    assert choose_grid(45, 45, tile_size=32) == (1, 1)
    assert choose_grid(46, 46, tile_size=32) == (2, 2)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((10, 8), (1, 1)),  # 80 pixels: more than half of one tile's 64, not of four
        ((15, 12), (2, 2)),  # 180: half of four tiles is 128, of six 192
        ((20, 16), (3, 2)),  # 320
        ((8, 5), (3, 2)),  # nearer to 3 : 2 than to 1 : 1, at any size
        ((6, 5), (1, 1)),
    ],
)
def test_of_grids_as_near_the_image_s_pixels_decide(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """5 : 4 lies as far from 1 : 1 as from 3 : 2."""
    assert choose_grid(*size, tile_size=8) == grid


def test_grid_respects_min_tiles() -> None:
    assert choose_grid(448, 448, min_tiles=2) == (2, 2)
    assert choose_grid(448, 448, max_tiles=1) == (1, 1)


def test_grid_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="min_tiles=3, max_tiles=2"):
        choose_grid(10, 10, min_tiles=3, max_tiles=2)
    with pytest.raises(ValueError, match="image of 0x10 pixels"):
        choose_grid(0, 10)


def quadrants() -> Image.Image:
    """2x2 squares of 8 pixels: red, green / blue, white."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 0] = pixels[:8, 8:, 1] = pixels[8:, :8, 2] = 255
    pixels[8:, 8:] = 255
    return Image.fromarray(pixels)


def test_tiles_are_row_major_and_the_thumbnail_is_last() -> None:
    cut = tile_image(quadrants(), tile_size=8)
    assert cut.grid == (2, 2)
    assert cut.values.shape == (5, 3, 8, 8)
    assert cut.values.dtype == torch.uint8
    assert cut.tiles.tolist() == [1, 2, 3, 4, 0]
    centres = cut.values[:4, :, 4, 4].tolist()
    assert centres == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    small = np.asarray(quadrants().resize((8, 8), Image.Resampling.BICUBIC), int)
    assert np.abs(cut.values[4].permute(1, 2, 0).numpy() - small).max() <= 2


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_of_a_grid_that_is_not_square(turned: bool) -> None:
    """Six squares of a colour each, in reading order; the thumbnail shows all of them."""
    colours = np.arange(18).reshape(2, 3, 3) * 14
    if turned:
        colours = colours.transpose(1, 0, 2)
    rows, cols = colours.shape[:2]
    pixels = colours.repeat(24, 0).repeat(24, 1).astype(np.uint8)
    cut = tile_image(Image.fromarray(pixels), tile_size=8)
    assert cut.grid == (cols, rows) and cut.tiles.tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert cut.values[:6, :, 4, 4].tolist() == colours.reshape(6, 3).tolist()
    small = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC), int)
    assert np.abs(cut.values[6].permute(1, 2, 0).numpy() - small).max() <= 2


def test_the_thumbnail_is_made_of_the_image_s_own_pixels() -> None:
    """Not of the grid's, which were resized before: fine patterns would show twice blurred."""
    image = Image.open(io.BytesIO(image_bytes(90, 40)))
    cut = tile_image(image, tile_size=8)
    assert cut.grid == (2, 1)
    alone = tile_image(image, tile_size=8, max_tiles=1).values[0]
    assert torch.equal(cut.values[-1], alone)
    small = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), int)
    assert np.abs(cut.values[-1].permute(1, 2, 0).numpy() - small).max() <= 2


def test_one_tile_has_no_thumbnail() -> None:
    cut = tile_image(quadrants(), max_tiles=1, tile_size=8)
    assert cut.values.shape[0] == 1
    assert cut.tiles.tolist() == [0]


def test_thumbnail_can_be_left_out() -> None:
    assert tile_image(quadrants(), tile_size=8, use_thumbnail=False).tiles.tolist() == [1, 2, 3, 4]


def test_grey_and_palette_images_equal_their_rgb_form() -> None:
    grey = Image.open(io.BytesIO(image_bytes(50, 20, mode="L")))
    palette = quadrants().quantize(4)
    for image in (grey, palette):
        own = tile_image(image, tile_size=8).values
        assert torch.equal(own, tile_image(image.convert("RGB"), tile_size=8).values)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_decodes_the_allowed_formats(kind: str) -> None:
    assert decode_image(image_bytes(20, 10, kind=kind), source="s:k").size == (20, 10)


def test_damaged_image_names_its_source() -> None:
    data = image_bytes(40, 40)
    for damaged in (b"", b"no image", data[: len(data) // 2]):
        with pytest.raises(ValueError, match=r"a\.tar:key\.png: cannot decode"):
            decode_image(damaged, source="a.tar:key.png")


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("decompressed")

    data = image_bytes(40, 30)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match=r"s:k: image of 40x30 pixels exceeds max_pixels=1000"):
        decode_image(data, source="s:k", max_pixels=1000)


def test_other_formats_are_refused() -> None:
    bitmap = io.BytesIO()
    quadrants().save(bitmap, "PPM")
    with pytest.raises(ValueError, match="allowed are PNG, JPEG, WEBP"):
        decode_image(bitmap.getvalue(), source="s:k")


def weights(before: int, after: int) -> np.ndarray:
    """Rows of Pillow's bicubic filter (Keys, a = -0.5), widened where the image shrinks."""
    scale = before / after
    width = max(scale, 1.0)
    distance = (np.arange(before) + 0.5 - (np.arange(after)[:, None] + 0.5) * scale) / width
    x = np.abs(distance)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    rows = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(60, 40), (40, 90), (200, 180)])
def test_tiles_are_resized_by_pillows_filter(size: tuple[int, int]) -> None:
    """Against the filter's formula in float, and Pillow's own on a smooth image."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)]
    image = Image.fromarray(np.stack(waves, -1).round().astype(np.uint8))
    tile = tile_image(image, max_tiles=1, tile_size=64).values[0].permute(1, 2, 0).numpy()
    exact = (
        weights(size[1], 64) @ np.asarray(image, float).transpose(2, 0, 1) @ weights(size[0], 64).T
    )
    assert np.abs(tile - exact.transpose(1, 2, 0)).max() < 1.6
    pillow = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), int)
    assert np.abs(tile - pillow).max() <= 2


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


CLEAR = solid("RGBA", (255, 0, 0, 0))
SEEN_THROUGH = solid("P", 0)
SEEN_THROUGH.putpalette([10, 20, 30, 200, 100, 50])
DEEP = Image.fromarray(np.full((8, 8), 0xABCD, np.uint16))
MODES = {
    "bits": (encoded(solid("1", 1), "PNG"), (255, 255, 255)),
    "grey": (encoded(solid("L", 77), "PNG"), (77, 77, 77)),
    "grey and alpha": (encoded(solid("LA", (0, 51)), "PNG"), (204, 204, 204)),
    "16-bit grey": (encoded(DEEP, "PNG"), (0xAB, 0xAB, 0xAB)),
    "palette": (encoded(SEEN_THROUGH, "PNG"), (10, 20, 30)),
    "clear palette": (encoded(SEEN_THROUGH, "PNG", transparency=0), (255, 255, 255)),
    "half clear palette": (encoded(SEEN_THROUGH, "PNG", transparency=b"\x80"), (132, 137, 142)),
    "clear": (encoded(CLEAR, "PNG"), (255, 255, 255)),
    "clear WebP": (encoded(CLEAR, "WEBP", lossless=True, exact=True), (255, 255, 255)),
    "alpha": (encoded(solid("RGBA", (0, 100, 200, 51)), "PNG"), (204, 224, 244)),
    "lossless WebP": (encoded(solid("RGB", (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
    "grey JPEG": (encoded(solid("L", 99), "JPEG"), (99, 99, 99)),
    # cyan ink takes red away, black ink everything
    "CMYK": (encoded(solid("CMYK", (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
    "CMYK, black ink": (encoded(solid("CMYK", (0, 0, 0, 155)), "JPEG", quality=100), (100,) * 3),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_colour_one_sees(name: str) -> None:
    data, colour = MODES[name]
    image = decode_image(data, source="s:k")
    assert image.mode in ("L", "RGB")
    tile = tile_image(image, max_tiles=1, tile_size=8).values[0]
    seen = tile.permute(1, 2, 0).reshape(-1, 3).unique(dim=0).tolist()
    assert len(seen) == 1
    slack = 1 if "CMYK" in name or "JPEG" in name else 0
    assert all(abs(a - b) <= slack for a, b in zip(seen[0], colour, strict=True)), seen


def test_16_bit_colours_keep_their_upper_byte() -> None:
    """As 16-bit grey does. The file is written by hand: Pillow writes no 16-bit colours."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0xABCD, 0x00FF, 0xFF00, 0x8000, 0x7FFF, 0x0100)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    image = decode_image(data, source="s:k")
    assert np.asarray(image).tolist() == [[[0xAB, 0, 0xFF], [0x80, 0x7F, 1]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientations_become_upright(orientation: int, kind: str) -> None:
    """An image stored turned or mirrored, as cameras do, shows as it was taken."""
    upright = np.asarray(quadrants().resize((32, 16), Image.Resampling.NEAREST))
    # EXIF says where row 0 and column 0 of the stored pixels lie in the upright image
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encoded(image, kind, exif=exif, **options)
    shown = decode_image(data, source="s:k")
    assert shown.size == (32, 16) == read_size(data, source="s:k")
    corners = np.asarray(shown)[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert np.abs(corners - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3]).max() < 30


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_images_are_bad_samples(kind: str, part: float) -> None:
    data = image_bytes(64, 48, kind=kind)
    with pytest.raises(BadSample, match=r"^s\.tar:k: cannot decode"):
        decode_image(data[: int(len(data) * part)], source="s.tar:k")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_kinds_of_pictures_are_read(kind: str) -> None:
    image = quadrants()
    decoded = decode_image(encoded(image, kind), source="s:k")
    assert np.array_equal(np.asarray(decoded.convert("RGB")), np.asarray(image.convert("RGB")))
    assert read_size(encoded(image, kind), source="s:k") == image.size


def test_tiffs_that_would_look_otherwise_are_refused() -> None:
    grey = Image.fromarray(np.full((4, 6), 0x1234, np.uint16))
    assert np.asarray(decode_image(encoded(grey, "TIFF"), source="s:k")).max() == 0x12
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (6, 4)), "TIFF", exif=exif)
    assert decode_image(turned, source="s:k").size == read_size(turned, source="s:k") == (4, 6)
    pages = encoded(grey, "TIFF", save_all=True, append_images=[grey])
    with pytest.raises(ValueError, match=r"s:k: .*TIFF of 2 pages"):
        decode_image(pages, source="s:k")
    entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    inverted = encoded(grey, "TIFF").replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    with pytest.raises(ValueError, match=r"s:k: .*inverted: True"):
        decode_image(inverted, source="s:k")


def test_odd_metadata_leave_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (6, 4), (9, 8, 7))
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "a" * (3 << 20), zip=True)
    jpeg = encoded(image, "JPEG", exif=exif)
    for data in (
        jpeg.replace(b"MM\0*", b"XX\0*").replace(b"II*\0", b"XX*\0"),
        encoded(image, "JPEG", exif=b"Exif\0\0I"),
        encoded(image, "PNG", exif=b"Exif\0\0junkjunkjunk"),
        encoded(image, "PNG", pnginfo=text),
    ):
        assert decode_image(data, source="s:k").size == read_size(data, source="s:k") == (6, 4)
    assert read_size(jpeg, source="s:k") == (4, 6)


def png16(colour_type: int, transparent: tuple[int, ...], *pixels: tuple[int, ...]) -> bytes:
    """A PNG of one row of 16-bit pixels with a transparent colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    values = [value for pixel in pixels for value in pixel]
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, 16, colour_type, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
            chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))),
            chunk(b"IEND", b""),
        )
    )


def test_a_transparent_colour_of_16_bits_shows_white() -> None:
    grey = decode_image(png16(0, (0x1234,), (0x1234,), (0x1235,)), source="s:k")
    assert np.asarray(grey).tolist() == [[255, 0x12]]
    colour = decode_image(png16(2, (1, 2, 0x3FFF), (1, 2, 0x3FFF), (1, 2, 0x4000)), source="s:k")
    assert np.asarray(colour).tolist() == [[[255, 255, 255], [0, 0, 0x40]]]


def test_whatever_a_picture_does_names_the_sample() -> None:
    palette = encoded(Image.new("P", (4, 4)), "PNG").replace(b"PLTE", b"PLTe")
    with pytest.raises(ValueError, match=r"^s:k: cannot decode image"):
        decode_image(palette, source="s:k")
