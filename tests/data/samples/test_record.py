"""Members are read, named as unread, or an error; a question brings its pictures whatever fields
say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvmm.batch import IMAGE
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.forms import Caption, Chat, Document, Form, MultipleChoice, Ocr
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.generate import members as question
from tests.data.conftest import image_bytes, vqa
from tests.data.samples.test_instruct import builder, text

PNG = image_bytes(32, 32)


def with_members(**members: bytes) -> dict[str, Any]:
    """A question, with members whose dots are written as underscores."""
    return vqa() | {name.replace("_", "."): data for name, data in members.items()}


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({"heic": PNG}, {}, r"member heic is not read, .* build\.unread=\[\.heic\]"),
        ({"avif": PNG}, {}, "member avif is not read"),
        ({"npy": b""}, {}, "member npy is not read"),
        ({"txt": b"A caption"}, {}, "member txt is not read"),
        ({"png": PNG}, {"fields": {"image": ".jpeg"}}, "member png is not read"),
        ({"png": PNG, "mask_png": PNG}, {"fields": {"image": ".png"}}, r"mask\.png is not read"),
        (
            {"left_png": PNG},
            {"fields": {"image": [".left.png", ".right.png"]}},
            r"has left\.png, but not \.right\.png of build\.fields\.image",
        ),
    ],
)
def test_a_member_is_never_lost(
    tiny: Tokenizer, members: dict[str, bytes], options: Any, message: str
) -> None:
    build = builder(tiny, **options)
    for use in (build, build.prompt, build.references, build.measure):
        with pytest.raises(BadSample, match=rf"^s\.tar:k0: .*{message}"):
            use(with_members(**members))


def test_unread_members_are_left_out(tiny: Tokenizer) -> None:
    build = builder(tiny, unread=[".mask.png", ".*.npy", ".txt"])
    whole = with_members(png=PNG, mask_png=PNG, left_npy=b"", txt=b"x")
    assert text(tiny, build(whole).text.tokens) == text(tiny, build(vqa(png=PNG)).text.tokens)
    with pytest.raises(BadSample, match="member npy is not read"):
        build(with_members(npy=b""))
    with pytest.raises(ValueError, match=r"fields\.image=\.png is in build\.unread too"):
        builder(tiny, fields={"image": ".png"}, unread=[".png"])
    with pytest.raises(ValueError, match=r"build\.unread=\.txt must be a list"):
        builder(tiny, unread=".txt")
    with pytest.raises(ValueError, match=r"\.IMG\.jpg: write members in lower case"):
        builder(tiny, fields={"image": ".IMG.jpg"})


@pytest.mark.parametrize("named", ["a.jpg", ["a.jpg"], [{"path": "a.jpg"}], [["a.jpg"]], 5])
def test_a_record_that_names_a_picture_has_one(tiny: Tokenizer, named: Any) -> None:
    for key in ("image", "images"):
        record = {"question": "What?", "answer": "7", key: named}
        members = {"__url__": "s.tar", "__key__": "k0", "json": json.dumps(record).encode()}
        with pytest.raises(BadSample, match=f"{key}=.* names a picture, and the sample has none"):
            builder(tiny)(members)
        assert IMAGE in builder(tiny)(members | {"png": PNG}).text.media
        assert not builder(tiny, unread=[key])(members).text.media
    nothing = {"question": "What?", "answer": "7", "image": None, "images": [], "id": "a.jpg"}
    nothing |= {"img": "none", "video": "", "audios": [None], "picture": float("nan")}
    assert not builder(tiny)(vqa() | {"json": json.dumps(nothing).encode()}).text.media


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ["a.png", "b.png"]}, "names a picture, and the sample has 1 of them"),
        ({"image_paths": ["a.png", "b c.png"]}, "names a picture, and the sample has 1 of them"),
        ({"video": "a"}, r"video='a' is not read, .*build\.unread=\[video\]"),
        ({"audios": ["a.wav"]}, "audios=.* is not read"),
        ({"sound_file": "a.wav"}, "sound_file=.* is not read"),
    ],
)
def test_a_record_loses_none_of_several_files(tiny: Tokenizer, more: Any, message: str) -> None:
    record = {"question": "What?", "answer": "7"} | more
    members = {"__url__": "s.tar", "__key__": "k0", "json": json.dumps(record).encode(), "png": PNG}
    with pytest.raises(BadSample, match=f"k0: .*{message}"):
        builder(tiny)(members)
    assert IMAGE in builder(tiny, unread=list(more))(members).text.media
    # The files that are members are not missing, read or not.
    packed = members | {"b.png": PNG, "a.wav": b""}
    assert IMAGE in builder(tiny, unread=[".b.png", ".a.wav"])(packed).text.media


def test_unread_keys_are_left_out(tiny: Tokenizer) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    record = {"question": "What?", "answer": "7", "conversations": talk, "system": "Be brief."}
    members = {"__url__": "s.tar", "__key__": "k0", "json": json.dumps(record).encode()}
    for key in ("question", "conversations"):
        with pytest.raises(BadSample, match=r"system beside the turns is not read; .*\[system\]"):
            builder(tiny, unread=[key])(members)
    with pytest.raises(BadSample, match="it has question and conversations"):
        builder(tiny, unread=["system"])(members)
    for key, expected in (("question", "b"), ("conversations", "7")):
        build = builder(tiny, unread=["system", key])
        assert build.references(members) == [expected]
        assert "Be brief" not in text(tiny, build(members).text.tokens)


def test_an_answer_is_where_fields_say(tiny: Tokenizer) -> None:
    build = builder(tiny, fields={"answers": "truth"})
    members = vqa()
    assert builder(tiny).references(members)
    assert build.references(members) == []
    with pytest.raises(BadSample, match="no supervised token"):
        build(members)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unread": ["png"]}, r"write the member png as \.png"),
        ({"unread": ["*.png"]}, r"write the member \*\.png"),
        ({"unread": [None]}, "None is no member and no key"),
        ({"fields": {"image": []}}, r"image=\[\] must name each place once"),
        ({"fields": {"image": [".a.png", ".a.png"]}}, "must name each place once"),
        ({"fields": {"image": ".wav"}}, r"image=\.wav is no picture"),
    ],
)
def test_places_that_would_not_be_heard(tiny: Tokenizer, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"build\.\w+.*{message}"):
        builder(tiny, **options)


def test_text_builders_lose_no_picture(tiny: Tokenizer) -> None:
    build = RetrievalBuilder(1, True, tokenizer=tiny, sequence_length=64)
    record = {"query": "a", "positive": "b", "negatives": ["c"]}
    members = {"__url__": "s.tar", "__key__": "k0", "json": json.dumps(record).encode()}
    assert build(members).num_tokens
    with pytest.raises(BadSample, match="member png is not read"):
        build(members | {"png": PNG})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fields": {"image": ".img.jpg", "record": ".meta.json"}},
        {"fields": {"question": "annotation.query"}},
        {"unread": [".0.png", ".json"]},
        *({"form": form} for form in (Caption(), Chat(), Document(), MultipleChoice(), Ocr())),
    ],
)
def test_a_question_has_its_pictures(tiny: Tokenizer, tmp_path: Any, options: Any) -> None:
    (tmp_path / "p.jpg").write_bytes(image_bytes(64, 32, kind="jpg"))
    asked = question("what is it?", [str(tmp_path / "p.jpg")] * 2)
    sample = builder(tiny, **options).prompt(asked)
    assert sample.text.media[IMAGE].items.tolist() == [0, 0, 0, 1, 1, 1]
    written = text(tiny, sample.text.tokens)
    assert "what is it?" in written
    form: Form | None = options.get("form")
    assert written.endswith("it?") == isinstance(form, Document), "documents have no roles"
    assert not sample.text.weights.any()


def test_a_question_of_a_text_builder_refuses_pictures(tiny: Tokenizer, tmp_path: Any) -> None:
    (tmp_path / "p.png").write_bytes(PNG)
    build = RetrievalBuilder(1, True, tokenizer=tiny, sequence_length=64)
    with pytest.raises(BadSample, match=r"0\.png is not read"):
        build.prompt(question("what?", str(tmp_path / "p.png")))
