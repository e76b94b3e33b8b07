"""A sound becomes windows, and a window a log-mel spectrogram: the front end of audio encoders.

    file -> one channel -> the encoder's rate -> full scale -> windows -> spectrograms

Windows overlap (Audio Flamingo, arXiv:2402.01831: 7 s, one every 1.75 s, at most 16), and the last
one is filled up with zeros. The spectrogram is computed in fp64 and returned in fp32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.decode import Channel, Sound

MelScale = Literal["htk", "slaney"]
Compression = Literal["db", "whisper"]
_FLOOR = 1e-10
"""The least power before a logarithm."""
_BREAK_HZ, _HZ_PER_MEL, _LOG_STEP = 1000.0, 200.0 / 3, math.log(6.4) / 27
"""Slaney's scale: linear below 1 kHz, 27 steps a factor of 6.4 above it."""
MARGIN = 0.1
"""Seconds that are read behind the last window, so that the resampler's end lies outside of it."""


@dataclass(frozen=True)
class FrontEnd:
    """What an encoder hears of a sound; the defaults are ClapCap's and Audio Flamingo's.

    rate: samples a second that the encoder was trained with.
    window, hop: seconds of a window, and from the start of one to the next.
    most_windows: a longer sound loses its end.
    channel: the first one, or the mean of all.
    peak: scale the part that is read to +-1. One without a negative sample is stretched to that
        range, 2 x / max - 1.
    quantise: round to 16 bits and back, as a file of 16 bits would have it.
    fft: samples of a frame and of its Hann window. frame_hop: samples between frames.
    bins, fmin, fmax: triangles of the filter bank, and its first and last frequency in Hz.
    scale: htk (2595 log10(1 + f / 700)) or slaney.
    area: whether every triangle has area 1 over Hz (Slaney's) or height 1.
    compression: db, or whisper's (log10, at most 8 below the window's greatest value, then
        (x + 4) / 4, without the last frame).
    """

    rate: int = 44_100
    window: float = 7.0
    hop: float = 1.75
    most_windows: int = 16
    channel: Channel = "first"
    peak: bool = True
    quantise: bool = True
    fft: int = 1024
    frame_hop: int = 320
    bins: int = 64
    fmin: float = 50.0
    fmax: float = 8000.0
    scale: MelScale = "slaney"
    area: bool = True
    compression: Compression = "db"

    def __post_init__(self) -> None:
        require("front_end.channel", self.channel, Channel)
        require("front_end.scale", self.scale, MelScale)
        require("front_end.compression", self.compression, Compression)
        for name in ("rate", "window", "hop", "most_windows", "fft", "frame_hop", "bins"):
            if getattr(self, name) <= 0:
                raise ValueError(f"front_end.{name}={getattr(self, name)} must be greater than 0")
        for name in ("window", "hop"):
            samples = getattr(self, name) * self.rate
            if abs(samples - round(samples)) > 1e-6:
                raise ValueError(
                    f"front_end.{name}={getattr(self, name)} s must be a whole number of samples at"
                    f" front_end.rate={self.rate}, got {samples:g}"
                )
        if not 0 <= self.fmin < self.fmax <= self.rate / 2:
            raise ValueError(
                f"front_end.fmin={self.fmin:g}, fmax={self.fmax:g}: need 0 <= fmin < fmax <="
                f" rate / 2 = {self.rate / 2:g}"
            )
        if self.fft // 2 >= self.window_samples:
            raise ValueError(
                f"front_end.fft={self.fft} must be less than twice a window's"
                f" {self.window_samples} samples, whose ends are mirrored"
            )

    @property
    def window_samples(self) -> int:
        """Samples of a window."""
        return round(self.window * self.rate)

    @property
    def hop_samples(self) -> int:
        """Samples from the start of a window to that of the next."""
        return round(self.hop * self.rate)

    @property
    def frames(self) -> int:
        """Frames of a window's spectrogram."""
        return self.window_samples // self.frame_hop + (self.compression != "whisper")

    @property
    def seconds(self) -> float:
        """The longest part of a sound that is heard."""
        return self.window + (self.most_windows - 1) * self.hop

    def num_windows(self, samples: int) -> int:
        """Return the windows of a sound: 1 up to one window, else 1 + ceil((T - window) / hop)."""
        behind = max(samples - self.window_samples, 0)
        return min(1 + -(-behind // self.hop_samples), self.most_windows)

    def __call__(self, sound: Sound, source: str) -> Tensor:
        """Return log-mel windows, fp32 [n, bins, frames].

        Raises BadSample, which names `source`, for a sound with samples that are no numbers.
        """
        return self.log_mel(self.windows(self.waveform(sound, source)))

    def waveform(self, sound: Sound, source: str) -> Tensor:
        """Return the heard part of a sound of one channel at the encoder's rate, fp64 [n]."""
        if not bool(torch.isfinite(sound.values).all()):
            raise BadSample(source, "a sound with samples that are NaN or infinite")
        samples = _resampled(sound.values[0].double(), sound.rate, self.rate, source)
        last = self.window_samples + (self.most_windows - 1) * self.hop_samples
        samples = samples[:last]
        greatest = float(samples.abs().max())
        if self.peak and greatest > 0:
            if float(samples.min()) >= 0:
                samples = 2 * samples / greatest - 1
            else:
                samples = samples / greatest
        if self.quantise:
            samples = (samples.clamp(-1, 1) * 32767).round() / 32767
        return samples

    def windows(self, samples: Tensor) -> Tensor:
        """Cut samples [n] into windows [windows, window_samples], zeros behind the end."""
        count = self.num_windows(len(samples))
        size = self.window_samples + (count - 1) * self.hop_samples
        padded = torch.nn.functional.pad(samples, (0, size - len(samples)))
        return padded.unfold(0, self.window_samples, self.hop_samples)

    def extents(self, samples: int) -> Tensor:
        """Return the frames that begin within the sound, of each window of one, int64 [windows].

        They are those of Transformers' mask of Whisper's features.
        """
        starts = torch.arange(self.num_windows(samples)) * self.hop_samples
        left = (samples - starts + self.frame_hop - 1) // self.frame_hop
        return left.clamp(0, self.frames)

    def log_mel(self, windows: Tensor) -> Tensor:
        """Return the log-mel spectrograms of windows [n, samples], fp32 [n, bins, frames]."""
        spectrum = torch.stft(
            windows.double(),
            self.fft,
            hop_length=self.frame_hop,
            window=torch.hann_window(self.fft, dtype=torch.float64),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = self._filters @ (spectrum.real.square() + spectrum.imag.square())
        logs = power.clamp(min=_FLOOR).log10()
        if self.compression == "db":
            return (10 * logs).float()
        logs = logs[..., :-1]
        logs = logs.maximum(logs.amax((1, 2), keepdim=True) - 8)
        return ((logs + 4) / 4).float()

    @property
    def _filters(self) -> Tensor:
        return mel_filters(
            self.rate, self.fft, self.bins, self.fmin, self.fmax, self.scale, self.area
        )


def _resampled(samples: Tensor, rate: int, wanted: int, source: str) -> Tensor:
    """Return samples [n] at another rate, by soxr's high-quality filter."""
    if rate == wanted:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"{source}: resampling needs pip install 'nvmm[audio]'") from error
    out = torch.from_numpy(soxr.resample(samples.numpy(), rate, wanted, quality="HQ"))
    if not len(out):
        raise BadSample(source, f"{len(samples)} samples at {rate} Hz are none at {wanted} Hz")
    return out


@functools.lru_cache(maxsize=8)
def mel_filters(
    rate: int, fft: int, bins: int, fmin: float, fmax: float, scale: MelScale, area: bool
) -> Tensor:
    """Return a bank of triangles, fp64 [bins, fft / 2 + 1]; they are evenly spaced in mel."""
    first, last = (_mel(torch.tensor(f, dtype=torch.float64), scale) for f in (fmin, fmax))
    places = torch.arange(bins + 2, dtype=torch.float64) / (bins + 1)
    edges = _hertz(first + (last - first) * places, scale)
    left, centre, right = (edges[i : i + bins, None] for i in range(3))
    frequencies = torch.arange(fft // 2 + 1, dtype=torch.float64) * (rate / fft)
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles * (2 / (right - left)) if area else triangles


def _mel(hertz: Tensor, scale: MelScale) -> Tensor:
    if scale == "htk":
        return 2595 * (1 + hertz / 700).log10()
    above = _BREAK_HZ / _HZ_PER_MEL + (hertz.clamp(min=_BREAK_HZ) / _BREAK_HZ).log() / _LOG_STEP
    return torch.where(hertz < _BREAK_HZ, hertz / _HZ_PER_MEL, above)


def _hertz(mel: Tensor, scale: MelScale) -> Tensor:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    border = _BREAK_HZ / _HZ_PER_MEL
    above = _BREAK_HZ * ((mel - border).clamp(min=0) * _LOG_STEP).exp()
    return torch.where(mel < border, mel * _HZ_PER_MEL, above)
