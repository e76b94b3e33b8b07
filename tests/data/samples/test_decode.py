"""Sounds, JSON and text; what is never decoded."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import soundfile

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.decode import DECODERS, Limits, Sound, decode

RATE = 8000
TONES = np.sin(np.arange(4000)[:, None] * [0.05, 0.11]) * [0.5, 0.25]


def sound(kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONES, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "FLOAT", 1e-7),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", None, 0.05),
    ],
)
def test_sounds(kind: str, subtype: str | None, error: float) -> None:
    value = decode(kind.lower(), sound(kind, subtype), source="s.tar:k")
    assert isinstance(value, Sound)
    assert value.rate == RATE
    assert value.values.shape == (2, 4000)
    assert np.abs(value.values.numpy() - TONES.T).max() < error


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.95])
def test_truncated_sounds_are_bad_samples(kind: str, part: float) -> None:
    data = sound(kind)
    with pytest.raises(
        BadSample, match=rf"s\.tar:k: member 1\.{kind.lower()}: (truncated|cannot decode)"
    ):
        decode(f"1.{kind.lower()}", data[: int(len(data) * part)], source="s.tar:k")


def test_long_sounds_are_refused_before_they_are_decompressed() -> None:
    with pytest.raises(BadSample, match=r"sound of 0 s exceeds max_seconds=0\.4"):
        decode("flac", sound("FLAC"), source="s:k", limits=Limits(max_seconds=0.4))


def test_other_sound_formats_are_refused() -> None:
    with pytest.raises(BadSample, match="sound format AIFF; allowed are WAV, FLAC, OGG"):
        decode("wav", sound("AIFF"), source="s:k")


def test_json_and_text() -> None:
    assert decode("meta.json", b'{"a": [1, null]}', source="s:k") == {"a": [1, None]}
    assert decode("txt", "\ufeffdrei \u00c4pfel\n".encode(), source="s:k") == "drei \u00c4pfel"
    for data in (b"{", b"\xff\xfe\xfd", b"[" * 100_000):
        with pytest.raises(BadSample, match=r"s:k: member json: damaged JSON"):
            decode("json", data, source="s:k")
    with pytest.raises(BadSample, match=r"s:k: member txt: no UTF-8 text"):
        decode("txt", b"\xff", source="s:k")


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten"])
def test_nothing_is_unpickled(extension: str) -> None:
    with pytest.raises(ValueError, match="pickled members are not read"):
        decode(extension, pickle.dumps(Bomb()), source="s:k")


def test_a_decoder_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"member \.hex has no decoder; use one of png, jpg"):
        decode("hex", b"ff", source="s:k")
    monkeypatch.setitem(DECODERS, "hex", lambda data, source, limits: int(data, 16))
    assert decode("a.hex", b"ff", source="s:k") == 255
