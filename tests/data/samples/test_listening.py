"""Clips and text become a sample: tokens, weights, windows, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import ATTENDED, MediaKind, Sample
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.clip_shots import joined
from nvmm.data.samples.decode import Limits
from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.samples.record import Record
from nvmm.data.samples.sounds import FrontEnd
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.modules.spans import query_spans
from tests.data.samples.test_sounds import noise, wave

ATTENDED_AUDIO, PLACED_AUDIO = MediaKind("audio", ATTENDED), MediaKind("audio")
FRONT = FrontEnd(
    **{"rate": 8000, "window": 0.4, "hop": 0.1, "most_windows": 4, "fft": 128, "frame_hop": 80},
    **{"bins": 8, "fmax": 4000.0},
)
TEMPLATE = ListeningTemplate(begin="", ask="\n<SEP>", finish="<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    extra = ("<audio>", "<|endofchunk|>", "<SEP>")
    folder = train_tokenizer(tmp_path_factory.mktemp("sounds"))
    return Tokenizer(str(folder), extra_tokens=extra)


@pytest.fixture
def build(tokenizer: Tokenizer) -> Callable[..., SoundBuilder]:
    def make(**changes: Any) -> SoundBuilder:
        options = {"sequence_length": 200, "tokenizer": tokenizer, **changes}
        template = options.pop("template", TEMPLATE)
        return SoundBuilder(options.pop("front_end", FRONT), template, **options)

    return make


def clip(number: int | None, prompt: str = "What?", answer: str = "A dog") -> dict[str, Any]:
    sound = {} if number is None else {"sound": f"{number}.wav"}
    return {**sound, "prompt": prompt, "answer": answer}


def members(*clips: dict[str, Any], seconds: float = 0.5, **more: Any) -> dict[str, Any]:
    sounds = {
        c["sound"]: wave(noise(seconds, 8000, i), 8000) for i, c in enumerate(clips) if "sound" in c
    }
    record = {"clips": clips, **more}
    return {"__url__": "s.tar", "__key__": "k", "json": json.dumps(record).encode(), **sounds}


def test_one_clip_is_its_text_with_the_loss_on_the_answer(build: Any, tokenizer: Tokenizer) -> None:
    text = build()(members(clip(0), prefix="Task. ")).text
    shown = "Task. <audio>what?\n<SEP>a dog<|endofchunk|><|im_end|>"
    assert tokenizer.decode(text.tokens, skip_special_tokens=False) == shown
    trained = text.tokens[text.weights > 0]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "a dog<|endofchunk|><|im_end|>"
    media = text.media[ATTENDED_AUDIO]
    assert media.values.shape == (2, 8, 41) and media.tiles.tolist() == [1, 2]
    marker = text.tokens.tolist().index(tokenizer.token_id("<audio>"))
    assert media.positions.tolist() == media.ends.tolist() == [marker, marker]


def test_windows_follow_their_markers_in_the_sequence(build: Any, tokenizer: Tokenizer) -> None:
    text = build(placement="sequence", tokens_per_window=3)(members(clip(0), clip(1))).text
    media = text.media[PLACED_AUDIO]
    places = (text.tokens == tokenizer.token_id("<audio>")).nonzero().flatten().tolist()
    assert len(places) == 4 * 3 and media.placeholder_id == tokenizer.token_id("<audio>")
    assert media.positions.tolist() == places[::3]
    assert media.items.tolist() == [0, 0, 1, 1] and not text.weights[places].any()


def test_text_sees_its_own_clip_and_earlier_ones(build: Any, tokenizer: Tokenizer) -> None:
    """The block-triangular mask, from the markers' own tokens on."""
    sample = build()(members(clip(0), clip(None), clip(1)))
    batch = collate([sample], pad_id=0)
    first, second = (batch.tokens[0] == tokenizer.token_id("<audio>")).nonzero().flatten().tolist()
    spans = query_spans(batch.media[ATTENDED_AUDIO], batch)[:, 0].tolist()
    assert spans == [[0, 0]] * first + [[0, 2]] * (second - first) + [[0, 4]] * (
        len(spans) - second
    )


def test_a_prompt_ends_where_the_last_answer_begins(build: Any, tokenizer: Tokenizer) -> None:
    given = members(clip(0), clip(1, "Which?"), interleaved="similar")
    sample = build().prompt(given, suffix=" Say!")
    shown = (
        "Here are similar examples. <audio>what?\n<SEP>a dog<|endofchunk|><audio>which? say!\n<SEP>"
    )
    assert tokenizer.decode(sample.text.tokens, skip_special_tokens=False) == shown
    assert not sample.text.weights.any()
    builder = build()
    assert builder.references(members(clip(0))) == ["a dog"]
    assert builder.question(members(clip(0))) == "What?"
    assert builder.stop_ids[0] == tokenizer.token_id("<|endofchunk|>")


def test_the_first_clips_of_a_long_sample_are_left_out_and_counted(build: Any) -> None:
    long = members(clip(0, "a" * 60), clip(1, "b" * 30), clip(2))
    whole = build()(long)
    size = len(whole.text.tokens)
    cut = build(sequence_length=size - 1)(long)
    assert (whole.dropped, cut.dropped) == (0, 1)
    alone = build(sequence_length=size - 1)(members(*json.loads(long["json"])["clips"][1:]))
    assert torch.equal(cut.text.tokens, alone.text.tokens)
    with pytest.raises(BadSample, match=r"its last clip takes \d+ tokens"):
        build(sequence_length=4)(long)


def test_a_start_skips_the_beginning(build: Any) -> None:
    late = {**clip(0), "start": 0.25}
    assert len(build()(members(late, seconds=0.65)).text.media[ATTENDED_AUDIO].values) == 1
    with pytest.raises(BadSample, match=r"of 0\.65 s has no part that begins at 0\.7 s"):
        build()(members({**clip(0), "start": 0.7}, seconds=0.65))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"clips": []}, "clips must be a list that is not empty"),
        ({"clips": [clip(0)] * 17}, "17 sounds are more than build.most_clips=16"),
        ({"clips": [clip(3)]}, r"the sound '3\.wav' of sound is no member"),
        ({"clips": [{**clip(None), "sound": "json"}]}, "is none of wav, flac, ogg"),
        ({"clips": [{**clip(0), "start": -1}]}, "start -1 of sound"),
        ({"clips": [{**clip(0), "start": "x"}]}, "start 'x' of sound"),
        ({"clips": [{**clip(0), "label": 1}]}, "a clip must be an object of sound, start"),
        ({"clips": [clip(0, answer="")]}, "answer is empty"),
        ({"clips": [{"sound": "0.wav", "prompt": "x"}]}, "a clip has no answer"),
        ({"clips": [clip(0, "an <audio> written")]}, "2 markers <audio> for 1 sounds"),
        ({"clips": [clip(0)], "prefix": 3}, "prefix must be text"),
        ({"clips": [clip(0)], "task": 3}, "task must be text"),
        ({"clips": [clip(0)], "task": "x", "prefix": "y"}, "it has a prefix and a task"),
        ({"clips": [clip(0)], "interleaved": "alike"}, "interleaved must be one of similar, rand"),
        ({"clips": [clip(0)], "options": "a"}, "options must be a list that is not empty"),
        ({"clips": [clip(0)], "options": [1]}, "options must be text"),
        ({"clips": [clip(None)]}, r"no clip names 0\.wav"),
    ],
)
def test_bad_records_name_the_sample(build: Any, record: dict[str, Any], message: str) -> None:
    sample = {**members(clip(0)), "json": json.dumps(record).encode()}
    with pytest.raises(BadSample, match=rf"s\.tar:k: .*{message}"):
        build()(sample)


def test_a_bad_sound_is_a_hole_that_names_the_file(build: Any) -> None:
    broken = {**members(clip(0)), "0.wav": members(clip(0))["0.wav"][:100]}
    with pytest.raises(BadSample, match=r"s\.tar:k: member 0\.wav: truncated sound"):
        build()(broken)


def test_a_template_whose_marker_is_no_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"build\.template\.marker=<sound> is no token"):
        SoundBuilder(
            FRONT, ListeningTemplate(marker="<sound>"), tokenizer=tokenizer, sequence_length=9
        )


def test_sounds_go_through_the_loader_and_are_counted(
    build: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Clips unevenly spread, and one sample without a sound."""
    spread = [[clip(0)], [clip(0), clip(1)], [clip(None)], [clip(0), clip(1), clip(2)]]
    write_shards(
        tmp_path,
        "s",
        [
            {name: v for name, v in members(*clips).items() if name != "__url__"}
            | {"__key__": str(i)}
            for i, clips in enumerate(spread)
        ],
    )

    def make(**options: Any) -> SoundBuilder:
        return build(**options)

    dataset = Dataset(str(tmp_path / "s-*.tar"), make)
    data = Data(200, 0, dataset, tokenizer=tokenizer)  # type: ignore[arg-type]
    [batch] = next(data.batches(split="train", global_batch_size=4, micro_batch_size=4))
    assert len(batch.media[ATTENDED_AUDIO].values) == 12
    items, windows = batch.count_media("audio").tolist()
    assert sorted(items) == [0, 1, 2, 3] and [2 * n for n in items] == windows
    counts = data.count([batch], ["audio"])
    assert counts["train/audio.items"] == 6 and counts["train/audio.tiles"] == 12


def test_samples_are_alike_however_often_they_are_built(build: Any) -> None:
    one, two = build()(members(clip(0))), build()(members(clip(0)))
    assert isinstance(one, Sample)
    assert torch.equal(one.text.media[ATTENDED_AUDIO].values, two.text.media[ATTENDED_AUDIO].values)


def test_the_tokens_of_an_answer_are_those_of_training(build: Any, tokenizer: Tokenizer) -> None:
    sample = members(clip(0))
    whole, prompt = build()(sample).text.tokens, build().prompt(sample).text.tokens
    answer = [*build().answer_tokens("A Dog"), build().stop_ids[0]]
    assert whole[len(prompt) : len(prompt) + len(answer)].tolist() == answer


def test_samples_with_a_sound_that_no_clip_names_are_not_joined() -> None:
    def record(**more: bytes) -> Record:
        return Record({**members(clip(0)), **more}, {}, Limits())

    assert list(joined(record(), [record()], "similar")) == ["json", "0.wav", "1.wav"]
    for records in ((record(**{"1.wav": b""}), record()), (record(), record(**{"1.wav": b""}))):
        with pytest.raises(BadSample, match=r"no clip names 1\.wav, which would be lost"):
            joined(records[0], records[1:], "similar")


def test_pictures_of_a_record_are_not_lost(build: Any) -> None:
    with pytest.raises(BadSample, match=r"image='a\.png' names a picture, and the sample has none"):
        build()(members(clip(0), image="a.png"))
