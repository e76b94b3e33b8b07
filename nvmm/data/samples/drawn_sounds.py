"""A sound for a person: a picture of its spectrogram with the windows' borders, and a WAV file."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_COLOURS = ((10, 8, 30), (84, 26, 110), (190, 55, 82), (246, 136, 30), (252, 246, 190))
"""From the quietest to the loudest, evenly spaced."""
_WIDTH, _ROW = 960, 3
"""The most columns of a picture, and the rows of a bin."""
_BORDER = (120, 220, 255)


def spectrogram_png(windows: Tensor, hop: float | None) -> bytes:
    """Draw log-mel windows [n, bins, frames] as one PNG, low frequencies at the bottom.

    hop: frames from the start of a window to that of the next, so that they lie over each other as
        they were cut; None: they stand side by side. A line marks where each window begins, and at
        the foot where it ends.
    """
    count, bins, frames = windows.shape
    step = frames if hop is None else hop
    starts = [round(number * step) for number in range(count)]
    total = starts[-1] + frames
    values = torch.full((bins, total), float(windows.min()))
    for start, window in zip(starts, windows.float(), strict=True):
        values[:, start : start + frames] = window
    low, high = float(values.min()), float(values.max())
    shares = ((values - low) / max(high - low, 1e-9)).flip(0).numpy()
    places = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(shares, places, [c[i] for c in _COLOURS]) for i in range(3)]
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    width = min(total, _WIDTH)
    image = image.resize((width, bins * _ROW), Image.Resampling.BOX)
    pixels = np.asarray(image).copy()
    _mark(pixels, starts, total, whole=True)
    _mark(pixels, [start + frames for start in starts], total, whole=False)
    return _png(pixels)


def _mark(pixels: np.ndarray, frames: Sequence[int], total: int, *, whole: bool) -> None:
    """Draw borders at these frames of `total`, over the whole height or at the foot."""
    height, width = pixels.shape[:2]
    top = 0 if whole else height - max(2, height // 8)
    for frame in frames:
        pixels[top:, min(width - 1, round(frame * width / total))] = _BORDER


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: Tensor, rate: int, most: int | None = None) -> bytes:
    """Return samples [n] in [-1, 1] as a WAV file of one channel and 16 bits.

    most: samples a second at most; a faster sound is resampled.
    """
    if most is not None and rate > most:
        import soxr

        samples = torch.from_numpy(soxr.resample(samples.double().numpy(), rate, most))
        rate = most
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        scaled = (samples.double().clamp(-1, 1) * 32767).round().to(torch.int16)
        file.writeframes(scaled.numpy().astype("<i2").tobytes())
    return buffer.getvalue()
