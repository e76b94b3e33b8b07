"""Members of a shard become values, by one function for each extension.

A decoder takes the bytes, the sample's `shard:key` and the limits, and raises BadSample for bytes
that it cannot read. Your own decoder goes into `DECODERS` under its extension.
Pickled members are never read: unpickling runs code.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import MAX_PIXELS, decode_image

IMAGES = ("png", "jpg", "jpeg", "jfif", "webp", "gif", "bmp", "tif", "tiff")
SOUNDS = ("wav", "flac", "ogg")
UNREAD_IMAGES = ("heic", "heif", "avif", "jxl", "jp2", "svg", "psd", "ico", "ppm", "pgm", "eps")
"""Extensions of pictures that no decoder reads."""
PICKLES = frozenset({"pyd", "pickle", "pkl", "pt", "pth", "ten", "npy", "npz"})
"""Extensions that webdataset would unpickle, or whose formats may hold pickles."""
Channel = Literal["first", "mean", "all"]
"""The channels of a sound that are read."""
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Samples a second of a sound; the slowest telephone has 8000, the fastest recorder 768,000."""
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Limits on a decoded member: width * height of an image, seconds of a sound."""

    max_pixels: int = MAX_PIXELS
    max_seconds: float = 3600.0


@dataclass(frozen=True)
class Sound:
    """A decoded sound. values: float32 [channels, n] in [-1, 1]. rate: samples a second."""

    values: Tensor
    rate: int


def decode(member: str, data: bytes, *, source: str, limits: Limits | None = None) -> Any:
    """Return the value of a member, read as the extension after the last dot of its name says.

    source: `shard:key`.

    Raises BadSample for damaged bytes, naming the member; ValueError for an extension without a
    decoder.
    """
    extension = member.rpartition(".")[2]
    check_extension(extension)
    with naming(member):
        return DECODERS[extension](data, source, limits or Limits())


@contextmanager
def naming(member: str) -> Iterator[None]:
    """Add the member's name to a BadSample that the block raises."""
    try:
        yield
    except BadSample as error:
        raise BadSample(error.source, f"member {member}: {error.reason}") from error


def check_extension(extension: str) -> None:
    """Raise ValueError unless members of this extension can be decoded."""
    if extension in PICKLES:
        raise ValueError(f"member .{extension}: pickled members are not read; they can run code")
    if extension in UNREAD_IMAGES:
        raise ValueError(f"member .{extension}: such pictures are not read; convert them to PNG")
    if extension not in DECODERS:
        raise ValueError(f"member .{extension} has no decoder; use one of {', '.join(DECODERS)}")


def decode_json(data: bytes, source: str, limits: Limits) -> Any:
    """Return any JSON value."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(source, f"damaged JSON ({error})") from error


def decode_text(data: bytes, source: str, limits: Limits) -> str:
    """Return UTF-8 text without its byte order mark and the white space around it."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(source, f"no UTF-8 text ({error})") from error


def decode_sound(data: bytes, source: str, limits: Limits) -> Sound:
    """Return the whole sound of a WAV, FLAC or OGG file, all its channels."""
    return read_sound(data, source, limits)


def read_sound(
    data: bytes,
    source: str,
    limits: Limits,
    *,
    start: float = 0.0,
    seconds: float = math.inf,
    channel: Channel = "all",
) -> Sound:
    """Return a part of the sound of a WAV, FLAC or OGG file; no other frames are decompressed.

    start, seconds: where the part begins, and the longest that it may be.
    channel: the first one, the mean of all, or all.

    Memory follows what the file holds, not what its header says. A file that ends early is bad,
    even where libsndfile would accept it; of a FLAC file that is seen in the part that is read.

    Raises BadSample for a damaged file, and for a rate, length or start outside the limits.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"{source}: sounds need pip install 'nvmm[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in ("WAV", "FLAC", "OGG"):
                raise BadSample(source, f"sound format {file.format}; allowed are WAV, FLAC, OGG")
            frames, rate = file.frames, file.samplerate
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise BadSample(
                    source,
                    f"sound of {rate} samples a second; allowed are {LOWEST_RATE} to"
                    f" {HIGHEST_RATE}",
                )
            if frames > limits.max_seconds * rate:
                raise BadSample(
                    source,
                    f"sound of {frames / rate:.0f} s exceeds max_seconds={limits.max_seconds:g}",
                )
            first = round(start * rate)
            if start < 0 or first >= max(frames, 1):
                raise BadSample(
                    source, f"a sound of {frames / rate:g} s has no part that begins at {start:g} s"
                )
            wanted = frames - first if seconds == math.inf else round(seconds * rate)
            wanted = min(wanted, frames - first)
            if first:
                file.seek(first)
            values = _read_blocks(file, wanted, channel)
    except soundfile.LibsndfileError as error:
        raise BadSample(source, f"cannot decode sound ({error})") from error
    if values.shape[1] < wanted or not wanted or _ends_early(data):
        raise BadSample(source, f"truncated sound: {values.shape[1]} frames of {wanted}")
    return Sound(values, rate)


def _read_blocks(file: Any, wanted: int, channel: Channel) -> Tensor:
    """Return up to `wanted` frames as [channels, n], read block by block."""
    blocks = []
    while wanted > 0:
        block = file.read(min(wanted, _BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            break
        wanted -= len(block)
        if channel == "mean":
            block = block.mean(axis=1, keepdims=True)
        blocks.append(torch.from_numpy(block[:, :1] if channel == "first" else block).T.clone())
    return torch.cat(blocks, dim=1) if blocks else torch.zeros(file.channels, 0)


def _ends_early(data: bytes) -> bool:
    """Return whether a WAV or OGG file ends before its headers say."""
    if data[:4] == b"RIFF":
        promised = int.from_bytes(data[4:8], "little") + 8
        # Encoders that cannot seek write 0 or the greatest number.
        return len(data) < promised < 0xFFFFFFFF
    if data[:4] == b"OggS":
        last_page = data.rfind(b"OggS")
        return not data[last_page + 5] & 4  # Bit 4 marks the stream's last page.
    return False


DECODERS: dict[str, Callable[[bytes, str, Limits], Any]] = {
    **dict.fromkeys(
        IMAGES,
        lambda data, source, limits: decode_image(
            data, source=source, max_pixels=limits.max_pixels
        ),
    ),
    **dict.fromkeys(SOUNDS, decode_sound),
    "json": decode_json,
    **dict.fromkeys(("txt", "text", "caption"), decode_text),
}
