"""Each format's golden sample, mapped fields, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nvmm.batch import IMAGE as KIND
from nvmm.batch import Sample
from nvmm.data.loader import Data
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import IMAGE_MARKER as MARKER
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.forms import Caption, Chat, Document, MultipleChoice, Ocr
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from tests.data.conftest import image_bytes
from tests.data.conftest import template as dialect

PADS = "<|vision_pad|>" * 4
IMAGE = f"<Image><tile_global_thumbnail>{PADS}</Image>"
SMALL = image_bytes(32, 32)


def builder(tokenizer: Tokenizer, form: Any, **options: Any) -> InstructBuilder:
    arguments: dict[str, Any] = {
        "template": dialect(),
        "tags": ImageTags(),
        "tokens_per_tile": 4,
        "tile_size": 32,
        "sequence_length": 256,
        "form": form,
    }
    return InstructBuilder(tokenizer=tokenizer, **(arguments | options))


def sample(record: Any = None, /, **members: bytes) -> dict[str, Any]:
    """Members; `_0_png` names the member 0.png."""
    found: dict[str, Any] = {"__key__": "k0", "__url__": "s.tar"}
    if record is not None:
        found["json"] = json.dumps(record).encode()
    return found | {name.strip("_").replace("_", "."): data for name, data in members.items()}


def whole(tokenizer: Tokenizer, built: Sample) -> str:
    return tokenizer.decode(built.text.tokens.tolist(), skip_special_tokens=False)


def trained(tokenizer: Tokenizer, built: Sample) -> str:
    kept = built.text.tokens[built.text.weights == 1]
    assert set(built.text.weights.tolist()) <= {0.0, 1.0}
    return tokenizer.decode(kept.tolist(), skip_special_tokens=False)


def test_caption(tiny: Tokenizer) -> None:
    plain = {"template": dialect("pretraining"), "tags": ImageTags("none")}
    build = builder(tiny, Caption(), fields={"caption": ".txt"}, max_tiles=1, **plain)
    built = build(sample(jpg=image_bytes(64, 32, kind="jpg"), txt=b"A red bus.\n"))
    assert whole(tiny, built) == f"<Image>{PADS}</Image>\nA red bus.<|im_end|>"
    assert trained(tiny, built) == "A red bus.<|im_end|>"
    assert built.text.media[KIND].values.shape == (1, 3, 32, 32)
    asked = builder(tiny, Caption("What is it?"))(sample({"caption": "A bus."}, png=SMALL))
    assert f"<|im_start|>user\n{IMAGE}\nWhat is it?<|im_end|>" in whole(tiny, asked)


def test_answers_with_weights(tiny: Tokenizer) -> None:
    record = {"question": "How many?", "answers": ["2", "3", "2", "4"], "weights": [1, 5, 3, 0]}
    heaviest = builder(tiny, Chat())
    assert trained(tiny, heaviest(sample(record, png=SMALL))) == "3<|im_end|>"
    assert heaviest.references(sample(record)) == ["2", "3", "2", "4"]
    vqav2 = {"question": "How many?", "answers": [{"answer": a} for a in ("no", "7", "7")]}
    assert trained(tiny, heaviest(sample(vqav2))) == "7<|im_end|>"

    drawn = builder(tiny, Chat("drawn"))
    counts = dict.fromkeys("234", 0)
    for number in range(450):
        members = sample(record) | {"__key__": f"{number:06d}"}
        answer = trained(tiny, drawn(members)).removesuffix("<|im_end|>")
        assert answer == trained(tiny, drawn(members | {"__url__": "other.tar"}))[0]
        counts[answer] += 1
    # 4/9 and 5/9 of 450 draws, within 4 standard deviations
    assert counts["4"] == 0
    assert abs(counts["2"] - 200) < 43


@pytest.mark.parametrize("answer", [1, "B", "blue"])
def test_multiple_choice(tiny: Tokenizer, answer: Any) -> None:
    record = {"question": "Which?", "choices": ["red", "blue"], "answer": answer, "hint": "Look."}
    build = builder(tiny, MultipleChoice("Say a letter."))
    built = build(sample(record, png=SMALL))
    question = f"{IMAGE}\nLook.\nWhich?\nA. red\nB. blue\nSay a letter."
    assert whole(tiny, built) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    )
    assert trained(tiny, built) == "B<|im_end|>"
    assert build.references(sample(record)) == ["B"]


def test_words_with_boxes(tiny: Tokenizer) -> None:
    boxes = [[0, 0, 20, 8], [10, 8, 40, 8, 40, 16, 10, 16]]
    record = {"words": ["Exit", "now"], "boxes": boxes}
    built = builder(tiny, Ocr("Read."))(sample(record, png=image_bytes(40, 16)))
    assert trained(tiny, built) == (
        "Exit<box>(0,0),(500,500)</box>\nnow<box>(250,500),(1000,1000)</box><|im_end|>"
    )
    del record["boxes"]
    built = builder(tiny, Ocr("Read."))(sample(record, png=SMALL))
    assert trained(tiny, built) == "Exit\nnow<|im_end|>"


def test_obelics(tiny: Tokenizer) -> None:
    record = {"texts": ["One", None, "two", None], "images": [None, "u1", None, "u2"]}
    members = sample(record, _0_png=SMALL, _1_png=image_bytes(64, 32))
    built = builder(tiny, Document())(members)
    wide = f"<Image><tile_1>{PADS}<tile_2>{PADS}<tile_global_thumbnail>{PADS}</Image>"
    assert whole(tiny, built) == f"One\n{IMAGE}\ntwo\n{wide}<|im_end|>"
    assert trained(tiny, built) == "One\n\ntwo\n<|im_end|>"
    media = built.text.media[KIND]
    assert media.items.tolist() == [0, 1, 1, 1]
    assert (built.text.tokens == tiny.image_id).sum() == 16
    for position in media.positions.tolist():
        assert built.text.tokens[position : position + 4].tolist() == [tiny.image_id] * 4


def test_mmc4_puts_images_before_their_sentences(tiny: Tokenizer) -> None:
    infos = [{"matched_text_index": 2}, {"matched_text_index": 0}, {"matched_text_index": 2}]
    record = {"text_list": ["a", "b", "c"], "image_info": infos}
    images = [image_bytes(32, 32, seed) for seed in range(3)]
    build = builder(tiny, Document(" "), tags=ImageTags("none"), max_tiles=1)
    built = build(sample(record, **{f"_{i}_png": data for i, data in enumerate(images)}))
    image = f"<Image>{PADS}</Image>"
    assert whole(tiny, built) == f"{image} a b {image} {image} c<|im_end|>"
    alone = [build(sample({"text": "<image>x"}, png=data)) for data in images]
    for tile, expected in zip(built.text.media[KIND].values, (1, 0, 2), strict=True):
        assert torch.equal(tile, alone[expected].text.media[KIND].values[0])


def test_plain_text(tiny: Tokenizer) -> None:
    system = dialect(system="Be good.")
    build = builder(tiny, Document(), fields={"text": ".txt"}, template=system)
    built = build(sample(txt=b"Once upon a time."))
    assert whole(tiny, built) == trained(tiny, built) == "Once upon a time.<|im_end|>"
    assert built.text.media == {}
    assert (
        len(builder(tiny, Document(), sequence_length=5)(sample({"text": "1" * 9})).text.tokens)
        == 5
    )


def test_long_documents_lose_their_end_whole_images_first(tiny: Tokenizer) -> None:
    text = "one<image>two<image>three<image>four"
    members = sample({"text": text}, **{f"_{i}_png": image_bytes(32, 32, i) for i in range(3)})
    every = builder(tiny, Document(), sequence_length=256)(members)
    positions = every.text.media[KIND].positions.tolist()
    for kept in (1, 2):
        length = positions[kept] + 3  # one placeholder of the next image does not fit
        cut = builder(tiny, Document(), sequence_length=length)(members)
        assert len(cut.text.media[KIND].tiles) == kept
        assert len(cut.text.tokens) <= length
        assert (cut.text.tokens == tiny.image_id).sum() == 4 * kept
        assert cut.text.weights.any()


def test_measured_as_built(tiny: Tokenizer) -> None:
    """Headers alone give the tokens and tiles of the decoded example, rotated images too."""
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (96, 32)).save(buffer, "JPEG", exif=turned)
    texts: dict[str, Any] = {"texts": ["One", None, "two"], "images": [None, "u", None]}
    for length in (24, 256):
        for data in (SMALL, image_bytes(150, 40), buffer.getvalue()):
            for form, record in (
                (Chat(), {"question": "Which?", "answer": "12345"}),
                (Document(), texts),
            ):
                build = builder(tiny, form, sequence_length=length)
                built = build(sample(record, png=data))
                tiles = len(built.text.media[KIND].tiles) if built.text.media else 0
                assert build.measure(sample(record, png=data)) == (len(built.text.tokens), tiles)


def test_fields_are_mapped(tiny: Tokenizer, tmp_path: Path) -> None:
    """An energon data set: keys with folders, members with several extensions, files beside."""
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text("sample_type: {}")
    record = {"ann": {"query": "Which?", "labels": ["B"]}, "question": "not this"}
    samples = [
        {
            "__key__": f"part/{number:04d}",
            "img.jpg": image_bytes(32, 32, number, "jpg"),
            "thumb.png": image_bytes(8, 8),
            "meta.json": json.dumps(record).encode(),
            "pyd": b"cos\nsystem\n(S'exit 1'\ntR.",
        }
        for number in range(3)
    ]
    write_shards(tmp_path, "shard", samples)
    fields = {"record": ".meta.json", "image": ".img.jpg", "question": "ann.query"}
    fields["answers"] = "ann.labels"
    unread = [".thumb.png", ".*yd"]
    partial = {
        "form": Chat(),
        "fields": fields,
        "unread": unread,
        "template": dialect(),
        "tags": ImageTags(),
    }

    def build(**options: Any) -> InstructBuilder:
        return InstructBuilder(tokens_per_tile=4, tile_size=32, **partial, **options)

    dataset = Dataset(str(tmp_path / "*.tar"), build)
    data = Data(256, 0, dataset, tokenizer=tiny)
    assert len(data.train) == 3
    built = data.train[1]
    assert built.source.endswith("shard-00000.tar:part/0001")
    assert f"{IMAGE}\nWhich?" in whole(tiny, built)
    assert trained(tiny, built) == "B<|im_end|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"photo": ".jpg"},
            r"build\.fields\.photo is unknown; use one of record, image, caption",
        ),
        ({"caption": ".pyd"}, r"\.pyd: pickled members are not read"),
        ({"caption": ".mp4"}, r"\.mp4 has no decoder"),
        ({"caption": [".txt", ".text"]}, r"build\.fields\.caption=.* must be one place"),
        ({"image": "jpg"}, r"build\.fields\.image=jpg must be a member, as \.jpg"),
    ],
)
def test_wrong_fields_are_refused_at_once(tiny: Tokenizer, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        builder(tiny, Caption(), fields=fields)


QUESTION = {"question": "Which?", "choices": ["red", "blue"]}
WORD = {"words": ["a"]}
ONE_IMAGE = [{"matched_text_index": 0}]


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        (Caption(), {"caption": " "}, "caption is empty"),
        (Caption(), {"caption": ["x"]}, r"caption must be text, got \['x'\]"),
        (Caption(), {}, "no caption; its members are json, png"),
        (Chat(), {"question": "", "answer": "x"}, "question is empty"),
        (
            Chat(),
            {"question": "x", "answers": [{}], "answer": "y"},
            "answer must be text, got None",
        ),
        (Chat(), {"question": "x", "answers": ["x"], "weights": [1, 2]}, "a list of 1 numbers"),
        (Chat(), {"question": "x", "answers": ["x"], "weights": [-1]}, "numbers from 0 on"),
        (Chat(), {"question": "x", "answers": ["x"], "weights": [0]}, "every answer has weight 0"),
        (MultipleChoice(), QUESTION | {"answer": 2}, "answer 2 is none of 2 choices"),
        (MultipleChoice(), QUESTION | {"answer": "AB"}, "answer 'AB' is none of 2 choices"),
        (
            MultipleChoice(),
            {"question": "x", "choices": ["a", "a"], "answer": "a"},
            "more than one",
        ),
        (MultipleChoice(), {"question": "x", "choices": []}, "choices must be a list that is not"),
        (Ocr(), WORD | {"boxes": []}, "boxes must be a list of 1"),
        (Ocr(), WORD | {"boxes": [[0, 0, 33, 8]]}, "leaves the image of 32x32 pixels"),
        (Ocr(), WORD | {"boxes": [[0, 0, "9", 8]]}, "must be .x0, y0, x1, y1. or a polygon"),
        (Ocr(), {"words": [""]}, "word is empty"),
        (Document(), {"text": "no marker"}, "0 <image> markers, the sample 1 images"),
        (Document(), {"text": "<image>"}, "the document has no text"),
        (Document(), {"texts": ["a", "b"], "images": [None]}, "2 texts and 1 images"),
        (Document(), {"texts": ["a"], "images": ["u"]}, "needs one of the two"),
        (Document(), {"texts": ["<image>"], "images": [None]}, "<image> is written in a text"),
        (Document(), {"text_list": ["a"], "image_info": [{}]}, r"image_info\[0\] matches none"),
        (Document(), {"text_list": ["a"], "image_info": ONE_IMAGE * 2}, "lists 2 images"),
    ],
)
def test_wrong_samples_are_bad(tiny: Tokenizer, form: Any, record: Any, message: str) -> None:
    with pytest.raises(BadSample, match=rf"^s\.tar:k0: .*{message}"):
        builder(tiny, form)(sample(record, png=SMALL))
    assert builder(tiny, Caption())(sample({"caption": "x"}, png=SMALL))


def conversation(*messages: Any, **record: Any) -> dict[str, Any]:
    return sample({"messages": list(messages)} | record, png=image_bytes(32, 32))


def test_neighbours_conversations(tiny: Tokenizer) -> None:
    """Megatron-LM's list of turns, OpenAI's parts, pictures of a turn: all are the same sample."""
    answer = {"role": "assistant", "content": "7"}
    plain = builder(tiny, Chat())(conversation({"role": "user", "content": f"{MARKER}\nq"}, answer))
    turns = [{"from": "human", "value": f"{MARKER}\nq"}, {"from": "gpt", "value": "7"}]
    listed = sample({}, png=image_bytes(32, 32)) | {"json": json.dumps(turns).encode()}
    picture, question = {"type": "image"}, {"type": "text", "text": "q"}
    url = {"type": "image_url", "image_url": {"url": "image 0"}}
    for members in (
        listed,
        conversation({"role": "user", "content": [picture, question]}, answer),
        conversation({"role": "user", "content": [url, question]}, answer | {"content": ["7"]}),
        conversation({"role": "user", "content": "q", "image": "image 0"}, answer),
        conversation({"role": "user", "content": "q", "images": ["image 0"]}, answer),
    ):
        built = builder(tiny, Chat())(members)
        assert whole(tiny, built) == whole(tiny, plain)
        assert len(built.text.media) == 1
    split = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}, picture]
    built = builder(tiny, Chat())(conversation({"role": "user", "content": split}, answer))
    assert "a b\n<Image>" in whole(tiny, built)


def test_a_tool_speaks_in_a_turn_of_the_user(tiny: Tokenizer) -> None:
    for role in ("tool", "function", "observation"):
        turns = [("user", "a"), (role, "8"), ("assistant", "7")]
        messages = [{"role": name, "content": content} for name, content in turns]
        built = builder(tiny, Chat())(sample({"messages": messages}))
        expected = "<|im_start|>user\n<tool_response>\n8\n</tool_response><|im_end|>"
        assert expected in whole(tiny, built)
        assert trained(tiny, built) == "7<|im_end|>"


def test_tables_leave_the_other_spelling_null(tiny: Tokenizer) -> None:
    null = {"from": None, "value": None, "weight": None, "video": None}
    turns = [{"role": role, "content": role} | null for role in ("user", "assistant")]
    built = builder(tiny, Chat())(sample({"messages": turns, "conversations": None}))
    assert trained(tiny, built) == "assistant<|im_end|>"


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss_weight": 0}]
)
def test_turns_without_weight_are_not_trained(tiny: Tokenizer, off: dict[str, Any]) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    both = builder(tiny, Chat())(sample({"messages": messages}))
    messages[1] |= off
    one = builder(tiny, Chat())(sample({"messages": messages}))
    assert one.text.tokens.tolist() == both.text.tokens.tolist()
    assert trained(tiny, both) == "b<|im_end|>d<|im_end|>"
    assert trained(tiny, one) == "d<|im_end|>"
    messages[3] |= off
    with pytest.raises(BadSample, match="no supervised token"):
        builder(tiny, Chat())(sample({"messages": messages}))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"content": "a", "weight": 0.5}, r"weight 0\.5 of a turn must be 0 or 1"),
        ({"content": "a", "tool_calls": [{"id": 1}]}, "a turn has tool_calls, which are not read"),
        ({"content": "a", "reasoning_content": "hm"}, "a turn has reasoning_content"),
        ({"content": "a", "value": "b"}, "value and content, which differ"),
        ({"content": "a", "from": "gpt"}, "from and role, which differ"),
        ({"content": "<image>", "images": ["a", "b"]}, "names 2 pictures, and its text has 1"),
        ({"content": [{"type": "video"}]}, "neither a text nor an image"),
        ({"content": [3]}, "neither a text nor an image"),
        ({"content": [{"type": "text", "text": "<image>"}]}, "<image> is written in the text"),
        ({"content": {"text": "a"}}, "turn must be text"),
        ({"content": "a", "role": ["user"]}, r"role \['user'\] is unknown"),
        ({"content": "a", "role": {"a": 1}}, "is unknown"),
    ],
)
def test_odd_turns_name_the_sample(tiny: Tokenizer, message: Any, says: str) -> None:
    with pytest.raises(BadSample, match=rf"k0: .*{says}"):
        builder(tiny, Chat())(sample({"messages": [{"role": "user"} | message]}))


@pytest.mark.parametrize(
    ("choices", "answer", "meant", "letter"),
    [
        (["a", "b", "c"], "1", None, "B"),
        (["0", "1", "2"], "1", None, "B"),
        (["2", "0", "1"], "1", "number", "B"),
        (["2", "0", "1"], "1", "choice", "C"),
        (["B", "A"], "A", "letter", "A"),
        (["B", "A"], "A", "choice", "B"),
        (["2", "0", "1"], 1, None, "B"),
    ],
)
def test_an_answer_is_letter_number_or_choice(
    tiny: Tokenizer, choices: list[str], answer: Any, meant: Any, letter: str
) -> None:
    record = {"question": "q", "choices": choices, "answer": answer}
    build = builder(tiny, MultipleChoice(answer_is=meant))
    assert build.references(sample(record)) == [letter]


@pytest.mark.parametrize(("choices", "answer"), [(["2", "0", "1"], "1"), (["B", "A"], "A")])
def test_an_answer_that_may_be_two_choices_is_bad(
    tiny: Tokenizer, choices: list[str], answer: str
) -> None:
    record = {"question": "q", "choices": choices, "answer": answer}
    with pytest.raises(BadSample, match=r"may be .* or .*, which differ; .*form\.answer_is"):
        builder(tiny, MultipleChoice())(sample(record))
    with pytest.raises(BadSample, match="is none of 2 choices"):
        builder(tiny, MultipleChoice(answer_is="number"))(
            sample(record | {"choices": ["x", "y"], "answer": "A"})
        )
