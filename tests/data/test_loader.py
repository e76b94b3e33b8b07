"""What each rank reads, workers, positions, and the validation pass."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvmm.batch import Batch
from nvmm.data.loader import Data
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.preference import PreferenceBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from tests.data.conftest import template as dialect
from tests.data.conftest import vqa

MakeData = Callable[..., Data]


@pytest.fixture
def make_data(make_shards: Callable[..., str], tiny: Tokenizer) -> MakeData:
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)

    def make(count: int = 11, num_workers: int = 0, **options: Any) -> Data:
        train = Dataset(make_shards(count), build)
        validation = Dataset(make_shards(5, "validation"), build)
        return Data(64, num_workers, train, validation, tokenizer=tiny, seed=7, **options)

    return make


def steps(data: Data, count: int, split: str = "train", **options: Any) -> list[list[Batch]]:
    arguments = {"global_batch_size": 4, "micro_batch_size": 2} | options
    return list(islice(data.batches(split=split, **arguments), count))


def ids(step: list[Batch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in step]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])


def assert_equal(mine: list[list[Batch]], other: list[list[Batch]]) -> None:
    left = [tensor for step in mine for batch in step for tensor in tensors(batch)]
    right = [tensor for step in other for batch in step for tensor in tensors(batch)]
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_micro_batches_deal_the_global_batch(make_data: MakeData) -> None:
    data = make_data()
    options = {"global_batch_size": 8, "micro_batch_size": 2}
    expected = sorted(i for pack in data.order(8).batch(1) for i in pack.samples)
    one = steps(data, 2, **options)[1]
    assert [len(batch) for batch in ids(one)] == [2] * 4
    assert sorted(i for batch in ids(one) for i in batch) == expected
    ranks = [steps(data, 2, rank=rank, size=2, **options)[1] for rank in (0, 1)]
    assert [len(batch) for mine in ranks for batch in ids(mine)] == [2] * 4
    assert sorted(i for mine in ranks for batch in ids(mine) for i in batch) == expected
    # the m-th micro-batches of the ranks are neighbours in cost
    width = [[batch.tokens.shape[1] for batch in mine] for mine in ranks]
    assert min(width[0][0], width[1][0]) >= max(width[0][1], width[1][1])


def test_start_seeks(make_data: MakeData) -> None:
    data = make_data()
    assert_equal(steps(data, 2, start=5), steps(data, 7)[5:])


def test_position_continues_with_another_batch_size(make_data: MakeData) -> None:
    data = make_data()
    steps(data, 3)
    position = data.position(3)
    assert position is not None
    with pytest.raises(ValueError, match="the data is at step 3, not at 4"):
        data.position(4)
    later = steps(data, 2, start=3, position=position, global_batch_size=2)
    order = data.order(4)
    stream = [i for k in range(6) for pack in order.batch(k) for i in pack.samples]
    assert sorted(i for step in later for batch in ids(step) for i in batch) == sorted(
        stream[12:16]
    )
    resumed = data.position(5)
    assert resumed is not None and resumed["cuts"][-1]["packs"] == 16


def test_workers_change_nothing_and_leave_global_random_states_alone(make_data: MakeData) -> None:
    expected = steps(make_data(), 5, start=2)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    assert_equal(steps(make_data(num_workers=2), 5, start=2), expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_worker_errors_name_the_sample(make_data: MakeData, tmp_path: Any) -> None:
    write_shards(tmp_path, "bad", [{"__key__": "k7", "json": b"{"}])
    good = make_data(num_workers=1)
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    bad = Dataset(str(tmp_path / "bad-*"), build)
    data = Data(64, 1, bad, on_error="stop", tokenizer=good.tokenizer)
    with pytest.raises(ValueError, match=r"bad-00000\.tar:k7: member json: damaged JSON"):
        steps(data, 1)


def test_validation_is_one_pass_in_order(make_data: MakeData) -> None:
    data = make_data()
    found = steps(data, 99, split="validation")
    assert [ids(step) for step in found] == [[[0, 1], [2, 3]], [[4, -1], [-1, -1]]]
    assert data.num_batches("validation", 4) == 2
    # the filling adds no supervised token: each sample counts once
    counted = sum(batch.num_tokens for step in found for batch in step)
    assert data.validation is not None
    assert counted == sum(int(data.validation[i].text.weights.sum()) for i in range(5))
    # and is no sample of any dataset's counters
    counts = data.count([batch for step in found for batch in step], ["image"])
    tokens = sum(len(data.validation[i].text.tokens) for i in range(5))
    expected = {"samples": 5, "tokens": tokens, "bad": 0, "image.items": 4}
    assert counts == counts | {f"train/{name}": value for name, value in expected.items()}
    shared = [steps(data, 99, split="validation", rank=r, size=2) for r in (0, 1)]
    assert [len(rank) for rank in shared] == [2, 2]
    assert counted == sum(b.num_tokens for rank in shared for step in rank for b in step)


def test_packing_and_padding_multiples(make_data: MakeData) -> None:
    options = {"micro_batch_size": 1, "pad_multiple": 16, "segment_multiple": 4}
    for batch in steps(make_data(30, pack=True), 2, **options)[1]:
        assert batch.tokens.shape[0] == 1
        assert batch.tokens.shape[1] % 16 == 0
        assert 64 - 16 < batch.tokens.shape[1] <= 64
        assert batch.cu_seqlens is not None
        assert (batch.cu_seqlens % 4 == 0).all()
    padded = steps(make_data(), 1, pad_multiple=16)[0][0]
    assert padded.tokens.shape[0] == 2
    assert padded.tokens.shape[1] % 16 == 0


def test_packed_pairs_fit_their_rows_under_context_parallelism(
    tmp_path: Path, tiny: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Chosen and rejected are padded one by one: on 2 context ranks to multiples of 4."""
    words = ["Yes", "No", "Maybe so", "I do not know", "Who knows"]
    samples = []
    for number in range(40):
        chosen, rejected = words[number % 5], words[(number + 1 + number // 5 % 4) % 5]
        record = {"prompt": "Hi " * (1 + number % 7), "chosen": chosen, "rejected": rejected}
        # Of the last, no row takes the tokens and their padding.
        if number == 39:
            record = {"prompt": "Hi " * 20, "chosen": "Maybe so", "rejected": "No"}
        samples.append({"__key__": f"{number:04d}", "json": json.dumps(record).encode()})
    write_shards(tmp_path, "pairs", samples, samples_per_shard=20)
    build = partial(PreferenceBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    train = Dataset(str(tmp_path / "pairs-*.tar"), build)
    tokens = train.bind(tokenizer=tiny, sequence_length=999).lengths[:, 0]
    room = -(-int(tokens[39]) // 4) * 4
    assert room // 4 < (tokens[39] + 2 * 3) // 4 and tokens[:39].max() + 2 * 3 <= room
    data = Data(room, 0, train, tokenizer=tiny, pack=True, window=40, max_bad_fraction=1.0)
    cp2 = {"pad_multiple": 4, "segment_multiple": 4, "micro_batch_size": 1, "global_batch_size": 1}
    found: list[int] = []
    for [batch] in data.batches(split="train", **cp2):
        assert batch.tokens.shape[1] <= room
        assert batch.cu_seqlens is not None and (batch.cu_seqlens % 4 == 0).all()
        assert (batch.owners.bincount()[batch.sample_ids >= 0] == 2).all()
        found += batch.sample_ids.tolist()
        if len(found) >= 40:
            break
    assert sorted(found) == [-41, *range(39)]
    assert f"has {tokens[39]} tokens and may need" in caplog.text


def test_refusals(make_data: MakeData) -> None:
    data = make_data()
    with pytest.raises(ValueError, match=r"trainer\.global_batch_size=6 must be a multiple of"):
        steps(data, 1, global_batch_size=6, micro_batch_size=4)
    with pytest.raises(ValueError, match="split=test is unknown; use one of train, validation"):
        steps(data, 1, split="test")
    with pytest.raises(ValueError, match=r"rank=2 must be in \[0, 2\)"):
        steps(data, 1, rank=2, size=2)
    plain = Dataset(data.train.patterns, lambda **o: None)
    with pytest.raises(ValueError, match="build=NoneType must be a subclass of"):
        Data(64, 0, plain, tokenizer=data.tokenizer)
    without = Data(64, 0, data._template, tokenizer=data.tokenizer)
    with pytest.raises(ValueError, match=r"data\.validation is null"):
        steps(without, 1, split="validation")
    with pytest.raises(ValueError, match=r"data\.num_workers=-1"):
        make_data(num_workers=-1)
    with pytest.raises(ValueError, match=r"data\.on_error=ignore must be one of skip, stop"):
        make_data(on_error="ignore")


def test_bad_samples_leave_the_same_hole_on_every_layout(
    make_data: MakeData, tiny: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Padded and packed, whatever reads them; counted by dataset, logged once."""
    write_shards(
        tmp_path,
        "mixed",
        [
            {**vqa(answer="12" * (1 + i % 4)), "__key__": f"k{i}"}
            | ({"json": b"{"} if i in (2, 5) else {})
            for i in range(9)
        ],
    )
    train = make_data().train
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    entries = [
        {"name": "bad", "shards": str(tmp_path / "mixed-*"), "weight": 1},
        {"name": "good", "shards": train.patterns, "weight": 2},
    ]
    for pack in (False, True):

        def make(num_workers: int = 0, pack: bool = pack, **options: Any) -> Data:
            options = {"blend": entries, "window": 30, "tokenizer": tiny, "pack": pack} | options
            return Data(64, num_workers, Dataset(None, build), **options)

        options = {"global_batch_size": 4, "micro_batch_size": 1}
        caplog.clear()
        data = make()
        one = steps(data, 12, **options)
        whole = [sorted(i for batch in ids(step) for i in batch) for step in one]
        holes = {-2 - i for step in whole for i in step if i < 0}
        assert {i % 2**32 for i in holes} == {2, 5} and {i >> 53 for i in holes} == {0}
        lines = [r.getMessage() for r in caplog.records if "bad sample" in r.getMessage()]
        assert len(lines) == 2 and all("member json: damaged JSON" in line for line in lines)
        for number, hole in enumerate(b for step in one for b in step):
            missing = hole.sample_ids < 0
            if hole.cu_seqlens is None and bool(missing.any()):
                assert hole.num_tokens == 0, number
        ranks = [steps(make(num_workers=r), 12, rank=r, size=2, **options) for r in (0, 1)]
        for step, mine, other in zip(whole, *ranks, strict=True):
            assert sorted(i for batch in ids(mine) + ids(other) for i in batch) == step
        counts = data.count([batch for step in one for batch in step], ["image"])
        assert counts["bad/bad"] == sum(i < 0 for step in whole for i in step)
        assert counts["bad/samples"] + counts["bad/bad"] + counts["good/samples"] == sum(
            map(len, whole)
        )
        assert counts["good/bad"] == 0 and counts["bad/image.items"] == 0
        assert counts["good/image.tiles"] > counts["good/image.items"] > 0
        tokens = sum(int(b.lengths.sum()) for step in one for b in step)
        assert counts["bad/tokens"] + counts["good/tokens"] == tokens - counts["bad/bad"]
        with pytest.raises(ValueError, match=r"k[25]: member json: .*data\.on_error=stop"):
            steps(make(on_error="stop"), 12, **options)


class Shifted(InstructBuilder):
    """Its samples have a token more than were counted, or cannot be counted at all."""

    def measure(self, members: Any) -> tuple[int, int]:
        tokens, tiles = super().measure(members)
        if members["__key__"] == "0001":
            raise KeyError("odd")
        return tokens - (members["__key__"] == "0003"), tiles


def test_samples_that_are_not_as_they_were_counted(
    make_shards: Callable[..., str], tiny: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Their places in packed rows would not fit: they are bad samples, and say why."""
    train = Dataset(make_shards(6), partial(Shifted, dialect(), ImageTags(), 4, tile_size=32))
    data = Data(64, 0, train, tokenizer=tiny, pack=True, window=6)
    step = [batch for step in steps(data, 1, micro_batch_size=1) for batch in step]
    found = [i for batch in step for i in batch.sample_ids.tolist()]
    assert sorted(i for i in found if i < 0) == [-5, -3]
    assert "0003: has 33 tokens; its index says 32" in caplog.text
    assert "0001: could not be built when tokens were counted; to count them anew, delete " in (
        caplog.text
    )


def test_too_many_bad_samples_stop_the_run(make_data: MakeData) -> None:
    data = make_data(max_bad_fraction=0.01)
    data.check_bad({"a": {"samples": 90, "bad": 9}, "b": {"samples": 0, "bad": 1}})
    data.check_bad({"a": {"samples": 9900, "bad": 100}})
    message = (
        r"11 of 101 samples are bad, more than data\.max_bad_fraction=0\.01 \(a: 10 of 100, b: 1"
    )
    with pytest.raises(ValueError, match=message):
        data.check_bad({"a": {"samples": 90, "bad": 10}, "b": {"samples": 0, "bad": 1}})
    lenient = make_data(max_bad_fraction=0.5)
    lenient.check_bad({"a": {"samples": 0, "bad": 10}})
    lenient.check_bad({"a": {"samples": 1, "bad": 20}})
    with pytest.raises(ValueError, match="11 of 11 samples are bad"):
        lenient.check_bad({"a": {"samples": 0, "bad": 6}, "b": {"samples": 0, "bad": 5}})
    make_data(max_bad_fraction=1.0).check_bad({"a": {"samples": 0, "bad": 2000}})
    data._report(3, "s.tar:k3: TypeError: odd")
    with pytest.raises(ValueError, match=r"reason; the last is s\.tar:k3: TypeError: odd"):
        data.check_bad({"a": {"samples": 0, "bad": 100}})


def test_the_start_says_what_the_data_have(
    make_shards: Callable[..., str], tiny: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    build = partial(InstructBuilder, dialect(), ImageTags(), tokens_per_tile=4, tile_size=32)
    folder = Path(make_shards(5)).parent
    write_shards(folder, "text", [vqa() | {"__key__": f"{i}"} for i in range(3)])
    blend = [{"name": name, "shards": f"{folder}/{name}-*.tar"} for name in ("train", "text")]
    blend.append({"name": "more", "shards": f"{folder}/text-00000.tar"})
    validation = Dataset(f"{folder}/train-*.tar", build)
    data = Data(64, 0, Dataset(None, build), validation, blend, tokenizer=tiny)
    caplog.set_level("INFO", "nvmm")
    for split in ("train", "train", "validation", "validation"):
        steps(data, 1, split, images=True)
    assert [record.getMessage() for record in caplog.records] == [
        "data: train: 5 samples, 4 with pictures (4 pictures)",
        "data: text: 3 samples, 0 with pictures (0 pictures)",
        "data: text has no picture, and the model reads pictures",
        f"data: more has 1 shards that others have too: {folder}/text-00000.tar",
        "data: more: 3 samples, 0 with pictures (0 pictures)",
        "data: more has no picture, and the model reads pictures",
        "data: validation: 5 samples, 4 with pictures (4 pictures)",
        "data: validation reads 2 shards that are trained on: " + f"{folder}/train-00000.tar",
    ]
    caplog.clear()
    data = Data(64, 0, Dataset(f"{folder}/text-*.tar", build), tokenizer=tiny)
    steps(data, 1)
    assert [record.levelname for record in caplog.records] == ["INFO"], "a language model"
