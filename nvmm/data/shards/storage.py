"""Bytes of files on local disks and, through fsspec, in S3, GCS, HTTP and whatever else it knows.

Credentials and endpoints are fsspec's business (environment, ~/.config/fsspec), never a config's:
configs are saved with every run.
"""

from __future__ import annotations

import glob
import hashlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from braceexpand import braceexpand

from nvmm.data.shards.cache import Cache

_T = TypeVar("_T")
_MEBI = 1 << 20
_PIECE = 16 * _MEBI
_RANDOM = random.Random()  # not the global generator: a retry must not change a run


@dataclass(frozen=True)
class Storage:
    """How remote files are read; local ones need nothing of it.

    cache_dir: local folder that keeps what was read, null for none. cache_bytes: its limit.
    read_ahead_bytes: reads that go on where the last one ended fetch this much; with a cache every
        read fetches whole blocks of this size.
    retries: tries after the first. backoff: seconds before the first retry, doubled for each.
    timeout: seconds for one answer.
    """

    cache_dir: str | None = None
    cache_bytes: int = 65536 * _MEBI
    read_ahead_bytes: int = 4 * _MEBI
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff < 0 or self.timeout <= 0:
            raise ValueError(
                f"storage.retries={self.retries}, backoff={self.backoff} must be at least 0,"
                f" timeout={self.timeout} above 0"
            )
        if self.read_ahead_bytes < 1:
            raise ValueError(f"storage.read_ahead_bytes={self.read_ahead_bytes} must be at least 1")
        if self.cache_dir is not None and self.cache_bytes < 16 * self.read_ahead_bytes:
            raise ValueError(
                f"storage.cache_bytes={self.cache_bytes} must hold at least 16 blocks of"
                f" read_ahead_bytes={self.read_ahead_bytes}"
            )


DEFAULT = Storage()


def expand(pattern: str, options: Storage = DEFAULT) -> list[str]:
    """Files that a pattern names, sorted: globs, and braces as `{00000..00041}`.

    A remote pattern without a glob is taken at its word; a server that lists nothing (HTTP) needs
    braces.
    """
    found: set[str] = set()
    for name in braceexpand(pattern):
        local = local_path(name)
        if local is not None:
            found.update(glob.glob(local) if glob.has_magic(local) else _existing(local))
        elif any(mark in name for mark in "*["):
            found.update(_list(name, options))
        else:
            found.add(name)
    return sorted(found)


def size(url: str, options: Storage = DEFAULT) -> int:
    """Bytes of a file. Raises OSError naming it."""
    local = local_path(url)
    return os.path.getsize(local) if local is not None else _facts(url, options)[0]


def read(url: str, start: int, stop: int, options: Storage = DEFAULT) -> bytes:
    """Bytes `start` to `stop` of a file; fewer where a local one ends before.

    A server's short answer is an error and tried again like any other, and so is a stalled one.
    Raises OSError naming file and range when the tries are used up, or at once where none can help.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"{url}: bytes {start}-{stop} are no range")
    local = local_path(url)
    if local is not None:
        return _read_local(local, start, stop)
    if start == stop:
        return b""
    if options.cache_dir is None:
        return _AHEAD.read(url, start, stop, options)
    return _read_cached(url, start, stop, options)


def local_path(url: str) -> str | None:
    """Path of a local file, None for a remote one."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url else os.path.expanduser(url)


def _existing(path: str) -> list[str]:
    return [path] if os.path.exists(path) else []


def _read_local(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), stop - start, start)
        while len(data) < stop - start:  # one call returns at most 2 GiB
            more = os.pread(file.fileno(), stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
    return data


class _FinalError(OSError):
    """An answer that another try will not change."""


class _ReadAhead:
    """The last answers; a read that follows one fetches more than was asked for."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, bytes]] = {}

    def read(self, url: str, start: int, stop: int, options: Storage) -> bytes:
        first, data = self._last.pop(url, (0, b""))
        if not first <= start <= stop <= first + len(data):
            # the headers of a tar are jumped to, over what lies between
            gap = start - (first + len(data))
            follows = bool(data) and 0 <= gap <= options.read_ahead_bytes
            follows = follows or first <= start < first + len(data)
            ahead = stop
            if follows or start == 0:
                length = _facts(url, options)[0]
                ahead = max(stop, min(start + options.read_ahead_bytes, length))
            first, data = start, _fetch(url, start, ahead, options)
        if len(data) <= max(options.read_ahead_bytes, _PIECE):  # not a whole shard
            self._last[url] = (first, data)
        while len(self._last) > 4:
            del self._last[next(iter(self._last))]
        return data[start - first : stop - first]


_AHEAD = _ReadAhead()


def _read_cached(url: str, start: int, stop: int, options: Storage) -> bytes:
    length, version = _facts(url, options)
    if stop > length:
        raise OSError(f"{url}: bytes {start}-{stop}: the file ends at {length}")
    block = options.read_ahead_bytes
    cache = _cache(str(options.cache_dir), options.cache_bytes)
    digest = hashlib.sha256(f"{url}\n{length}\n{version}\n{block}".encode()).hexdigest()[:32]
    parts = []
    for number in range(start // block, -(-stop // block)):
        first, last = number * block, min((number + 1) * block, length)
        begin, end = max(start, first) - first, min(stop, last) - first
        name = f"{digest}-{number}"
        part = cache.get(name, last - first, begin, end)
        if part is None:
            data = _fetch(url, first, last, options)
            cache.put(name, data)
            part = data[begin:end]
        parts.append(part)
    return b"".join(parts)


@lru_cache
def _cache(folder: str, limit: int) -> Cache:
    return Cache(folder, limit)


def _fetch(url: str, start: int, stop: int, options: Storage) -> bytes:
    """Bytes from the server, in pieces that come within the timeout and cost little to repeat."""
    piece = max(options.read_ahead_bytes, _PIECE)
    if stop - start > piece:
        ends = [*range(start + piece, stop, piece), stop]
        starts = [start, *ends]
        return b"".join(_fetch(url, a, b, options) for a, b in zip(starts, ends, strict=False))

    def attempt() -> bytes:
        data: bytes = _call(url, "cat_file", options, start=start, end=stop)
        if len(data) > stop - start:
            raise _FinalError("the server ignores byte ranges")
        if len(data) < stop - start:
            raise OSError(f"the answer ends after {len(data)} bytes")
        return data

    return _retry(attempt, f"{url}: bytes {start}-{stop}", options)


@lru_cache(maxsize=1 << 16)
def _facts(url: str, options: Storage) -> tuple[int, str]:
    """Size, and what tells this version of the file from another."""
    info = _retry(lambda: _call(url, "info", options), url, options)
    if info.get("size") is None:
        raise OSError(f"{url}: the server does not tell the file's size")
    names = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
    return int(info["size"]), str(next((info[name] for name in names if info.get(name)), ""))


def _list(pattern: str, options: Storage) -> list[str]:
    protocol = pattern.partition("://")[0]
    paths = _retry(lambda: _call(pattern, "glob", options), pattern, options)
    return [path if "://" in path else f"{protocol}://{path.lstrip('/')}" for path in paths]


def _call(url: str, method: str, options: Storage, **arguments: Any) -> Any:
    """A method of the url's fsspec file system, within the timeout where it can be kept."""
    from fsspec.asyn import sync
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise _FinalError(f"{error} (pip install 'nvmm[remote]')") from error
    if system.async_impl:
        function = getattr(system, f"_{method}")
        return sync(system.loop, function, path, timeout=options.timeout, **arguments)
    return getattr(system, method)(path, **arguments)


def _retry(attempt: Callable[[], _T], what: str, options: Storage) -> _T:
    for number in range(options.retries + 1):
        try:
            return attempt()
        except Exception as error:  # each file system raises its client's own kinds
            if isinstance(error, ValueError | TypeError):
                raise
            reason = str(error) or type(error).__name__
            if _is_final(error):
                raise OSError(f"{what}: {reason}") from error
            if number == options.retries:
                tries = options.retries + 1
                raise OSError(f"{what}: {reason}; gave up after {tries} tries") from error
        time.sleep(min(options.backoff * 2**number, 60.0) * _RANDOM.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether another try would end the same: the file is not there, or not for us."""
    if isinstance(error, _FinalError):
        return True
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    # fsspec calls a file missing whenever asking an HTTP server for its size fails
    if type(cause).__module__.startswith("aiohttp"):
        return False
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
