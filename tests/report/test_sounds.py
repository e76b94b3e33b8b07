"""Sounds for a person: spectrogram, windows' borders, player; in the inspector's page."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from nvmm.commands.inspect_batch import sounds_of
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.samples.drawn_sounds import _BORDER, spectrogram_png, wav
from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.report.batch import segments, to_html, to_text
from tests.data.samples.test_listening import tokenizer as tokenizer
from tests.jobs import sounds_run
from tests.jobs.sounds_run import FRONT_END, RATE


def columns(png: bytes, row: int) -> list[int]:
    """The columns of a picture that are a border in this row."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return np.flatnonzero((pixels[row] == _BORDER).all(-1)).tolist()


def test_windows_lie_where_they_were_cut() -> None:
    """Three windows of 8 frames every 2.5: 13 columns, borders where they begin, ends at the foot;
    the loudest bin is bright and at the bottom where it is the first."""
    windows = torch.zeros(3, 4, 8)
    windows[:, 0] = 10.0
    png = spectrogram_png(windows, 2.5)
    image = Image.open(io.BytesIO(png))
    assert image.size == (13, 12)
    assert columns(png, 0) == [0, 2, 5] and columns(png, 11) == [0, 2, 5, 8, 10, 12]
    pixels = np.asarray(image).astype(int)
    assert pixels[-1, 6].sum() > 600 and pixels[0, 6].sum() < 100
    assert Image.open(io.BytesIO(spectrogram_png(windows, None))).size == (24, 12)
    wide = Image.open(io.BytesIO(spectrogram_png(torch.zeros(16, 64, 965), 241.17)))
    assert wide.size == (960, 192)


def test_a_wav_file_has_the_samples() -> None:
    samples = torch.tensor([0.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    with wave.open(io.BytesIO(wav(samples, 8000))) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 4)
        assert np.frombuffer(file.readframes(4), "<i2").tolist() == [0, 16384, -32767, 32767]
    with wave.open(io.BytesIO(wav(torch.zeros(44_100), 44_100, 16_000))) as file:
        assert file.getframerate() == 16_000 and abs(file.getnframes() - 16_000) <= 1


@pytest.fixture
def data(tokenizer: Any, tmp_path: Path) -> Data:
    """Two samples of two clips, of which the first sample's first is lost, and one of text."""

    def build(**options: Any) -> SoundBuilder:
        template = ListeningTemplate(begin="", ask="\n<SEP>", finish="<|im_end|>", few_shot="")
        return SoundBuilder(instantiate(FRONT_END), template, **options)

    clip = {"sound": "0.wav", "prompt": "What?", "answer": "A dog"}
    records = [
        [clip | {"prompt": "a" * 200}, clip | {"sound": "1.wav"}],
        [clip, clip | {"sound": "1.wav"}],
        [{"prompt": "What?", "answer": "A dog"}],
    ]
    samples: list[dict[str, Any]] = []
    for number, clips in enumerate(records):
        sounds = {f"{i}.wav": sounds_run.tone(10 * number + i) for i in range(len(clips))}
        sample = {"__key__": str(number), "json": json.dumps({"clips": clips}).encode()}
        samples.append(sample | (sounds if number < 2 else {}))
    write_shards(tmp_path, "train", samples)
    return Data(120, 0, Dataset(str(tmp_path / "train-*.tar"), build), tokenizer=tokenizer)


def test_the_inspector_draws_and_plays_what_is_heard(data: Data, tokenizer: Any) -> None:
    samples = [data.sample(number) for number in range(3)]
    assert [sample.dropped for sample in samples] == [1, 0, 0]
    batch = collate(samples, pad_id=0)
    texts = segments(batch, tokenizer, [sample.source for sample in samples])
    shown = to_text(batch, texts, color=False)
    assert "sound 1 window 2" in shown and "51 x 16 frames and bins" in shown
    sounds = sounds_of(samples, [data.located(number) for number in range(3)])
    page = to_html(batch, texts, "sounds", sounds)
    found = re.findall(r'data:audio/wav;base64,([^"]+)"', page)
    assert len(found) == page.count('class=sound alt="sound') == 3, "of five, one was lost"
    front = instantiate(FRONT_END)
    for text, number in zip(found, (1, 10, 11), strict=True):
        with wave.open(io.BytesIO(base64.b64decode(text))) as file:
            played = np.frombuffer(file.readframes(10**6), "<i2")
            assert file.getframerate() == RATE
        from nvmm.data.samples.decode import Limits, read_sound

        sound = read_sound(sounds_run.tone(number), "s", Limits(), channel="first")
        expected = (front.waveform(sound, "s") * 32767).round().numpy()
        assert np.array_equal(played, expected)
    alone = to_html(batch, texts, "sounds")
    assert "<audio" not in alone and alone.count("data:image/png") == 3
