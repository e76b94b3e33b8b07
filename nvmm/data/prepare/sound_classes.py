"""Real recordings of two Debian packages, by class: voices, animals, instruments, ...

    tuxpaint-stamps-default  X.ogg is the sound of what stamp X shows, X_desc_<language>.ogg its
                             spoken name; a language is read by one voice or few
    sonic-pi-samples         <family>_<name>.flac

A class of spoken names is a language, one of effects a folder of stamps or a family of samples.
Stamps of letters, digits and money are left out. The package has many a recording several times,
under several names: those of equal samples are one.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
"""Samples a second of a take."""
SECONDS = 1.5
"""The longest take."""
SHORTEST = 0.1
"""Seconds; a shorter recording is left out."""
FEWEST = 8
"""Recordings; a smaller class is left out."""
VOICES = {
    "be": "belarusian",
    "bg": "bulgarian",
    "ca": "catalan",
    "da": "danish",
    "": "english",
    "el": "greek",
    "es": "spanish",
    "fr": "french",
    "lt": "lithuanian",
    "nl": "dutch",
    "ro": "romanian",
    "ru": "russian",
}
"""Language of a spoken name, in its file's name -> class."""
STAMPS = {
    "animals/birds": "bird",
    "animals/mammals": "mammal",
    "household": "household",
    "seasonal": "seasonal",
}
"""Folder of stamps -> class of their sounds."""
FAMILIES = {
    "ambi": "ambience",
    "bass": "bass",
    "bd": "kick",
    "drum": "drum",
    "elec": "electronic",
    "glitch": "glitch",
    "loop": "loop",
    "mehackit": "robot",
    "perc": "percussion",
    "tabla": "tabla",
}
"""Family of samples -> class."""
_SPOKEN = re.compile(r"_desc(?:_(\w+))?\.ogg")


@dataclass(frozen=True)
class Recording:
    """A file of a class. detail: what it is a recording of, as its name says."""

    path: Path
    label: str
    detail: str

    @property
    def is_voice(self) -> bool:
        """Whether it is a spoken name."""
        return self.label in VOICES.values()


def recordings(stamps: Path, samples: Path) -> dict[str, list[Recording]]:
    """Return the recordings of each class, in the order of the digests of their names.

    stamps: the package's folder `stamps`. samples: the other one's folder `samples`. Raises
    ValueError where no class has FEWEST recordings.
    """
    by_label: dict[str, dict[str, Recording]] = {}
    files = [(path, stamps) for path in sorted(stamps.rglob("*.ogg"))]
    files += [(path, samples) for path in sorted(samples.glob("*.flac"))]
    for path, root in files:
        recording = _recording(path, root)
        if recording is not None and (heard := _heard(path)) is not None:
            by_label.setdefault(recording.label, {}).setdefault(heard, recording)
    classes = {
        label: sorted(each.values(), key=lambda recording: _digest(recording.path.name))
        for label, each in sorted(by_label.items())
        if len(each) >= FEWEST
    }
    if not classes:
        raise ValueError(f"{stamps}, {samples}: no class has {FEWEST} recordings")
    return classes


def held_out(labels: Sequence[str]) -> list[str]:
    """Return every third class of the alphabet, from the second on."""
    return sorted(labels)[1::3]


def split(
    classes: Mapping[str, Sequence[Recording]], most_train: int, most_test: int
) -> tuple[dict[str, list[Recording]], dict[str, list[Recording]]]:
    """Return the training and the test recordings of each class: at most half are for the test."""
    train, test = {}, {}
    for label, each in classes.items():
        num_test = min(len(each) // 2, most_test)
        test[label] = list(each[:num_test])
        train[label] = list(each[num_test : num_test + most_train])
    return train, test


def waveform(recording: Recording, speed: float = 1.0) -> NDArray[np.float32]:
    """Return the first channel at RATE, `speed` times as fast and as high."""
    import soundfile
    import soxr

    values, rate = soundfile.read(recording.path, dtype="float32", always_2d=True)
    return np.asarray(soxr.resample(values[:, 0], rate * speed, RATE), dtype=np.float32)


def take(values: NDArray[np.float32], begin: float = 0.0) -> bytes:
    """Return SECONDS of a waveform as FLAC of 16 bits, full scale.

    begin: where to begin, from 0 for the first such part to 1 for the last one.
    """
    import soundfile

    length = round(SECONDS * RATE)
    first = round(begin * max(0, len(values) - length))
    part = values[first : first + length]
    greatest = float(np.abs(part).max(initial=0.0))
    scaled = part * (0.9 / greatest) if greatest > 0 else part
    file = io.BytesIO()
    soundfile.write(file, scaled, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _recording(path: Path, root: Path) -> Recording | None:
    """Return a file's recording; None where it is of no class."""
    label: str | None = None
    name = path.stem
    place = path.relative_to(root).as_posix()
    if path.suffix == ".flac":
        family, _, name = path.stem.partition("_")
        label = FAMILIES.get(family)
    elif spoken := _SPOKEN.search(path.name):
        label = VOICES.get(spoken[1] or "")
        name = path.name[: spoken.start()]
    else:
        label = next((STAMPS[each] for each in STAMPS if place.startswith(f"{each}/")), None)
    if label is None or place.startswith("symbols/"):
        return None
    return Recording(path, label, name.replace("_", " ").lower())


def _heard(path: Path) -> str | None:
    """Return a digest of a file's samples; None where it is too short or no sound."""
    import soundfile

    try:
        values, rate = soundfile.read(path, dtype="int16")
    except soundfile.LibsndfileError:
        return None
    if len(values) < SHORTEST * rate:
        return None
    return hashlib.sha256(values.tobytes()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
