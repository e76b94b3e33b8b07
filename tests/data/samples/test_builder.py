"""Whatever a record does to a builder is a bad sample, which names shard, key and exception."""

from __future__ import annotations

import errno
import json
import pickle
import struct
import zlib
from typing import Any

import pytest
import torch
from PIL import Image, UnidentifiedImageError

from nvmm.batch import Sample, Text
from nvmm.data.loader import Data
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.forms import Document
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from tests.data.conftest import vqa
from tests.data.samples.test_instruct import builder
from tests.data.shards.test_hostile import png


class Raising(Builder):
    """A builder whose every method raises `error`."""

    error: Exception = ValueError()

    def __call__(self, members: Any) -> Sample:
        raise self.error

    def prompt(self, members: Any) -> Sample:
        raise self.error

    def references(self, members: Any) -> list[str]:
        raise self.error


class Inheriting(Raising):
    """Its methods are those of the class above."""


@pytest.mark.parametrize("kind", [Raising, Inheriting])
@pytest.mark.parametrize("method", ["__call__", "prompt", "references", "measure"])
def test_whatever_a_builder_raises_names_the_sample(
    tiny: Tokenizer, kind: type[Raising], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = kind(tokenizer=tiny, sequence_length=8)
    errors = [
        TypeError("odd"),
        KeyError("odd"),
        AssertionError("odd"),
        RecursionError("odd"),
        OverflowError("odd"),
        MemoryError("odd"),
        RuntimeError("odd"),
        struct.error("odd"),
        zlib.error("odd"),
        ValueError("odd"),
        UnidentifiedImageError("odd"),
        Image.DecompressionBombError("odd"),
    ]
    for error in errors:
        monkeypatch.setattr(Raising, "error", error)
        expected = rf"^s\.tar:k0: {type(error).__name__}: '?odd"
        with pytest.raises(BadSample, match=expected) as caught:
            getattr(build, method)(vqa())
        assert caught.value.source == "s.tar:k0" and caught.value.__cause__ is error
    own = BadSample("s.tar:k0", "as it is")
    for error in (own, ImportError("pip install"), OSError(errno.EIO, "disk"), KeyboardInterrupt()):
        monkeypatch.setattr(Raising, "error", error)
        with pytest.raises(type(error)) as unchanged:
            getattr(build, method)(vqa())
        assert unchanged.value is error, "neither bad nor the sample's fault"


def test_messages_are_short_and_can_be_printed() -> None:
    error = BadSample("s.tar:\udce9", "x" * 10**6 + "\ud800")
    assert len(str(error)) < 2020 and str(error).startswith(r"s.tar:\udce9: xxx")
    str(error).encode()
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.source, again.reason) == (str(error), error.source, error.reason)


def odd(value: Any, **images: bytes) -> dict[str, Any]:
    return vqa(**images) | {"json": json.dumps(value).encode()}


def conversation(role: Any) -> dict[str, Any]:
    return odd({"conversations": [{"from": role, "value": "Hi"}, {"from": "gpt", "value": "7"}]})


DEEP = b"[" * 10**5 + b"]" * 10**5
NO_PALETTE = png(4, 4, (b"IDAT", zlib.compress(bytes(20))), colour=3)


@pytest.mark.parametrize(
    ("members", "options"),
    [
        (conversation({"role": "human"}), {}),
        (conversation(["human"]), {}),
        (odd({"question": "?", "answer": ["7"], "weights": [10**400]}), {}),
        (odd({"question": "?", "answer": "\ud800"}), {}),
        (vqa() | {"json": b'{"question": "?", "answer": ' + DEEP + b"}"}, {}),
        (vqa(png=NO_PALETTE), {}),
        (odd({"text_list": ["a"], "image_info": 3}), {"form": Document()}),
    ],
    ids=["dict_role", "list_role", "weight", "half_character", "deep", "palette", "info"],
)  # fmt: skip
def test_odd_records_are_bad_samples(
    tiny: Tokenizer, members: dict[str, Any], options: dict[str, Any]
) -> None:
    build = builder(tiny, **options)
    for method in (build, build.measure)[: 1 if "png" in members else 2]:
        with pytest.raises(BadSample, match=r"^s\.tar:k0: ") as caught:
            method(members)
        str(caught.value).encode()


def test_a_builder_that_makes_no_sample(tiny: Tokenizer, make_shards: Any) -> None:
    """What comes back is checked as well, and a text without tokens never reaches a batch."""
    made: list[Any] = [None, Sample((Text(torch.zeros(0), torch.zeros(0)),)), Sample(())]

    class Odd(Builder):
        def __call__(self, members: Any) -> Any:
            number = int(members["__key__"])
            if number >= len(made):
                return builder(tiny)(members)
            return made[number]

    train = Dataset(make_shards(6), lambda **options: Odd(**options))
    data = Data(64, 0, train, tokenizer=tiny)
    [batch] = next(data.batches(split="train", global_batch_size=6, micro_batch_size=6))
    assert sorted(batch.sample_ids.tolist()) == [-4, -3, -2, 3, 4, 5]
