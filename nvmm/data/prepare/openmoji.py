"""npm's openmoji 17.0.0 (CC BY-SA 4.0): 4,495 emoji as SVG, in colour and in black, with names.

An `Entry` is a name with its pictures; entries that share a picture, a name or a base emoji are of
one concept, and a concept is in one split alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nvmm.io.files import publish

PACKAGE = "openmoji@17.0.0"
SHA256 = "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
STYLES = ("color", "black")
TONES = (
    "no skin tone",
    "light skin tone",
    "medium-light skin tone",
    "medium skin tone",
    "medium-dark skin tone",
    "dark skin tone",
)
"""By openmoji's number; 0 is the yellow that an emoji has without a tone."""
SPLITS = {"train": 0.8, "val": 0.05, "test": 0.15}

MOST_NAMES = 8
"""A picture of more names is left out."""

_CAPTION_TAGS = 4
_GENDER = re.compile(r"-200D-264[02](-FE0F)?")
_ADULT = re.compile(r"^1F46[89](?=-)")
_WANTED = re.compile(r"package/(data/openmoji\.json|(color|black)/svg/[0-9A-F-]+\.svg)")


@dataclass(frozen=True)
class Emoji:
    """A line of openmoji.json. tone: place in TONES. base: code of the emoji without a tone."""

    code: str
    name: str
    tags: tuple[str, ...]
    subgroup: str
    tone: int
    base: str

    @property
    def concept(self) -> str:
        """The base's code without gender: of man, woman and person alike."""
        return _ADULT.sub("1F9D1", _GENDER.sub("", self.base))


@dataclass
class Entry:
    """A name: its caption and the pictures that show it, in either style.

    pictures: style -> paths below the set's folder; equal pictures have one path.
    """

    name: str
    caption: str
    subgroup: str
    tone: int
    base: str
    split: str = ""
    pictures: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def all_pictures(self) -> set[str]:
        """The pictures of both styles."""
        return set().union(*self.pictures.values())


def fetch(folder: Path, package: Path | None = None) -> Path:
    """Return the folder of the unpacked package, brought by `npm pack` and checked by its sha256.

    package: openmoji-17.0.0.tgz, where it is on disk already.

    Raises ValueError where npm is missing or fails, and for a package of other bytes.
    """
    target = folder / "openmoji"
    if (target / "data/openmoji.json").is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if package is None:
        if shutil.which("npm") is None:
            raise ValueError(
                f"npm fetches {PACKAGE} and is not there (apt-get install npm); or give"
                " --package openmoji-17.0.0.tgz"
            )
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        package = folder / "openmoji-17.0.0.tgz"
    if not package.is_file():
        raise ValueError(f"--package {package} is not a file")
    data = package.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{package} has sha256 {digest}; {PACKAGE} has {SHA256}: remove it")
    with publish(target) as temporary, tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and (match := _WANTED.fullmatch(member.name)):
                content = archive.extractfile(member)
                path = temporary / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read() if content else b"")
    return target


def read(folder: Path) -> list[Emoji]:
    """Read data/openmoji.json below the package's folder, without emoji of two skin tones.

    Raises ValueError for a file that is none.
    """
    path = folder / "data/openmoji.json"
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        kept = [line for line in lines if line["skintone"] in ("", *range(1, len(TONES)))]
        tags_of = {line["hexcode"]: _tags(line) for line in lines}
        return [
            Emoji(
                code=line["hexcode"],
                name=line["annotation"],
                # openmoji gives the tones of an emoji no tags of their own.
                tags=_tags(line) or tags_of.get(line["skintone_base_hexcode"], ()),
                subgroup=line["subgroups"],
                tone=line["skintone"] or 0,
                base=(line["skintone_base_hexcode"] if line["skintone"] else "") or line["hexcode"],
            )
            for line in kept
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no openmoji.json ({type(error).__name__}: {error})") from error


def _tags(line: Mapping[str, str]) -> tuple[str, ...]:
    joined = f"{line['tags']}, {line['openmoji_tags']}"
    return tuple(dict.fromkeys(tag.strip() for tag in joined.split(",") if tag.strip()))


def build_entries(
    folder: Path, emoji: Iterable[Emoji], to: Path, *, size: int, seed: int, processes: int
) -> tuple[list[Entry], list[str]]:
    """Rasterise the pictures to `to`/images, and return entries with their splits, by name.

    size: pixels of a side. processes: that draw at a time. Also returns the SVG files that could
    not be drawn; an emoji without any picture is left out.
    """
    # 1. Draw: the colour of every emoji, the black of those without a tone, where tones look alike.
    emoji = list(emoji)
    jobs = [(e, style) for e in emoji for style in STYLES if style == "color" or not e.tone]
    files = [folder / style / "svg" / f"{e.code}.svg" for e, style in jobs]
    draw = partial(rasterise, size=size)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            drawn = list(pool.map(draw, files, chunksize=64))
    else:
        drawn = list(map(draw, files))
    # 2. Pictures of equal pixels are one picture, under the first one's name. One of many names, as
    # flags in black have, says nothing and is left out.
    names: dict[bytes, set[str]] = defaultdict(set)
    for (e, _), data in zip(jobs, drawn, strict=True):
        if data is not None:
            names[data].add(e.name)
    entries: dict[str, Entry] = {}
    links: list[tuple[Hashable, Hashable]] = []
    paths: dict[bytes, str] = {}
    failed = []
    for (e, style), file, data in zip(jobs, files, drawn, strict=True):
        if data is None:
            failed.append(str(file.relative_to(folder)))
            continue
        if len(names[data]) > MOST_NAMES:
            continue
        if data not in paths:
            paths[data] = f"images/{style}/{e.code}.png"
            (to / paths[data]).parent.mkdir(parents=True, exist_ok=True)
            (to / paths[data]).write_bytes(data)
        path = paths[data]
        if e.name not in entries:
            tags = [tag for tag in e.tags if tag not in e.name][:_CAPTION_TAGS]
            caption = ": ".join([e.name, ", ".join(tags)] if tags else [e.name])
            entries[e.name] = Entry(e.name, caption, e.subgroup, e.tone, e.base)
        entries[e.name].pictures[style].add(path)
        links += [(("name", e.name), ("concept", e.concept)), (("name", e.name), ("path", path))]
    # 3. Split by concept.
    split_of = split(links, seed)
    for entry in entries.values():
        entry.split = split_of["name", entry.name]
    return sorted(entries.values(), key=lambda entry: entry.name), failed


def split(links: Iterable[tuple[Hashable, Hashable]], seed: int) -> dict[Hashable, str]:
    """Return the split of each linked thing; linked ones are in one split."""
    find, union = _disjoint_sets()
    things: dict[Hashable, None] = {}
    for one, other in links:
        union(one, other)
        things |= {one: None, other: None}
    roots = list(dict.fromkeys(map(find, things)))
    random.Random(f"{seed}/split").shuffle(roots)
    ends = [round(len(roots) * share) for share in itertools.accumulate(SPLITS.values())]
    chosen: dict[Hashable, str] = {}
    for name, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
        chosen |= dict.fromkeys(roots[start:end], name)
    return {thing: chosen[find(thing)] for thing in things}


def _disjoint_sets() -> tuple[Callable[[Hashable], Hashable], Callable[[Hashable, Hashable], None]]:
    parent: dict[Hashable, Hashable] = {}

    def find(thing: Hashable) -> Hashable:
        while (above := parent.setdefault(thing, thing)) != thing:
            parent[thing] = parent[above]
            thing = above
        return thing

    def union(one: Hashable, other: Hashable) -> None:
        parent[find(other)] = find(one)

    return find, union


def rasterise(svg: Path, *, size: int) -> bytes | None:
    """Return an SVG on white as PNG, size x size, None where cairosvg cannot draw it.

    Raises ValueError for a file that cannot be read, and where cairosvg is missing.
    """
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        raise ValueError(
            f"cairosvg is missing (pip install 'nvmm[demo]', apt-get install libcairo2): {error}"
        ) from error
    try:
        text = svg.read_bytes()
    except OSError as error:
        raise ValueError(f"{svg} cannot be read ({error.strerror})") from error
    try:
        data: bytes = cairosvg.svg2png(
            bytestring=text, output_width=size, output_height=size, background_color="white"
        )
    except Exception:  # It raises AttributeError for a marker that is not there, for one.
        return None
    return data
