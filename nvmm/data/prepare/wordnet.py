"""WordNet 3.0's nouns: their words and definitions, from Debian's package wordnet-base."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "wordnet-base"


@dataclass(frozen=True)
class Synset:
    """A noun's synset: its words, joined; its definition; offsets of its hypernyms."""

    offset: str
    words: str
    gloss: str
    parents: tuple[str, ...]


def fetch(folder: Path, package: Path | None = None) -> Path:
    """Return the path of data.noun, unpacked into `folder`; nothing is installed.

    package: the .deb; None: apt-get downloads it.
    """
    target = folder / "wordnet" / "usr" / "share" / "wordnet" / "data.noun"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if package is None:
            if not list(folder.glob(f"{PACKAGE}_*.deb")):
                subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
            package = next(folder.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "wordnet")], check=True)
    return target


def read_nouns(path: Path) -> list[Synset]:
    """Read WordNet's data.noun, whose format is wndb(5WN)."""
    synsets = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # The licence is indented.
        fields, _, gloss = line.partition(" | ")
        parts = fields.split(" ")
        count = int(parts[3], 16)
        words = [word.replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
        pointers = parts[5 + 2 * count :]
        parents = [
            pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")
        ]
        definition = gloss.partition('; "')[0].strip()
        synsets.append(Synset(parts[0], ", ".join(words), definition, tuple(parents)))
    return synsets
