"""Tiles outside the sequence: NVLM-X's and -H's samples, from shard members to a micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nvmm.batch import ATTENDED_IMAGE, IMAGE, Sample
from nvmm.data.collate import collate
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.inference.decoding import left_padded
from tests.data.conftest import chat, image_bytes, vqa
from tests.data.samples.test_instruct import builder, text

PADS = "<|vision_pad|>" * 4
END = "</Image>\nRead the number.<|im_end|>\n<|im_start|>assistant\n471<|im_end|>\n"


def made(tokenizer: Tokenizer, attended: str, members: Any = None, **options: Any) -> Sample:
    sample = builder(tokenizer, attended=attended, **options)(
        members or vqa(png=image_bytes(100, 32))
    )
    check_sample(sample)
    return sample


def test_x_has_tags_alone_in_its_text(tiny: Tokenizer) -> None:
    sample = made(tiny, "all")
    tags = "<tile_1><tile_2><tile_3><tile_global_thumbnail>"
    assert text(tiny, sample.text.tokens) == f"<|im_start|>user\n<Image>{tags}{END}"
    assert sample.text.media.keys() == {ATTENDED_IMAGE}
    media = sample.text.media[ATTENDED_IMAGE]
    assert media.values.shape == (4, 3, 32, 32)
    assert media.tiles.tolist() == [1, 2, 3, 0] and media.items.tolist() == [0] * 4
    assert media.ends is not None and media.tag_ids is not None
    own = [
        text(tiny, sample.text.tokens[start:stop])
        for start, stop in zip(media.positions.tolist(), media.ends.tolist(), strict=True)
    ]
    assert own == ["<tile_1>", "<tile_2>", "<tile_3>", "<tile_global_thumbnail>"]
    assert media.tag_ids.shape == (4, 0) and media.placeholder_id == -1


def test_h_has_the_thumbnail_in_its_text_and_tags_in_front_of_the_keys(tiny: Tokenizer) -> None:
    sample = made(tiny, "regular")
    expected = f"<|im_start|>user\n<Image><tile_global_thumbnail>{PADS}{END}"
    assert text(tiny, sample.text.tokens) == expected
    placed, media = sample.text.media[IMAGE], sample.text.media[ATTENDED_IMAGE]
    assert placed.tiles.tolist() == [0] and media.tiles.tolist() == [1, 2, 3]
    start = int(placed.positions[0])
    assert text(tiny, sample.text.tokens[start : start + 4]) == PADS
    assert media.ends is not None and media.tag_ids is not None
    assert media.positions.tolist() == media.ends.tolist()
    seen_from = {text(tiny, sample.text.tokens[: int(p)]) for p in media.positions}
    assert seen_from == {"<|im_start|>user\n<Image>"}
    shown = [text(tiny, ids[ids >= 0]) for ids in media.tag_ids]
    assert shown == ["<tile_1>", "<tile_2>", "<tile_3>"]


def test_the_pixels_are_those_of_nvlm_d(tiny: Tokenizer) -> None:
    d, x, h = (made(tiny, attended) for attended in ("none", "all", "regular"))
    assert torch.equal(x.text.media[ATTENDED_IMAGE].values, d.text.media[IMAGE].values)
    assert torch.equal(h.text.media[ATTENDED_IMAGE].values, d.text.media[IMAGE].values[:3])
    assert torch.equal(h.text.media[IMAGE].values, d.text.media[IMAGE].values[3:])


@pytest.mark.parametrize("attended", ["none", "regular", "all"])
def test_measuring_needs_no_pixels(tiny: Tokenizer, attended: str) -> None:
    build = builder(tiny, attended=attended)
    members = vqa(png=image_bytes(100, 32))
    sample = build(members)
    tiles = sum(len(media.values) for media in sample.text.media.values())
    assert build.measure(members) == (len(sample.text.tokens), tiles)


def test_one_tile_images(tiny: Tokenizer) -> None:
    members = vqa(png=image_bytes(32, 32))
    x, h = made(tiny, "all", members), made(tiny, "regular", members)
    assert x.text.media[ATTENDED_IMAGE].tiles.tolist() == [0]
    assert h.text.media.keys() == {IMAGE} and h.text.media[IMAGE].tiles.tolist() == [0]


def test_untagged_tiles_are_seen_from_the_image_s_end_on(tiny: Tokenizer) -> None:
    sample = made(tiny, "all", tags=ImageTags("none"))
    media = sample.text.media[ATTENDED_IMAGE]
    assert media.ends is not None and media.positions.tolist() == media.ends.tolist()
    assert {text(tiny, sample.text.tokens[: int(p)]) for p in media.ends} == {
        "<|im_start|>user\n<Image>"
    }


def test_a_text_sample_has_no_media(tiny: Tokenizer) -> None:
    assert made(tiny, "all", chat(("human", "hi"), ("gpt", "ho"))).text.media == {}


def test_a_long_sample_keeps_its_tags(tiny: Tokenizer) -> None:
    """X's text is cut behind the tags, never through them."""
    whole = made(tiny, "all")
    ends = whole.text.media[ATTENDED_IMAGE].ends
    assert ends is not None
    long = vqa(answer="4" * 200, png=image_bytes(100, 32))
    cut = made(tiny, "all", long)
    assert len(cut.text.tokens) == 64 and torch.equal(cut.text.media[ATTENDED_IMAGE].ends, ends)
    with pytest.raises(ValueError, match="would cut an image or every answer"):
        made(tiny, "all", long, sequence_length=6)


def test_placeholders_in_the_text_are_refused(tiny: Tokenizer) -> None:
    members = vqa(question="<image> <|vision_pad|>?", png=image_bytes(100, 32))
    with pytest.raises(ValueError, match="the tiles need 0"):
        made(tiny, "all", members)


def test_wrong_options_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="attended=some must be one of none, regular, all"):
        builder(tiny, attended="some")
    with pytest.raises(ValueError, match=r"tags\.form=hf with attended=all"):
        builder(tiny, attended="all", tags=ImageTags(form="hf"))


def test_tags_outside_the_sample_are_refused(tiny: Tokenizer) -> None:
    sample = made(tiny, "all")
    media = sample.text.media[ATTENDED_IMAGE]
    wrong = dataclasses.replace(media, ends=media.ends + len(sample.text.tokens))
    with pytest.raises(ValueError, match="tags of 4 attended tiles at"):
        text = dataclasses.replace(sample.text, media={ATTENDED_IMAGE: wrong})
        check_sample(dataclasses.replace(sample, texts=(text,)))


@pytest.mark.parametrize("packed", [False, True])
def test_collate_moves_tags_with_their_samples(tiny: Tokenizer, packed: bool) -> None:
    build: InstructBuilder = builder(tiny, attended="regular", tags=ImageTags("2d_grid"))
    samples = [
        build(vqa(png=image_bytes(100, 32))),
        build(chat(("human", "hi"), ("gpt", "ho"))),
        build(vqa(png=image_bytes(64, 64))),
    ]
    batch = collate(samples, pad_id=tiny.pad_id, packed=packed)
    media = batch.media[ATTENDED_IMAGE]
    starts = [0, 0, 0] if not packed else batch.cu_seqlens.tolist()[:3]
    assert media.texts.tolist() == [0] * 3 + [2] * 4
    assert media.rows.tolist() == ([0] * 7 if packed else [0] * 3 + [2] * 4)
    assert media.ends is not None and media.tag_ids is not None
    expected = []
    for number in (0, 2):
        own = samples[number].text.media[ATTENDED_IMAGE]
        assert own.ends is not None
        expected += (own.ends + starts[number]).tolist()
    assert media.ends.tolist() == expected == media.positions.tolist()
    shown = [text(tiny, ids[ids >= 0]) for ids in media.tag_ids]
    assert shown[:4] == ["<tile_x0_y0>", "<tile_x1_y0>", "<tile_x2_y0>", "<tile_x0_y0>"]
    assert media.num_keys == 7 * 4 + int((media.tag_ids >= 0).sum())


def test_left_padding_moves_tags_too(tiny: Tokenizer) -> None:
    build = builder(tiny, attended="all")
    prompts = [build.prompt(vqa(png=image_bytes(w, 32))) for w in (32, 100)]
    batch, _ = left_padded(prompts, tiny.pad_id)
    media = batch.media[ATTENDED_IMAGE]
    assert media.ends is not None
    for row, start, stop, place in zip(
        media.rows, media.positions, media.ends, media.tiles, strict=True
    ):
        tag = f"<tile_{int(place)}>" if place else "<tile_global_thumbnail>"
        assert text(tiny, batch.tokens[row, start:stop]) == tag
