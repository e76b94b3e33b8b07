"""Samples of one sound each become one sample of several: solved ones, then the one that is asked.

The result has our own names of fields and `clips` (`nvmm.data.samples.listening`), so that a
builder reads it, and a shard holds it, as any other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nvmm.config.choices import require
from nvmm.data.samples.clip_words import Interleaved
from nvmm.data.samples.record import Record, is_picture, is_sound

CLIP = ("sound", "start", "prompt", "answer")
_OWN = ("prefix", "task", "options", "answers")
"""What else a builder reads of the asked sample, whatever its data set calls it."""


def only_clip(record: Record) -> dict[str, Any]:
    """Return the clip of a record that has one. Raises BadSample for none, and for several."""
    listed = record.get("clips")
    if listed is None:
        values = {name: record.get(name) for name in CLIP}
        listed = [{name: value for name, value in values.items() if value is not None}]
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
        raise record.bad(f"examples are made of samples with one clip each, got clips={listed!r}")
    return dict(listed[0])


def joined(
    asked: Record, shots: Sequence[Record], interleaved: Interleaved
) -> dict[str, bytes | str]:
    """Return one sample's members: the clips of the shots in their order, then the asked one.

    The other keys of the asked record stay. `files` lists the sounds' files where all are known.
    Without shots there is no `interleaved`.

    Raises BadSample naming a sample that has not one clip with a sound or has a sound or picture
    beside it, and a shot without an answer.
    """
    require("interleaved", interleaved, Interleaved)
    clips: list[dict[str, Any]] = []
    sounds: dict[str, bytes | str] = {}
    records = [*shots, asked]
    for number, record in enumerate(records):
        clip = only_clip(record)
        if number < len(shots) and not clip.get("answer"):
            raise record.bad("it has no answer, so that it is no example")
        data = record.sound_bytes("sound", clip.get("sound"))
        media = [name for name in record.members if is_sound(name) or is_picture(name)]
        if lost := [name for name in media if name != clip["sound"]]:
            raise record.bad(f"no clip names {', '.join(sorted(lost))}, which would be lost")
        clip["sound"] = f"{number}.{clip['sound'].rpartition('.')[2]}"
        sounds[clip["sound"]] = data
        clips.append(clip)
    content = {k: v for k, v in asked.values.items() if k not in ("clips", *CLIP)}
    content |= {name: asked.get(name) for name in _OWN}
    content = {name: value for name, value in content.items() if value is not None}
    files = [record.get("file") for record in records]
    if shots:
        content |= {"interleaved": interleaved, **({"files": files} if all(files) else {})}
    return {"json": json.dumps({**content, "clips": clips}).encode(), **sounds}
