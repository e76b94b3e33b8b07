"""One sample of a shard under the names that builders use, whatever its data set calls them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from PIL import Image

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.decode import (
    IMAGES,
    SOUNDS,
    UNREAD_IMAGES,
    Channel,
    Limits,
    Sound,
    check_extension,
    decode,
    naming,
    read_sound,
)
from nvmm.data.samples.images import Size, read_size

Fields = Mapping[str, str | Sequence[str]]
"""Our name -> the data set's. `.img.jpg` is a member; `meta.caption` a key of `record`.

`record` is the member `.json` unless another is named, and `image` may name several members.
"""
PLAIN = "__plain__"
"""An entry of members that are a question of no data set's: they have our names of fields."""
PASS = "__pass__"
"""An entry of members that says which pass over the data, of which seed, they are read in."""
PSEUDO = ("__url__", "__key__", PLAIN, PASS)
"""Entries of a sample's members that are no members: its shard, its key, `PLAIN` and `PASS`."""
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of a record whose values are files, whatever they look like."""
_FILE = re.compile(r".+\.[a-zA-Z]\w{1,4}")
_MEDIA = re.compile(
    r"(image|img|picture|photo|(video|audio|sound))s?(_?(path|file|name|file_?name))?s?",
    re.IGNORECASE,
)


def names_media(key: str) -> str:
    """Return the kind of media that a record's key names by its name: "image", "other" (sounds and
    videos) or "" for none.
    """
    match = _MEDIA.fullmatch(key)
    return "" if match is None else "other" if match[2] else "image"


def num_named(key: str, value: Any) -> int:
    """Return how many files a value of such a key names; null, NaN, "" and false name none.

    Of keys that are not of `MEDIA_KEYS`, a text must look like a file's name.
    """
    if isinstance(value, list):
        return sum(num_named(key, item) for item in value)
    if isinstance(value, float) and math.isnan(value):
        return 0
    if key not in MEDIA_KEYS:
        return int(isinstance(value, str) and bool(_FILE.fullmatch(value)))
    return int(bool(value))


def is_picture(member: str) -> bool:
    """Return whether a member is a picture by its extension, decodable or not."""
    return member.rpartition(".")[2] in (*IMAGES, *UNREAD_IMAGES)


def is_sound(member: str) -> bool:
    """Return whether a member is a sound by its extension."""
    return member.rpartition(".")[2] in SOUNDS


def is_listed(member: str, patterns: Sequence[str]) -> bool:
    """Return whether one of `patterns`, such as `.mask.png` or `.*.npy`, names a member."""
    return any(fnmatchcase(f".{member}", pattern) for pattern in patterns)


def plain_question(text: str, pictures: Sequence[bytes], source: str) -> dict[str, bytes | str]:
    """Return a question and its pictures as members of a sample of no data set's.

    text: has `<image>` once for each picture, or nowhere: then they come first.
    source: what messages call it.
    """
    members: dict[str, bytes | str] = {
        "__url__": source,
        "__key__": "",
        PLAIN: "",
        "json": json.dumps({"question": text}).encode(),
    }
    # Builders look at the content, not at the extension.
    return members | {f"{number}.png": data for number, data in enumerate(pictures)}


def members_of(record: Mapping[str, Any], source: str) -> dict[str, bytes | str]:
    """Return a record as members of a sample, for a builder that reads our own names of fields.

    source: what messages call it.
    """
    return {"__url__": source, "__key__": "", "json": json.dumps(record).encode()}


def check_fields(fields: Fields, names: Sequence[str], unread: Sequence[str] = ()) -> None:
    """Raise ValueError for a name that no form reads, for members that cannot be decoded, and for
    a place that is named as unread too."""
    for place in unread:
        if not isinstance(place, str) or not place:
            raise ValueError(f"build.unread={list(unread)}: {place!r} is no member and no key")
        if not place.startswith(".") and ("*" in place or is_picture(place) or place == "json"):
            raise ValueError(f"build.unread={list(unread)}: write the member {place} as .{place}")
    for name, places in fields.items():
        if name not in ("record", "image", *names):
            allowed = ", ".join(("record", "image", *names))
            raise ValueError(f"build.fields.{name} is unknown; use one of {allowed}")
        if not isinstance(places, str) and name != "image":
            raise ValueError(f"build.fields.{name}={places} must be one place")
        listed = [places] if isinstance(places, str) else list(places)
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(f"build.fields.{name}={places} must name each place once")
        for place in listed:
            if place in unread or is_listed(place[1:], unread):
                raise ValueError(f"build.fields.{name}={place} is in build.unread too")
            if place != place.lower() and place.startswith("."):
                raise ValueError(f"build.fields.{name}={place}: write members in lower case")
            if place.startswith("."):
                check_extension(place.rpartition(".")[2])
                if name == "image" and not is_picture(place[1:]):
                    raise ValueError(f"build.fields.image={place} is no picture")
            elif name in ("record", "image"):
                raise ValueError(f"build.fields.{name}={place} must be a member, as .{place}")


class Record:
    """The values of one sample. A value that is missing or wrong raises BadSample.

    members: extension -> bytes, and `__url__` and `__key__`.
    unread: members (`.mask.png`) and keys (`image`) that are left out as if they were not there.
    """

    def __init__(
        self,
        members: Mapping[str, Any],
        fields: Fields,
        limits: Limits,
        unread: Sequence[str] = (),
    ) -> None:
        self.key = str(members.get("__key__", ""))
        self.passing = str(members.get(PASS, ""))
        self.source = f"{members.get('__url__', '')}:{self.key}"
        self._members = {name: v for name, v in members.items() if not is_listed(name, unread)}
        self._left_out = members.keys() - self._members.keys()
        self._fields = fields
        self._limits = limits
        self._unread = unread

    def bad(self, reason: str) -> BadSample:
        """Return the error that names this sample."""
        return BadSample(self.source, reason)

    def missing(self, names: str) -> BadSample:
        """Return the error of a sample without the fields `names`, which its form needs."""
        return self.bad(f"no {names}; its members are {', '.join(sorted(self.members))}")

    @property
    def members(self) -> list[str]:
        """The names of its members, without those that are left out."""
        return [name for name in self._members if name not in PSEUDO]

    @property
    def values(self) -> Mapping[str, Any]:
        """The keys of the member `record` as the data set calls them; empty without one."""
        return self._object

    def get(self, name: str) -> Any:
        """Return a value, None where the sample has none."""
        place = str(self._fields.get(name, name))
        if place.startswith("."):
            return self._decoded(place[1:]) if place[1:] in self._members else None
        value: Any = self._object
        if place in value:
            return value[place]
        for key in place.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def maps(self, name: str) -> bool:
        """Return whether `fields` says where a value is: then it is nowhere else."""
        return name in self._fields

    def lost(self, keys: Sequence[str]) -> list[str]:
        """Return those of `keys` that the record has with a content, and that no field is."""
        return [key for key in keys if self._object.get(key) and key not in self._fields.values()]

    def text(self, name: str) -> str:
        """Return a text that is not empty."""
        value = self.get(name)
        if value is None:
            raise self.missing(name)
        return self.checked_text(name, value)

    def checked_text(self, name: str, value: Any) -> str:
        """Return `value`, which messages call `name`, if it is a text that is not empty."""
        if not isinstance(value, str):
            raise self.bad(f"{name} must be text, got {value!r}")
        if not value.strip():
            raise self.bad(f"{name} is empty")
        return value

    def sequence(self, name: str) -> list[Any]:
        """Return a list that is not empty."""
        value = self.get(name)
        if value is None:
            raise self.missing(name)
        if not isinstance(value, list) or not value:
            raise self.bad(f"{name} must be a list that is not empty, got {value!r}")
        return value

    def images(self) -> list[Image.Image]:
        """Return the images, upright, 8 bits, in RGB or L, in their order."""
        return [self._decoded(name) for name in self._image_names()]

    def picture(self, name: str, member: Any) -> tuple[Image.Image, bytes]:
        """Return the image of a member that the record names, and its bytes.

        name: the field that names it, for messages.
        """
        if not isinstance(member, str) or member not in self._members:
            raise self.bad(f"the picture {member!r} of {name} is no member of the sample")
        value = self._decoded(member)
        if not isinstance(value, Image.Image):
            raise self.bad(f"the picture {member!r} of {name} is no picture")
        return value, self._members[member]

    def sound(self, name: str, member: Any, start: Any, heard: float, channel: Channel) -> Sound:
        """Return a part of the sound of a member that the record names.

        name: the field that names it, for messages. start: the second where the part begins.
        heard: the most seconds of it.
        """
        data = self.sound_bytes(name, member)
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1e9:
            raise self.bad(f"start {start!r} of {name} must be a number of seconds from 0 on")
        with naming(member):
            return read_sound(
                data, self.source, self._limits, start=start, seconds=heard, channel=channel
            )

    def sound_bytes(self, name: str, member: Any) -> bytes:
        """Return the bytes of a sound that the record names in the field `name`."""
        if not isinstance(member, str) or member not in self._members:
            raise self.bad(f"the sound {member!r} of {name} is no member of the sample")
        if member.rpartition(".")[2] not in SOUNDS:
            raise self.bad(f"the sound {member!r} of {name} is none of {', '.join(SOUNDS)}")
        data: bytes = self._members[member]
        return data

    def first_image(self) -> Image.Image | None:
        """Return the first of `images()` alone, None where the sample has none."""
        names = self._image_names()
        return self._decoded(names[0]) if names else None

    def sizes(self) -> list[Size]:
        """Return the sizes of `images()`, from the images' headers."""
        sizes = []
        for name in self._image_names():
            with naming(name):
                data, limit = self._members[name], self._limits.max_pixels
                sizes.append(read_size(data, source=self.source, max_pixels=limit))
        return sizes

    def _image_names(self) -> list[str]:
        """Return the image members that are named, else `png` or `0.png`, `1.png`, ... in order.

        Raises BadSample where some of them are missing, or all though the record names pictures.
        """
        places = self._fields.get("image")
        if places is not None:
            named = [place[1:] for place in ([places] if isinstance(places, str) else places)]
            names = [name for name in named if name in self._members]
            if names and len(names) < len(named):
                lacking = ", ".join(f".{name}" for name in named if name not in names)
                raise self.bad(f"has {', '.join(names)}, but not {lacking} of build.fields.image")
        else:
            names = self._numbered_images()
        self._check_named(names)
        return names

    def _check_named(self, images: Sequence[str]) -> None:
        """Raise BadSample where the record names more pictures than the sample has, or a sound or
        video that is no member.
        """
        # Members that `unread` lists are not missing, unless no picture is left.
        size = len(images) + (sum(map(is_picture, self._left_out)) if images else 0)
        for key, value in self._object.items():
            kind = names_media(key)
            if not kind or key in self._fields.values():
                continue
            if kind == "image" and num_named(key, value) > size:
                has = f"{len(images)} of them" if images else "none"
                raise self.bad(
                    f"{key}={value!r} names a picture, and the sample has {has}; pack it as a"
                    f" member, or name {key} in build.unread"
                )
            packed = any(
                not is_picture(name) and name.rpartition(".")[2] not in ("json", "txt")
                for name in (*self.members, *self._left_out)
            )
            if kind == "other" and num_named(key, value) and not packed:
                raise self.bad(
                    f"{key}={value!r} is not read, and a sample must not lose what it has; leave"
                    f" it out by build.unread=[{key}]"
                )

    def _numbered_images(self) -> list[str]:
        """Return `png`, or `0.png`, `1.png`, ... in order."""
        numbered: list[tuple[int, str]] = []
        for member in self._members:
            number, _, extension = member.rpartition(".")
            if extension not in IMAGES:
                continue
            if number and not number.isdecimal():
                raise self.bad(f"image {member} has no number; name it in build.fields.image")
            numbered.append((int(number) if number else -1, member))
        numbered.sort()
        if len({number for number, _ in numbered}) != len(numbered):
            listed = ", ".join(member for _, member in numbered)
            raise self.bad(f"order of images {listed} is ambiguous; number them")
        return [member for _, member in numbered]

    def _decoded(self, member: str) -> Any:
        return decode(member, self._members[member], source=self.source, limits=self._limits)

    @cached_property
    def _object(self) -> Mapping[str, Any]:
        """The decoded member `record`; empty where the sample has none."""
        place = str(self._fields.get("record", ".json"))[1:]
        if place not in self._members:
            return {}
        value = self._decoded(place)
        if isinstance(value, list) and all(
            isinstance(turn, dict) and turn.keys() & {"from", "role"} for turn in value
        ):
            # Megatron-LM's shards of LLaVA's data hold the turns alone.
            value = {"conversations": value}
        if not isinstance(value, dict):
            raise self.bad(f"member {place} must be an object, got {type(value).__name__}")
        return {key: item for key, item in value.items() if key not in self._unread}
