"""MMC4's documents (arXiv:2304.06939) and their pictures become samples for `write_shards`.

A line of MMC4 is a document: `text_list`, and `image_info`, each with `image_name`,
`matched_text_index` and more. The pictures are not part of MMC4: they are in a folder, under
`image_name`, or in the line, in base64 (`image_base64`). Many cannot be had any more.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvmm.data.prepare.json_records import file_below
from nvmm.data.prepare.records import LeftOut, extension_of, read_lines, to_sample
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import decode_image

_KEPT = ("image_name", "matched_text_index", "matched_sim")


def samples(
    paths: Iterable[str | Path],
    images: str | Path | None,
    leave_out: LeftOut,
    counts: Counter[str],
) -> Iterator[dict[str, bytes | str]]:
    """Yield one sample a document: its texts, and its pictures in the order of `image_info`.

    A picture that is missing or cannot be decoded is left out of `image_info`, and so is a document
    that has none left.

    Args:
        paths: .jsonl files of MMC4.
        images: folder of the pictures; None where they are in the lines.
        leave_out: is told why a document is left out.
        counts: gets the numbers of "pictures", "missing" and "damaged" ones.

    Raises ValueError naming file and line for a document without `text_list` or `image_info`, and
    for a picture's name that leads out of the folder.
    """
    number = 0
    for path in paths:
        for line, record in enumerate(read_lines(path), 1):
            where = f"{path}: document {line}"
            texts, infos = record.get("text_list"), record.get("image_info")
            if not isinstance(texts, list) or not isinstance(infos, list):
                raise ValueError(f"{where} is none of MMC4: it needs text_list and image_info")
            kept, files = [], []
            for info in infos:
                counts["pictures"] += 1
                data = _picture(info, images, where)
                extension = None if data is None else _extension(data, where)
                if data is None or extension is None:
                    counts["missing" if data is None else "damaged"] += 1
                    continue
                kept.append({k: v for k, v in info.items() if k in _KEPT})
                files.append(("image", extension, data))
            if not kept:
                leave_out(f"{where} has no picture left of {len(infos)}")
                continue
            document = {"url": record.get("url"), "text_list": texts, "image_info": kept}
            yield to_sample(f"{number:09d}", document, files)
            number += 1


def _picture(info: Any, images: str | Path | None, where: str) -> bytes | None:
    """Return the bytes of an entry of `image_info`; None where they cannot be had."""
    if not isinstance(info, dict):
        raise ValueError(f"{where}: image_info must hold objects, got {info!r}")
    if images is None:
        try:
            return base64.b64decode(info.get("image_base64") or "", validate=True) or None
        except (binascii.Error, TypeError, ValueError):
            return None
    name = info.get("image_name")
    if not isinstance(name, str) or not name:
        return None
    try:
        return file_below(Path(images), name, f"{where}: {name[:80]}").read_bytes()
    except FileNotFoundError:
        return None


def _extension(data: bytes, where: str) -> str | None:
    """Return the extension of a picture that can be decoded, None for another one."""
    try:
        decode_image(data, source=where)
    except BadSample:
        return None
    # It is a picture by now: a BMP's header may give another length than it has.
    return extension_of(data) or "bmp"
