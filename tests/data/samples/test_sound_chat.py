"""Conversations about sounds: markers, placeholders, windows that end in silence, and what is
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import IGNORE_INDEX, MediaKind
from nvmm.commands.shard import main as shard
from nvmm.config.check import option
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import ChatTemplate
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.sound_chat import SoundChatBuilder
from nvmm.data.samples.sounds import FrontEnd
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from tests.data.samples.test_sounds import noise, wave

AUDIO = MediaKind("audio")
FRONT = FrontEnd(
    **{"rate": 8000, "window": 0.4, "hop": 0.4, "most_windows": 4, "fft": 128, "frame_hop": 80},
    **{"bins": 8, "fmax": 4000.0, "compression": "whisper", "fmin": 0.0},
)
"""Windows of 40 frames: 20 tokens, 10 features."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = train_tokenizer(tmp_path_factory.mktemp("sounds"))
    return Tokenizer(str(folder), image_token="<sound>", extra_tokens=["<sound>"])


@pytest.fixture
def build(tokenizer: Tokenizer) -> Callable[..., SoundChatBuilder]:
    chatml = {k: v for k, v in option("template", "chatml").items() if k != "_target_"}

    def make(**changes: Any) -> SoundChatBuilder:
        options: dict[str, Any] = {"tokens_per_window": 10, "sequence_length": 200}
        options |= {"tokenizer": tokenizer, **changes}
        return SoundChatBuilder(ChatTemplate(**chatml), FRONT, **options)

    return make


def members(
    turns: list[str], seconds: tuple[float, ...] = (0.5,), **record: Any
) -> dict[str, bytes | str]:
    """Turns of human and model in turn, and sounds `0.wav`, `1.wav` ..."""
    names = ["human", "gpt"]
    said = [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]
    sounds = {f"{i}.wav": wave(noise(s, 8000, i), 8000) for i, s in enumerate(seconds)}
    content = json.dumps({"id": 7, "conversations": said, **record}).encode()
    return {"__url__": "s.tar", "__key__": "k", "json": content, **sounds}


def shown(tokenizer: Tokenizer, tokens: torch.Tensor) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return text.replace("<|im_start|>", "(").replace("<|im_end|>", ")")


def test_a_sound_has_as_many_placeholders_as_it_lasts(build: Any, tokenizer: Tokenizer) -> None:
    """0.5 s: a whole window, and 10 frames of the next, which are 5 tokens and 2 features."""
    sample = build()(members(["<sound>\nWhat?", "A dog."]))
    check_sample(sample)
    text, media = sample.text, sample.text.media[AUDIO]
    assert (
        shown(tokenizer, text.tokens) == f"(user\n{'<sound>' * 12}\nWhat?)\n(assistant\nA dog.)\n"
    )
    assert media.extents.tolist() == [40, 10] and media.counts.tolist() == [10, 2]
    assert media.values.shape == (2, 8, 40) and media.tiles.tolist() == [1, 2]
    first = text.tokens.tolist().index(tokenizer.token_id("<sound>"))
    assert media.positions.tolist() == [first, first + 10]
    assert shown(tokenizer, text.tokens[text.weights > 0]) == "A dog.)"
    batch = collate([sample, build()(members(["Hello", "You"], ()))], pad_id=0)
    assert (batch.labels[1] != IGNORE_INDEX).any() and len(batch.media[AUDIO].counts) == 2


def test_without_a_mask_every_window_is_whole(build: Any, tokenizer: Tokenizer) -> None:
    sample = build(mask_padding=False)(members(["<sound>\nWhat?", "A dog."]))
    media = sample.text.media[AUDIO]
    assert media.extents is None and media.num_features.tolist() == [10, 10]
    assert sample.text.tokens.tolist().count(tokenizer.token_id("<sound>")) == 20
    masked = build()(members(["<sound>\nWhat?", "A dog."]))
    # Side by side in a batch, whole windows are those of all frames.
    joined = collate([masked, sample], pad_id=0).media[AUDIO]
    assert joined.extents.tolist() == [40, 10, 40, 40]
    assert joined.counts.tolist() == [10, 2, 10, 10]


def test_sounds_stand_where_their_markers_are(build: Any, tokenizer: Tokenizer) -> None:
    """In several turns, by number, or without a marker in front of the first question."""
    seconds = (0.1, 0.2)
    for turns in (
        ["<sound>Which?", "One.", "And <sound>?", "Two."],
        ["<sound-1>Which?", "One.", "And <sound-2>?", "Two."],
    ):
        text = build()(members(turns, seconds, sound=["a/b.wav", "c.wav"])).text
        media = text.media[AUDIO]
        one, two = "<sound>" * 2, "<sound>" * 5
        said = f"(user\n{one}Which?)\n(assistant\nOne.)\n(user\nAnd {two}?)\n(assistant\nTwo.)\n"
        assert shown(tokenizer, text.tokens) == said
        assert media.items.tolist() == [0, 1] and media.counts.tolist() == [2, 5]
    bare = build()(members(["Which?", "One."], seconds)).text
    assert shown(tokenizer, bare.tokens).startswith(f"(user\n{one}{two}Which?)")
    turned = members(["Which?", "One."], seconds, sound=["1.wav", "0.wav"])
    assert build()(turned).text.media[AUDIO].counts.tolist() == [5, 2]


def test_a_prompt_ends_where_the_answer_begins(build: Any, tokenizer: Tokenizer) -> None:
    asked = members(["<sound>What?", "A dog."], (0.1,))
    sample = build().prompt(asked, suffix=" Say!")
    assert shown(tokenizer, sample.text.tokens) == (
        "(user\n<sound><sound>What? Say!)\n(assistant\n"
    )
    assert not sample.text.weights.any()
    assert build().question(asked) == "What?" and build().references(asked) == ["A dog."]
    assert build().stop_ids[0] == tokenizer.token_id("<|im_end|>")


def test_a_long_conversation_loses_its_end_and_no_sound(build: Any) -> None:
    long = members(["<sound>What?", "A dog. " * 20], (0.1,))
    whole = build(sequence_length=400)(long).text
    cut = build(sequence_length=40)(long).text
    assert len(whole.tokens) > 40 and torch.equal(cut.tokens, whole.tokens[:40])
    late = members(["What?", "A dog. " * 20, "And <sound>?", "A cat."], (0.1,))
    with pytest.raises(BadSample, match=r"s\.tar:k: \d+ tokens, 2 of them sound, do not fit in"):
        build(sequence_length=40)(late)
    with pytest.raises(BadSample, match="do not fit"):
        build(sequence_length=40).prompt(members(["What? " * 30, "x"], (0.1,)))


@pytest.mark.parametrize(
    ("turns", "record", "message"),
    [
        (["<sound>a<sound>", "b"], {}, "the text has 2 <sound> markers, the sample 1 sounds"),
        (["<sound-2>a", "b"], {}, "markers <sound-2> must be <sound-1>"),
        (["a", "b<sound>"], {}, "<sound> in an assistant turn"),
        (["<sound>a"], {}, "no supervised token"),
        (["<sound>a", "b"], {"sound": ["x.wav", "y.wav"]}, "names other sounds than its members"),
        (["<sound>a", "b"], {"system": "x"}, "system beside the turns is not read"),
    ],
)
def test_bad_records_name_the_sample(
    build: Any, turns: list[str], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadSample, match=rf"s\.tar:k: .*{message}"):
        build()(members(turns, **record))


def test_sounds_that_cannot_be_used_name_the_sample(build: Any) -> None:
    short = members(["<sound>a", "b"], (0.01,))
    with pytest.raises(BadSample, match=r"0\.wav has 80 samples, too few for a feature"):
        build()(short)
    other = members(["<sound><sound>a", "b"], (0.1, 0.2))
    other["x.wav"] = other.pop("0.wav")
    with pytest.raises(BadSample, match=r"the order of sounds 1\.wav, x\.wav is ambiguous; number"):
        build()(other)
    listed = members(["<sound><sound>a", "b"], (0.1, 0.2), sound=["x.wav", "1.wav"])
    listed["x.wav"] = listed.pop("0.wav")
    assert build()(listed).text.media[AUDIO].counts.tolist() == [2, 5]


def test_features_that_no_pooling_gives_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens_per_window=11 must be 20, half the 40 frames"):
        build(tokens_per_window=11)


def test_a_placeholder_in_the_text_is_refused(tmp_path: Path) -> None:
    folder = train_tokenizer(tmp_path)
    tokenizer = Tokenizer(str(folder))
    chatml = {k: v for k, v in option("template", "chatml").items() if k != "_target_"}
    build = SoundChatBuilder(
        ChatTemplate(**chatml), FRONT, 10, tokenizer=tokenizer, sequence_length=99
    )
    with pytest.raises(BadSample, match=r"<\|vision_pad\|> is written in the text"):
        build(members(["<sound>a <|vision_pad|>", "b"], (0.1,)))


def test_released_json_becomes_shards_that_are_read(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sound by its path, a list of two, and none: what tools/shard.py packs is what is read."""
    sounds = tmp_path / "sounds" / "a"
    sounds.mkdir(parents=True)
    for number, seconds in enumerate((0.1, 0.2)):
        (sounds / f"{number}.wav").write_bytes(wave(noise(seconds, 8000, number), 8000))
    rows = [("a/0.wav", ["<sound>What?"]), (["a/1.wav", "a/0.wav"], ["<sound-1><sound-2>Which?"])]
    rows.append((None, ["Hello?"]))
    lines = []
    for number, (sound, asked) in enumerate(rows):
        turns = [{"from": "human", "value": asked[0]}, {"from": "gpt", "value": "One."}]
        row = {"id": number, "duration": 0.1, "conversations": turns}
        lines.append(json.dumps(row if sound is None else {**row, "sound": sound}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    command = ["jsonl", "--json", str(tmp_path / "train.jsonl"), "--to", str(tmp_path / "shards")]
    command += ["--files", f"sound={tmp_path / 'sounds'}/", "--name", "train"]
    monkeypatch.setattr("sys.argv", ["shard.py", *command])
    shard()
    dataset = Dataset(str(tmp_path / "shards" / "train-*.tar"), lambda **options: build(**options))
    data = Data(200, 0, dataset, tokenizer=build().tokenizer)  # type: ignore[arg-type]
    [batch] = next(data.batches(split="train", global_batch_size=3, micro_batch_size=3))
    items, windows = batch.count_media("audio").tolist()
    assert sorted(items) == sorted(windows) == [0, 1, 2]
    assert sorted(batch.media[AUDIO].counts.tolist()) == [2, 2, 5]


def test_an_answer_and_what_is_heard(build: Any, tokenizer: Tokenizer) -> None:
    """The tokens of an answer are those between the prompt and its end in training."""
    sample = members(["<sound>\nWhat?", "A dog."])
    builder = build()
    whole, prompt = builder(sample).text.tokens, builder.prompt(sample).text.tokens
    answer = [*builder.answer_tokens("A dog."), builder.stop_ids[0]]
    assert whole[len(prompt) : len(prompt) + len(answer)].tolist() == answer
    [heard] = builder.heard(sample)
    windows = FRONT.log_mel(FRONT.windows(heard))
    assert torch.equal(windows, builder(sample).text.media[AUDIO].values)


def test_nothing_of_a_sample_is_lost(build: Any) -> None:
    whole = members(["<sound>\nWhat?", "A dog."])
    with pytest.raises(BadSample, match=r"1\.mp3 is no sound of wav, flac, ogg"):
        build()(whole | {"1.mp3": b"x"})
    build(unread=[".1.mp3"])(whole | {"1.mp3": b"x"})
    with pytest.raises(BadSample, match=r"image='a\.png' names a picture, and the sample has none"):
        build()(members(["<sound>\nWhat?", "A dog."], image="a.png"))
