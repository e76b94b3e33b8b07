"""VILA's documents, and samples that lose the images which do not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE as KIND
from nvmm.config.check import option
from nvmm.data.loader import Data
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import ChatTemplate, ImageTags
from nvmm.data.samples.forms import Caption
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.interleaved import Interleaved
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from tests.data.conftest import image_bytes
from tests.data.conftest import template as dialect

PAD = "<|vision_pad|>"
PADS = PAD * 4


def builder(tokenizer: Tokenizer, form: Any = None, **options: Any) -> InstructBuilder:
    arguments: dict[str, Any] = {
        "template": dialect(),
        "tags": ImageTags("none", image_start="", image_end=""),
        "tokens_per_tile": 4,
        "tile_size": 32,
        "max_tiles": 1,
        "sequence_length": 256,
        "drop_images": True,
    }
    return InstructBuilder(tokenizer=tokenizer, form=form, **(arguments | options))


def members(record: dict[str, Any], images: int) -> dict[str, Any]:
    """Picture n is all of brightness 10 n."""
    from io import BytesIO

    from PIL import Image

    found: dict[str, Any] = {
        "__key__": "k",
        "__url__": "s.tar",
        "json": json.dumps(record).encode(),
    }
    for number in range(images):
        data = BytesIO()
        Image.new("RGB", (32, 32), (10 * number,) * 3).save(data, "PNG")
        found["png" if images == 1 else f"{number}.png"] = data.getvalue()
    return found


def document(texts: list[str], places: list[int]) -> dict[str, Any]:
    infos = [{"matched_text_index": place} for place in places]
    return members({"text_list": texts, "image_info": infos}, len(places))


def whole(tokenizer: Tokenizer, sample: Any) -> str:
    return tokenizer.decode(sample.text.tokens.tolist(), skip_special_tokens=False)


def shown(sample: Any) -> list[int]:
    media = sample.text.media.get(KIND)
    return [] if media is None else (media.values[:, 0, 0, 0] // 10).tolist()


def test_an_image_stands_immediately_before_its_sentence(tiny: Tokenizer) -> None:
    members = document([" One. ", "Two <image> is text.", "Three."], [2, 0, 2])
    sample = builder(tiny, Interleaved())(members)
    end = tiny.decode([tiny.eos_id], skip_special_tokens=False)
    assert whole(tiny, sample) == f"{PADS}One. Two <IMAGE> is text.{PADS}{PADS}Three.{end}"
    assert shown(sample) == [1, 0, 2], "of one sentence in the order of image_info"
    # All text is trained, and no placeholder.
    assert torch.equal(sample.text.weights == 1, sample.text.tokens != tiny.image_id)
    assert sample.dropped == 0


def test_of_many_images_the_first_six_of_the_list_are_taken(tiny: Tokenizer) -> None:
    texts = [f"s{n}." for n in range(8)]
    members = document(texts, [7, 6, 5, 4, 3, 2, 1, 0])
    assert shown(builder(tiny, Interleaved())(members)) == [5, 4, 3, 2, 1, 0]
    assert shown(builder(tiny, Interleaved(max_images=2))(members)) == [1, 0]
    with pytest.raises(ValueError, match=r"form\.max_images=0 must be at least 1"):
        Interleaved(max_images=0)


def test_blank_sentences_and_images_without_text_behind_them_go(tiny: Tokenizer) -> None:
    sample = builder(tiny, Interleaved())(document(["A.", " ", "", "B.", " "], [2, 3, 4]))
    end = tiny.decode([tiny.eos_id], skip_special_tokens=False)
    assert whole(tiny, sample) == f"A.{PADS}{PADS}B.{end}" and shown(sample) == [0, 1]


def test_a_pair_is_a_document_of_its_own(tiny: Tokenizer) -> None:
    build = builder(tiny, Interleaved(), fields={"caption": ".txt"})
    pair = {k: v for k, v in members({}, 1).items() if k != "json"} | {"txt": b" A <image>. "}
    end = tiny.decode([tiny.eos_id], skip_special_tokens=False)
    assert whole(tiny, build(pair)) == f"{PADS}A <IMAGE>.{end}"
    assert len(build(document(["One."], [0])).text.tokens) > 4, "beside documents"
    with pytest.raises(BadSample, match="a caption needs an image"):
        build({k: v for k, v in pair.items() if k != "png"})


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (document(["a"], [1]), r"image_info\[0\] matches none of 1 sentences"),
        (document([" "], [0]), "the document has no text"),
        (members({"text_list": ["a"], "image_info": [{}]}, 1), "matches none"),
        (members({"text_list": ["a"], "image_info": 3}, 0), "must be a list"),
        (members({"text_list": [3]}, 0), "must hold texts alone"),
        (members({"text_list": ["a"]}, 1), "lists 0 images, the sample 1"),
        (members({}, 0), "no text_list"),
    ],
)
def test_what_is_no_document_is_bad(tiny: Tokenizer, found: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=rf"s\.tar:k: .*{reason}"):
        builder(tiny, Interleaved())(found)


# -- truncation after expansion ----------------------------------------------------------------


def test_no_image_is_cut_in_two(tiny: Tokenizer) -> None:
    """At every length: a prefix of the whole, all of an image or none; the rest is counted."""
    found = document(["12", "34", "56"], [0, 1, 2])
    every = builder(tiny, Interleaved())(found)
    tokens = every.text.tokens.tolist()
    assert len(tokens) == 3 * (4 + 2) + 1, "every digit is a token"
    starts = every.text.media[KIND].positions.tolist()
    for length in range(6, len(tokens) + 3):
        build = builder(tiny, Interleaved(), sequence_length=length)
        cut = build(found)
        kept = sum(start + 4 <= length for start in starts)
        limit = min([length, len(tokens), *starts[kept : kept + 1]])
        assert cut.text.tokens.tolist() == tokens[:limit]
        assert cut.text.tokens.eq(tiny.image_id).sum() == 4 * kept
        assert (shown(cut), cut.dropped) == ([*range(kept)], 3 - kept)
        assert build.measure(found) == (limit, kept)


def test_a_conversation_loses_its_late_images_too(tiny: Tokenizer) -> None:
    turns = [
        ("user", "<image> one"),
        ("assistant", "1"),
        ("user", "<image> two"),
        ("assistant", "2"),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = members(record, 2)
    every = builder(tiny)(found)
    second = int(every.text.media[KIND].positions[1])
    for length in (second, second + 3):
        cut = builder(tiny, sequence_length=length)(found)
        assert cut.text.tokens.tolist() == every.text.tokens[:second].tolist()
        assert (shown(cut), cut.dropped) == ([0], 1)
        with pytest.raises(BadSample, match="would cut an image or every answer"):
            builder(tiny, sequence_length=length, drop_images=False)(found)
    # Before the first answer there is nothing to learn; a prompt is never cut.
    nothing = "no supervised token before the image that does not fit in data.sequence_length="
    with pytest.raises(BadSample, match=f"{nothing}8"):
        builder(tiny, sequence_length=8)(found)
    # A document that begins with an image may have nothing in front of it, or one token.
    for ahead, length in ((0, 3), (1, 4)):
        alone = document(["7"[:ahead], "12"], [1]) if ahead else document(["12"], [0])
        with pytest.raises(BadSample, match=f"{nothing}{length}"):
            builder(tiny, Interleaved(), sequence_length=length)(alone)
    with pytest.raises(BadSample, match="would cut the prompt"):
        builder(tiny, sequence_length=second + 3).prompt(found)
    with pytest.raises(ValueError, match="drop_images=true with attended=all"):
        builder(tiny, attended="all")


def test_what_is_dropped_is_counted(tiny: Tokenizer, tmp_path: Any) -> None:
    samples = [document(["12", "34", "56"], [0, 1, 2]) | {"__key__": str(n)} for n in range(4)]
    plain = [{k: v for k, v in sample.items() if k != "__url__"} for sample in samples]
    write_shards(tmp_path, "d", plain)
    data = Data(
        14,
        0,
        Dataset(str(tmp_path / "d-*.tar"), _later(builder, Interleaved())),
        tokenizer=tiny,
    )
    steps = data.batches(split="train", global_batch_size=2, micro_batch_size=2)
    for _ in range(3):
        batches = next(steps)
        counts = data.count(batches, ["image"])
        assert counts["train/dropped"] == 2 * 1 and counts["train/image.items"] == 2 * 2
        assert counts["train/bad"] == 0


def _later(build: Any, form: Any) -> Any:
    def with_options(*, tokenizer: Tokenizer, sequence_length: int) -> InstructBuilder:
        built: InstructBuilder = build(tokenizer, form, sequence_length=sequence_length)
        return built

    return with_options


# -- turns and images --------------------------------------------------------------------------


def vila_template(name: str) -> ChatTemplate:
    values = {k: v for k, v in option("template", name).items() if k != "_target_"}
    return ChatTemplate(**values)


def test_vicuna_s_and_the_plain_turns(tmp_path: Any) -> None:
    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    folder = train_byte_level_bpe(
        tmp_path,
        ["x"],
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    options = {
        k: v for k, v in option("tokenizer", "llama2").items() if k not in ("_target_", "path")
    }
    tokenizer = Tokenizer(str(folder), **options)
    turns = [("user", "<image>\nHi"), ("assistant", "Ho"), ("user", "Yes"), ("assistant", "No")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    sample = builder(tokenizer, template=vila_template("vicuna"), sequence_length=512)(
        members(record, 1)
    )
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
    )
    four = "<image>" * 4
    assert whole(tokenizer, sample) == (
        f"<s>{system} USER: {four}\nHi ASSISTANT: Ho</s>USER: Yes ASSISTANT: No</s>"
    )
    trained = sample.text.tokens[sample.text.weights == 1].tolist()
    assert tokenizer.decode(trained, skip_special_tokens=False).replace(" ", "") == "Ho</s>No</s>"
    caption = builder(tokenizer, Caption(), template=vila_template("llava_plain"))(
        members({"caption": "A cat"}, 1)
    )
    assert whole(tokenizer, caption) == f"<s>{four}A cat\n"
    trained = caption.text.tokens[caption.text.weights == 1].tolist()
    assert tokenizer.decode(trained) == "A cat\n"


def test_a_padded_image_has_margins_of_the_colour(tiny: Tokenizer) -> None:
    record = {"question": "q", "answer": "a"}
    wide = {"__key__": "k", "__url__": "s", "json": json.dumps(record).encode()}
    wide["png"] = image_bytes(64, 21)
    build = builder(tiny, pad=[122, 116, 104], tile_size=64, max_tiles=4, tokens_per_tile=1)
    sample = build(wide)
    values = sample.text.media[KIND].values
    assert values.shape == (1, 3, 64, 64), "a square has one tile whatever it was"
    assert values[0, :, :21].flatten(1).unique(dim=1).flatten().tolist() == [122, 116, 104]
    assert values[0, :, 42:].flatten(1).unique(dim=1).flatten().tolist() == [122, 116, 104]
    assert len(values[0, :, 21:42].flatten(1).unique(dim=1)[0]) > 100
    assert build.measure(wide) == (len(sample.text.tokens), 1)
    with pytest.raises(ValueError, match=r"pad=\[1, 2\] must be three numbers of 0\.\.255"):
        builder(tiny, pad=[1, 2])
    with pytest.raises(ValueError, match="must be three numbers"):
        builder(tiny, pad=[1, 2, 256])
