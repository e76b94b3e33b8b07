"""Bytes of shards on this machine."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def expand(pattern: str) -> list[str]:
    """Files that a glob pattern matches, sorted."""
    return sorted(glob.glob(str(Path(pattern).expanduser())))


def size(url: str) -> int:
    """Length of a file in bytes."""
    return os.stat(url).st_size


def read(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; fewer where it ends before."""
    with open(url, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(stop - start)


def local_path(url: str) -> str | None:
    """The path of a file on this machine; None for a remote one."""
    return None if "://" in url else url
