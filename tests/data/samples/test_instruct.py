"""Members of a shard to Samples: forms of the json, fitting, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.conftest import chat, image_bytes, vqa
from tests.data.conftest import template as dialect


def builder(tokenizer: Tokenizer, **options: Any) -> InstructBuilder:
    arguments: dict[str, Any] = {
        "template": dialect(),
        "tags": ImageTags(),
        "tokens_per_tile": 4,
        "tile_size": 32,
        "sequence_length": 64,
    }
    return InstructBuilder(tokenizer=tokenizer, **(arguments | options))


def text(tokenizer: Tokenizer, tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def test_vqa_sample(tiny: Tokenizer) -> None:
    sample = builder(tiny)(vqa(png=image_bytes(100, 32)))
    pads = "<|vision_pad|>" * 4
    tiles = "".join(f"<tile_{k}>{pads}" for k in (1, 2, 3))
    assert text(tiny, sample.text.tokens) == (
        f"<|im_start|>user\n<Image>{tiles}<tile_global_thumbnail>{pads}</Image>\n"
        "Read the number.<|im_end|>\n<|im_start|>assistant\n471<|im_end|>\n"
    )
    media = sample.text.media[IMAGE]
    assert media.values.shape == (4, 3, 32, 32)
    assert media.tiles.tolist() == [1, 2, 3, 0]
    assert media.items.tolist() == [0, 0, 0, 0]
    assert media.tokens_per_item == 4
    for position in media.positions.tolist():
        assert sample.text.tokens[position : position + 4].tolist() == [tiny.image_id] * 4
        assert sample.text.tokens[position - 1] != tiny.image_id
    assert text(tiny, sample.text.tokens[sample.text.weights == 1]) == "471<|im_end|>"
    assert sample.text.tokens.dtype == torch.int64
    assert sample.text.weights.dtype == torch.float32
    assert sample.source == "s.tar:k0"


def test_conversation_with_several_images(tiny: Tokenizer) -> None:
    # 10.png must come after 2.png, though names sort the other way
    members = chat(
        ("human", "<image><image>\n<image> Same?"),
        ("gpt", "No"),
        ("human", "Sure?"),
        ("gpt", "Yes"),
        _10_png=image_bytes(32, 32, 3),
        _2_png=image_bytes(64, 32, 2),
        _1_jpg=image_bytes(32, 32, 1, "jpg"),
    )
    sample = builder(tiny, sequence_length=128)(members)
    media = sample.text.media[IMAGE]
    assert media.items.tolist() == [0, 1, 1, 1, 2]
    assert media.tiles.tolist() == [0, 1, 2, 0, 0]
    assert text(tiny, sample.text.tokens[sample.text.weights == 1]) == "No<|im_end|>Yes<|im_end|>"


def test_openai_style_messages_read_alike(tiny: Tokenizer) -> None:
    llava = chat(("human", "Hi"), ("gpt", "Ho"))
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    }
    other = llava | {"json": json.dumps(record).encode()}
    assert torch.equal(builder(tiny)(llava).text.tokens, builder(tiny)(other).text.tokens)


def test_text_only_sample_has_no_media(tiny: Tokenizer) -> None:
    sample = builder(tiny)(vqa())
    assert sample.text.media == {}
    assert tiny.image_id not in sample.text.tokens


def test_an_answer_ends_with_the_template_s_token_a_turn_or_the_text(tiny: Tokenizer) -> None:
    build = builder(tiny, template=dialect(end="<|blank|>"))
    ends = [tiny.token_id("<|blank|>"), tiny.end_of_turn_id, tiny.eos_id]
    assert build.stop_ids == list(dict.fromkeys(ends))


def test_most_frequent_answer_is_trained_and_all_are_references(tiny: Tokenizer) -> None:
    members = vqa(answer=["3", "4", "4"])
    build = builder(tiny)
    sample = build(members)
    assert text(tiny, sample.text.tokens[sample.text.weights == 1]) == "4<|im_end|>"
    assert build.references(members) == ["3", "4", "4"]
    assert build.references(chat(("human", "<image> Hi"), ("gpt", "Ho"))) == ["Ho"]


def test_prompt_is_the_unsupervised_prefix(tiny: Tokenizer) -> None:
    build = builder(tiny)
    whole, prompt = build(vqa(png=image_bytes(70, 32))), build.prompt(vqa(png=image_bytes(70, 32)))
    assert torch.equal(prompt.text.tokens, whole.text.tokens[: len(prompt.text.tokens)])
    assert text(tiny, prompt.text.tokens).endswith("<|im_start|>assistant\n")
    assert not prompt.text.weights.any()
    assert torch.equal(prompt.text.media[IMAGE].values, whole.text.media[IMAGE].values)
    question = {"question": "Read the number."}
    unanswered = vqa(png=image_bytes(70, 32)) | {"json": json.dumps(question).encode()}
    assert torch.equal(build.prompt(unanswered).text.tokens, prompt.text.tokens)
    assert build.references(unanswered) == []


def test_long_samples_lose_tiles_first(tiny: Tokenizer) -> None:
    # 6:1 takes 6 tiles, 4 at most takes 4:1, then 2:1, then one tile without a thumbnail
    wide = vqa(png=image_bytes(192, 32))
    lengths = {
        limit: len(builder(tiny, max_tiles=limit)(wide).text.tokens) for limit in (6, 4, 2, 1)
    }
    tiles = {6: 7, 4: 5, 2: 3, 1: 1}
    for limit, length in lengths.items():
        sample = builder(tiny, sequence_length=length)(wide)
        assert len(sample.text.media[IMAGE].tiles) == tiles[limit]
        assert len(sample.text.tokens) == length
    one_less = builder(tiny, sequence_length=lengths[6] - 1)(wide)
    assert len(one_less.text.media[IMAGE].tiles) == tiles[4]


def test_then_text_is_cut_but_never_media(tiny: Tokenizer) -> None:
    answer = "123456" * 5
    members = vqa(answer=answer, png=image_bytes(32, 32))
    sample = builder(tiny, sequence_length=40)(members)
    assert len(sample.text.tokens) == 40
    assert answer.startswith(text(tiny, sample.text.tokens[sample.text.weights == 1]))
    late = chat(("human", "word " * 60 + "<image>"), ("gpt", "No"), png=image_bytes(32, 32))
    with pytest.raises(ValueError, match=r"s\.tar:k0: needs \d+ tokens with one tile .* an image"):
        builder(tiny, sequence_length=40)(late)
    with pytest.raises(ValueError, match=r"data\.sequence_length=16 would cut"):
        builder(tiny, sequence_length=16)(members)
    with pytest.raises(ValueError, match="would cut the prompt"):
        builder(tiny, sequence_length=16).prompt(members)


def test_refuses_a_placeholder_in_the_text(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"s\.tar:k0: 5 placeholders .* the tiles need 4"):
        builder(tiny)(vqa("What is <|vision_pad|>?", png=image_bytes(32, 32)))
    with pytest.raises(ValueError, match=r"1 placeholders .* the tiles need 0"):
        builder(tiny)(vqa("What is <|vision_pad|>?"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (chat(("human", "Hi")), "no supervised token"),
        (chat(("human", "<image>Hi"), ("gpt", "Ho")), "1 <image> markers, the sample 0 images"),
        (chat(("human", "Hi"), ("gpt", "Ho"), png=image_bytes(8, 8)), "0 <image> markers"),
        (chat(("narrator", "Hi")), "role 'narrator' is unknown"),
        (vqa() | {"json": b"{"}, "member json: damaged JSON"),
        (vqa() | {"json": b"[1]"}, "member json must be an object, got list"),
        (
            vqa() | {"json": b'{"caption": "x"}'},
            "no conversations, messages or question; its members are json",
        ),
        (vqa(answer=7), "answer must be text, got 7"),
        ({"__key__": "k0", "__url__": "s.tar", "txt": b""}, "member txt is not read"),
        ({"__key__": "k0", "__url__": "s.tar"}, "no conversations, .* its members are $"),
        (vqa(png=image_bytes(8, 8), jpg=image_bytes(8, 8, kind="jpg")), "jpg, png is ambiguous"),
        (vqa(png=b"broken"), "member png: cannot decode"),
        (vqa(answer=" "), "answer is empty"),
        (chat(("human", "Hi"), ("gpt", "")), "an assistant turn is empty"),
        (vqa(left_png=image_bytes(8, 8)), r"image left\.png has no number"),
    ],
)
def test_refusals_name_shard_and_sample(
    tiny: Tokenizer, members: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"s\.tar:k0.*{message}"):
        builder(tiny)(members)


def test_refuses_impossible_sizes(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="tokens_per_tile=0"):
        builder(tiny, tokens_per_tile=0)
    with pytest.raises(ValueError, match="min_tiles=4, max_tiles=2"):
        builder(tiny, min_tiles=4, max_tiles=2)
