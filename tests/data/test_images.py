"""Tiling against the published vectors, and what decoding refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nvmm.data.images import choose_grid, decode_image, tile_image
from tests.data.conftest import picture

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
    small = np.asarray(quadrants().resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(cut.values[4].permute(1, 2, 0).numpy(), small)


def test_one_tile_has_no_thumbnail() -> None:
    cut = tile_image(quadrants(), max_tiles=1, tile_size=8)
    assert cut.values.shape[0] == 1
    assert cut.tiles.tolist() == [0]


def test_thumbnail_can_be_left_out() -> None:
    assert tile_image(quadrants(), tile_size=8, use_thumbnail=False).tiles.tolist() == [1, 2, 3, 4]


def test_grey_and_palette_pictures_equal_their_rgb_form() -> None:
    grey = Image.open(io.BytesIO(picture(50, 20, mode="L")))
    palette = quadrants().quantize(4)
    for image in (grey, palette):
        own = tile_image(image, tile_size=8).values
        assert torch.equal(own, tile_image(image.convert("RGB"), tile_size=8).values)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_decodes_the_allowed_formats(kind: str) -> None:
    assert decode_image(picture(20, 10, kind=kind), source="s:k").size == (20, 10)


def test_damaged_picture_names_its_source() -> None:
    data = picture(40, 40)
    for damaged in (b"", b"no picture", data[: len(data) // 2]):
        with pytest.raises(ValueError, match=r"a\.tar:key\.png: cannot decode"):
            decode_image(damaged, source="a.tar:key.png")


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("decompressed")

    data = picture(40, 30)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match=r"s:k: image of 40x30 pixels exceeds max_pixels=1000"):
        decode_image(data, source="s:k", max_pixels=1000)


def test_other_formats_and_depths_are_refused() -> None:
    bitmap, deep = io.BytesIO(), io.BytesIO()
    quadrants().save(bitmap, "BMP")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
    with pytest.raises(ValueError, match="allowed are PNG, JPEG, WEBP"):
        decode_image(bitmap.getvalue(), source="s:k")
    with pytest.raises(ValueError, match="16-bit"):
        decode_image(deep.getvalue(), source="s:k")
