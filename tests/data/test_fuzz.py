"""Made-up records, pictures, sounds, tars and tokenizer folders: read, or refused by name.

The examples are the same in every run. A few of each are tried in `make test`, many in
`make test-slow`.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nvmm.batch import Sample
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.decode import Limits, decode
from nvmm.data.samples.forms import Caption, Chat, Document, MultipleChoice, Ocr
from nvmm.data.samples.images import decode_image, read_size
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards import tar
from nvmm.data.shards.dataset import Dataset
from tests.config.test_fuzz import leaves, replaced
from tests.data.conftest import image_bytes, template
from tests.data.samples.test_instruct import builder

SOURCE = "s.tar:k"
PNG = image_bytes(9, 7)


def amounts(quick: int, slow: int) -> pytest.MarkDecorator:
    """Numbers of examples: few in the quick tests, many in the slow ones."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(quick, id="few"), pytest.param(slow, id="many", marks=SLOW)]
    )


SLOW = pytest.mark.slow


def tried(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run a function with so many examples of the strategies, now."""

    def run(function: Callable[..., None]) -> None:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        limits = settings(max_examples=examples, suppress_health_check=checks)
        limits(given(**strategies)(function))()

    return run


# -- records ----------------------------------------------------------------------------------

WORDS = [
    "",
    " ",
    "A",
    "B",
    "<image>",
    "<image>\n<image> a",
    "7",
    "\ud800",
    "\u2028",
    "\0",
    "<|im_end|>",
]
ODD = st.sampled_from([None, True, False, 0, 1, -1, 2, 0.5, 1e308, 10**400, float("nan"), *WORDS])
VALUES: st.SearchStrategy[Any] = st.recursive(
    ODD | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, sometimes anything."""
    return st.integers(0, 4).flatmap(lambda n: strategy if n else VALUES)


TEXT = some(st.sampled_from(["Read it.", "7", "<image> What?", "A", *WORDS]))
NUMBER = some(st.integers(-2, 3) | st.floats(0, 9))


def listed(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return some(st.lists(some(strategy), max_size=3))


def keyed(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return some(st.fixed_dictionaries({}, optional=keys))


ROLE = some(st.sampled_from(["human", "gpt", "system", "user", "assistant", "tool"]))
TURN = keyed(**{"from": ROLE, "value": TEXT, "role": ROLE, "content": TEXT})
FORMS = {
    Chat(): {"conversations": listed(TURN), "question": TEXT, "answer": TEXT},
    Chat("drawn"): {
        "question": TEXT,
        "answers": listed(TEXT | keyed(answer=TEXT)),
        "weights": listed(NUMBER),
    },
    Caption(): {"caption": TEXT},
    MultipleChoice(): {
        "question": TEXT,
        "choices": listed(TEXT),
        "answer": TEXT | NUMBER,
        "hint": TEXT,
    },
    Ocr(): {"words": listed(TEXT), "boxes": listed(listed(NUMBER))},
    Document(): {
        "text": TEXT,
        "texts": listed(TEXT),
        "images": listed(TEXT),
        "text_list": listed(TEXT),
        "image_info": listed(keyed(matched_text_index=NUMBER)),
    },
}
RETRIEVAL = {
    "query": TEXT,
    "positive": TEXT,
    "negatives": listed(TEXT),
    "instruction": TEXT,
    "symmetric": NUMBER,
    "positive_id": TEXT,
    "negative_ids": listed(TEXT),
    "positive_ids": listed(TEXT),
    "scores": listed(NUMBER),
}


@functools.cache
def sized(width: int, height: int) -> bytes:
    return image_bytes(width, height)


def members(record: Any, pictures: list[bytes]) -> dict[str, Any]:
    named = {f"{number}.png": data for number, data in enumerate(pictures)}
    return {"__url__": "s.tar", "__key__": "k", "json": json.dumps(record).encode(), **named}


def made(build: Builder, given: dict[str, Any]) -> Sample | None:
    """The sample that a builder makes, checked; None where it makes none and says which."""
    try:
        sample = build(given)
        check_sample(sample)
    except ValueError as error:
        assert str(error).startswith(SOURCE), error
        str(error).encode()
        return None
    return sample


@amounts(12, 1000)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_records(tiny: Tokenizer, form: Any, examples: int) -> None:
    build = builder(tiny, form=form, sequence_length=96)
    pictures = st.lists(st.sampled_from([sized(9, 7), sized(70, 32), PNG[:40]]), max_size=2)

    @tried(examples, record=keyed(**FORMS[form]), pictures=pictures)
    def check(record: Any, pictures: list[bytes]) -> None:
        given = members(record, pictures)
        sample = made(build, given)
        if sample is not None:
            text = sample.text
            tiles = sum(len(media.tiles) for media in text.media.values())
            assert build.measure(given) == (len(text.tokens), tiles)
            assert len(text.tokens) <= 96
        for method in (build.prompt, build.references, build.measure):
            try:
                method(given)
            except BadSample as error:
                assert error.source == SOURCE


@amounts(12, 1000)
def test_records_of_retrieval(tiny: Tokenizer, examples: int) -> None:
    build = RetrievalBuilder(1, True, num_answers=2, tokenizer=tiny, sequence_length=16)

    @tried(examples, record=keyed(**RETRIEVAL))
    def check(record: Any) -> None:
        sample = made(build, members(record, []))
        assert sample is None or all(0 < len(text.tokens) <= 16 for text in sample.texts)


@amounts(12, 1000)
def test_bytes_that_should_be_json(tiny: Tokenizer, examples: int) -> None:
    build = builder(tiny)
    good = json.dumps({"question": "?", "answer": "7"}).encode()

    @tried(examples, data=st.binary(max_size=40) | mutated(good))
    def check(data: bytes) -> None:
        made(build, members({}, []) | {"json": data})


# -- pictures, sounds -------------------------------------------------------------------------


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few places overwritten, cut out, doubled, or cut off."""
    place = st.integers(0, max(0, len(data) - 1))
    step = st.tuples(place, st.integers(0, 8), st.binary(max_size=8))

    def apply(steps: list[tuple[int, int, bytes]]) -> bytes:
        changed = data
        for start, length, new in steps:
            changed = changed[:start] + new + changed[start + length :]
        return changed

    cut = place.map(lambda stop: data[:stop])
    return st.lists(step, min_size=1, max_size=3).map(apply) | cut


@functools.cache
def pictures() -> dict[str, bytes]:
    """Small pictures with the blocks that decoders stumble over."""
    found = {}
    picture = Image.open(io.BytesIO(sized(9, 7)))
    exif = Image.Exif()
    exif[0x0112] = 7
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind, exif=exif)
        found[kind] = buffer.getvalue()
    for name, mode, options in (
        ("palette", "P", {"transparency": 3}),
        ("grey 16", "I;16", {}),
        ("grey alpha", "LA", {"dpi": (72, 72)}),
    ):
        buffer = io.BytesIO()
        shown = picture.convert("L") if mode == "I;16" else picture.convert(mode)
        if mode == "I;16":
            shown = Image.fromarray(np.asarray(shown).astype(np.uint16) * 200)
        shown.save(buffer, "PNG", **options)
        found[name] = buffer.getvalue()
    return found


@amounts(25, 2000)
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "palette", "grey 16", "grey alpha"])
def test_pictures(name: str, examples: int) -> None:
    @tried(examples, data=mutated(pictures()[name]))
    def check(data: bytes) -> None:
        try:
            image = decode_image(data, source=SOURCE, max_pixels=10_000)
        except BadSample as error:
            assert error.source == SOURCE
            return
        assert image.mode in ("L", "RGB") and image.width * image.height <= 10_000
        assert read_size(data, source=SOURCE, max_pixels=10_000) == image.size


@amounts(25, 2000)
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_sounds(kind: str, examples: int) -> None:
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(400) / 9), 8000, format=kind)

    @tried(examples, data=mutated(buffer.getvalue()))
    def check(data: bytes) -> None:
        try:
            sound = decode(kind.lower(), data, source=SOURCE, limits=Limits(max_seconds=60))
        except BadSample as error:
            assert error.source == SOURCE
            return
        assert sound.values.ndim == 2 and sound.rate > 0


# -- tars -------------------------------------------------------------------------------------


def tar_bytes(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        long = "d" * 60 + "/" + "long" * 15
        for name in ("a.json", "a.txt", f"{long}.json", "d/\u00fc.json", "e.json"):
            header = tarfile.TarInfo(name)
            header.size, header.mtime = 5, 1.5 if form == tarfile.PAX_FORMAT else 1
            file.addfile(header, io.BytesIO(name[:5].encode()))
    return buffer.getvalue()


def resealed(data: bytes) -> bytes:
    """A tar whose headers have right checksums again, so that their other fields are read."""
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


@amounts(15, 400)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path: Path, form: int, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tar_bytes(form)
    headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
    fields = [(0, 100), (124, 12), (156, 1), (257, 8), (345, 155)]
    odd = [b"-1000", b"\xff" * 12, b"\x80" + b"\1" * 11, b"L", b"x", b"g", b"S", b"5"]
    field = st.tuples(
        st.sampled_from(headers),
        st.sampled_from(fields),
        st.binary(max_size=12) | st.sampled_from(odd),
    )

    def write(changes: list[tuple[int, tuple[int, int], bytes]]) -> bytes:
        data = bytearray(good)
        for at, (start, length), new in changes:
            new = new[:length]
            data[at + start : at + start + len(new)] = new
        return resealed(bytes(data))

    shapes = (
        mutated(good)
        | mutated(good).map(resealed)
        | st.lists(field, min_size=1, max_size=3).map(write)
    )
    path, count = tmp_path / "s.tar", 0

    @tried(examples, data=shapes)
    def check(data: bytes) -> None:
        nonlocal count
        count += 1
        # The fast reader lists what tarfile lists, or leaves it to tarfile.
        listed, problem = tar.list_members(data, "s.tar")
        with monkeypatch.context() as patch:
            patch.setattr(tar, "_list_plain", lambda data: None)
            slow, slow_problem = tar.list_members(data, "s.tar")
        assert (listed, str(problem)) == (slow, str(slow_problem))
        # Every sample of the index is read, and is bad by name at worst.
        path.write_bytes(data)
        dataset = Dataset(str(path), dict, index_dir=str(tmp_path / "index" / str(count)))
        dataset.skip_damage = True
        try:
            total = len(dataset)
        except ValueError as error:
            assert str(path) in str(error)
            return
        for number in range(total):
            try:
                found = dataset.members(number)
            except BadSample as error:
                assert error.source.startswith(f"{path}:")
                continue
            assert found["__key__"] == dataset.index.key(number)
            found["__key__"].encode()
        shutil.rmtree(tmp_path / "index" / str(count))


# -- tokenizer folders ------------------------------------------------------------------------

OTHERS = {
    "bos_token": {"content": "<|im_start|>", "special": True},
    "eos_token": "<|im_end|>",
    "additional_special_tokens": ["<|im_start|>"],
    "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
    "chat_template": "{{ messages }}",
}


@amounts(4, 150)
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "tokenizer"])
def test_tokenizer_folders(tmp_path: Path, name: str, examples: int) -> None:
    """A folder is read, and makes ids of its vocabulary, or is refused by its path."""
    folder = train_tokenizer(tmp_path / "folder")
    path = folder / f"{name}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    content = content if name == "tokenizer" else content | OTHERS
    # The vocabulary is thousands of places of one kind: it is drawn as a whole.
    large = (("model", "vocab"), ("model", "merges"))
    places = [p for p in leaves(content) if p[:2] not in large] + [
        p for p in large if "model" in content
    ]
    text = json.dumps(content).encode()
    odd = st.tuples(st.sampled_from(places), VALUES).map(
        lambda drawn: json.dumps(replaced(content, *drawn)).encode()
    )

    @tried(examples, data=odd | mutated(text[:300]).map(lambda head: head + text[300:]))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            tokenizer = Tokenizer(str(folder))
            template().check(tokenizer)
        except ValueError as error:
            assert str(folder) in str(error), error
            str(error).encode()
            return
        assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode("Read <|im_end|> 7"))
