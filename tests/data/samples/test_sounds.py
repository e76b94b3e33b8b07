"""From a sound file to log-mel windows, against Transformers'; bad files."""

from __future__ import annotations

import io
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.decode import Limits, Sound, read_sound
from nvmm.data.samples.sounds import MARGIN, FrontEnd, mel_filters

WHISPER = FrontEnd(
    **{"rate": 16_000, "window": 30.0, "hop": 30.0, "fft": 400, "frame_hop": 160, "bins": 80},
    fmin=0.0,
    compression="whisper",
    peak=False,
    quantise=False,
)
LAION = FrontEnd(
    **{"rate": 48_000, "window": 10.0, "hop": 10.0, "frame_hop": 480, "fmax": 14_000.0},
    **{"peak": False, "quantise": False},
)


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise under a rising and falling envelope, at most 0.5."""
    n = round(seconds * rate)
    values = np.random.default_rng(seed).normal(size=n) * np.sin(np.arange(n) / rate * 3) ** 2
    return (values / np.abs(values).max() / 2).astype(np.float32)


def wave(values: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("seconds", "windows"),
    [
        (0.1, 1),
        (7, 1),
        (7.01, 2),
        (8, 2),
        (8.75, 2),
        (10, 3),
        (20, 9),
        (30, 15),
        (33.25, 16),
        (90, 16),
    ],
)
def test_windows_are_counted_by_the_papers_formula(seconds: float, windows: int) -> None:
    assert FrontEnd().num_windows(round(seconds * 44_100)) == windows


def test_windows_overlap_and_the_last_one_ends_in_zeros() -> None:
    front = FrontEnd(rate=1000, fmax=500.0, frame_hop=100, fft=200, bins=4)
    samples = torch.arange(1, 8001, dtype=torch.float64)
    windows = front.windows(samples)
    assert windows.shape == (2, 7000)
    assert windows[0].tolist() == samples[:7000].tolist()
    assert windows[1, :6250].tolist() == samples[1750:].tolist() and not windows[1, 6250:].any()


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("area", [True, False])
@pytest.mark.parametrize(("fmin", "fmax"), [(50.0, 8000.0), (0.0, 14_000.0), (700.0, 1500.0)])
def test_filters_are_transformers(scale: str, area: bool, fmin: float, fmax: float) -> None:
    theirs = mel_filter_bank(
        513, 64, fmin, fmax, 44_100, norm="slaney" if area else None, mel_scale=scale
    )
    ours = mel_filters(44_100, 1024, 64, fmin, fmax, scale, area)
    np.testing.assert_allclose(ours.numpy().T, theirs, rtol=1e-9, atol=1e-15)


def test_log_mel_is_an_independent_spectrogram() -> None:
    """ClapCap's sizes; the bank and the transform are Transformers', in fp64."""
    front = FrontEnd()
    samples = noise(7.0, 44_100)
    ours = front.log_mel(torch.from_numpy(samples)[None])[0].numpy()
    theirs = spectrogram(
        samples.astype(np.float64),
        window_function(1024, "hann"),
        frame_length=1024,
        hop_length=320,
        fft_length=1024,
        power=2.0,
        mel_filters=mel_filter_bank(
            513, 64, 50.0, 8000.0, 44_100, norm="slaney", mel_scale="slaney"
        ),
        log_mel="dB",
        dtype=np.float64,
    )
    assert ours.shape == (64, front.frames) == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_log_mel_is_claps(scale: str) -> None:
    """LAION-CLAP's extractor; it computes in complex64, which is where the rest comes from."""
    extractor = ClapFeatureExtractor()
    samples = noise(10.0, 48_000, 1)
    bank = extractor.mel_filters_slaney if scale == "slaney" else extractor.mel_filters
    theirs = extractor._np_extract_fbank_features(samples.astype(np.float64), bank)
    front = replace(LAION, fmin=0.0, scale=scale, area=scale == "slaney")
    ours = front.log_mel(torch.from_numpy(samples)[None])[0].T.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)


def test_log_mel_is_whispers() -> None:
    samples = noise(30.0, 16_000, 2)
    theirs = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="np")
    ours = WHISPER(Sound(torch.from_numpy(samples)[None], 16_000), "s")
    assert ours.shape == (1, 80, WHISPER.frames)
    np.testing.assert_allclose(ours.numpy(), theirs.input_features, rtol=0, atol=1e-4)


def test_a_sound_is_scaled_stretched_and_rounded() -> None:
    front = FrontEnd(rate=8000, fmax=4000.0, fft=64)

    def of(values: list[float], **changes: bool) -> list[float]:
        sound = Sound(torch.tensor([values]), 8000)
        return replace(front, **changes).waveform(sound, "s").tolist()

    assert of([0.25, -0.5], quantise=False) == [0.5, -1.0]
    assert of([0.25, 0.5, 0.0], quantise=False) == [0.0, 1.0, -1.0]
    assert of([0.0, 0.0]) == [0.0, 0.0]
    assert of([0.1, -0.5], peak=False) == [round(v * 32767) / 32767 for v in (0.1, -0.5)]


@pytest.mark.parametrize("rate", [8000, 22_050, 48_000, 96_000])
def test_a_tone_keeps_its_pitch_and_length_at_another_rate(rate: int) -> None:
    time = np.arange(rate * 2) / rate
    sound = Sound(torch.from_numpy(np.sin(2 * np.pi * 440 * time)).float()[None], rate)
    samples = FrontEnd().waveform(sound, "s")
    assert len(samples) == 2 * 44_100
    inner = slice(4410, -4410)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(2 * 44_100).double() / 44_100)
    assert float((samples - expected)[inner].abs().max()) < 2e-3


def test_a_part_is_read_as_the_whole_is() -> None:
    """From a start, one channel, and across the blocks that are read at a time."""
    values = np.stack([noise(30.0, 8000, 3), noise(30.0, 8000, 4)], axis=1)
    data = wave(values, 8000, "FLAC", "PCM_24")
    whole = read_sound(data, "s", Limits())
    for channel, expected in (("first", whole.values[:1]), ("mean", whole.values.mean(0)[None])):
        part = read_sound(data, "s", Limits(), start=2.5, seconds=20.0, channel=channel)
        assert torch.equal(part.values, expected[:, 20_000:180_000])
    rest = read_sound(data, "s", Limits(), start=29.0, seconds=20.0)
    assert torch.equal(rest.values, whole.values[:, 232_000:])


def test_the_resampler_does_not_see_where_reading_stopped() -> None:
    front = replace(FrontEnd(), most_windows=2, peak=False, quantise=False)
    values = noise(12.0, 48_000, 5)
    whole = front.waveform(Sound(torch.from_numpy(values)[None], 48_000), "s")
    part = torch.from_numpy(values[: round((front.seconds + MARGIN) * 48_000)])[None]
    torch.testing.assert_close(front.waveform(Sound(part, 48_000), "s"), whole, rtol=0, atol=1e-9)


def heard(data: bytes) -> torch.Tensor:
    front = FrontEnd()
    sound = read_sound(data, "s:k", Limits(), seconds=front.seconds + MARGIN, channel="first")
    return front(sound, "s:k")


def with_nan() -> bytes:
    values = noise(1.0, 8000)
    values[100] = np.nan
    return wave(values, 8000, "WAV", "FLOAT")


def lying(offset: int, form: str, value: int) -> bytes:
    data = bytearray(wave(noise(0.5, 8000), 8000))
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def lying_flac() -> bytes:
    """2^36 - 1 samples in the header of one second."""
    data = bytearray(wave(noise(1.0, 8000), 8000, "FLAC"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return bytes(data)


HOSTILE = {
    "truncated": (wave(noise(1.0, 8000), 8000)[:-500], "truncated"),
    "half a FLAC": (wave(noise(1.0, 8000), 8000, "FLAC")[:2000], "truncated|cannot decode"),
    "no samples": (wave(np.zeros(0, np.float32), 8000), "no part that begins|truncated"),
    "no bytes": (b"", "cannot decode"),
    "1 Hz": (wave(noise(0.01, 8000), 1), "1 samples a second"),
    "2 GHz": (lying(24, "<I", 2**31 - 8), "samples a second"),
    "NaN": (with_nan(), "NaN or infinite"),
    "longer than it is": (lying(4, "<I", 2**31), "truncated"),
    "a FLAC of 2^36 samples": (lying_flac(), "exceeds max_seconds|truncated|cannot decode"),
    "no sound": (b"RIFF" + b"\xff" * 200, "cannot decode"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name: str) -> None:
    data, reason = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(BadSample, match=f"s:k: .*({reason})"):
        heard(data)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_24"), ("FLAC", "PCM_24"), ("WAV", "DOUBLE")]
)
def test_eight_channels_of_24_bits_are_read(kind: str, subtype: str) -> None:
    values = np.stack([noise(1.0, 16_000, i) for i in range(8)], axis=1)
    windows = heard(wave(values, 16_000, kind, subtype))
    assert windows.shape == (1, 64, 965) and bool(torch.isfinite(windows).all())


def test_of_an_hour_of_silence_only_the_first_half_minute_is_read() -> None:
    data = wave(np.zeros((3600 * 8000, 1), np.int16), 8000, "FLAC")
    assert len(data) < 1e6
    tracemalloc.start()
    windows = heard(data)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert windows.shape == (16, 64, 965)
    assert torch.equal(windows, torch.full_like(windows, -100.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop": 0.0}, r"front_end\.hop=0\.0 must be greater than 0"),
        ({"window": 0.33333}, r"front_end\.window=0\.33333 s must be a whole number of samples"),
        ({"fmax": 30_000.0}, r"fmax=30000: need 0 <= fmin < fmax <= rate / 2 = 22050"),
        ({"scale": "bark"}, "front_end.scale=bark"),
        ({"window": 0.01, "hop": 0.01}, r"front_end\.fft=1024 must be less than twice"),
    ],
)
def test_a_front_end_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrontEnd(**changes)
