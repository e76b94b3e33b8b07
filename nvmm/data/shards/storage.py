"""Bytes of files on local disks and, through fsspec, in S3, GCS, HTTP and others.

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
from functools import lru_cache, partial
from typing import Any, TypeVar

from braceexpand import braceexpand

from nvmm.data.shards.cache import Cache

_T = TypeVar("_T")
_MEBI = 1 << 20
_PIECE = 16 * _MEBI
# A retry must not change a run, so its delay is not drawn from the global generator.
_RANDOM = random.Random()


@dataclass(frozen=True)
class Storage:
    """Options of reading remote files; local ones need none of them.

    cache_dir: local folder that keeps the blocks that were read, null for none. cache_bytes: its
    limit.
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
    """Return the files that a pattern names, sorted: globs, and braces as `{00000..00041}`.

    A remote pattern without a glob is taken as it is; a server that lists nothing (HTTP) needs
    braces.
    """
    names: set[str] = set()
    for name in braceexpand(pattern):
        local = local_path(name)
        if local is not None:
            # A name that is there is no pattern, whatever brackets are in it.
            names.update([local] if os.path.exists(local) else glob.glob(local))
        elif any(mark in name for mark in "*["):
            protocol = name.partition("://")[0]
            paths = _retry(partial(_call, name, "glob", options), name, options)
            names.update(p if "://" in p else f"{protocol}://{p.lstrip('/')}" for p in paths)
        else:
            names.add(name)
    return sorted(names)


def size(url: str, options: Storage = DEFAULT) -> int:
    """Return the size of a file in bytes. Raises OSError naming it."""
    local = local_path(url)
    return os.path.getsize(local) if local is not None else _facts(url, options)[0]


def read(url: str, start: int, stop: int, options: Storage = DEFAULT) -> bytes:
    """Return bytes `start` to `stop` of a file; fewer where a local one ends before.

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
    """Return the path of a local file, None for a remote one."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url else os.path.expanduser(url)


def _read_local(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), stop - start, start)
        while len(data) < stop - start:  # One call returns at most 2 GiB.
            more = os.pread(file.fileno(), stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
    return data


class _FinalError(OSError):
    """An answer that another try will not change."""


class _ReadAhead:
    """The last answers of a few files; a read that follows one fetches more than was asked for."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, bytes]] = {}

    def read(self, url: str, start: int, stop: int, options: Storage) -> bytes:
        first, data = self._last.pop(url, (0, b""))
        if not first <= start <= stop <= first + len(data):
            # Listing a tar reads its headers and jumps over the data between them: a short jump
            # forward counts as going on.
            gap = start - (first + len(data))
            follows = bool(data) and 0 <= gap <= options.read_ahead_bytes
            follows = follows or first <= start < first + len(data)
            ahead = stop
            if follows or start == 0:
                length = _facts(url, options)[0]
                ahead = max(stop, min(start + options.read_ahead_bytes, length))
            first, data = start, _fetch(url, start, ahead, options)
        if len(data) <= max(options.read_ahead_bytes, _PIECE):  # A shard read at once is not kept.
            self._last[url] = (first, data)
        while len(self._last) > 4:
            del self._last[next(iter(self._last))]
        return data[start - first : stop - first]


_AHEAD = _ReadAhead()


def _read_cached(url: str, start: int, stop: int, options: Storage) -> bytes:
    """Return bytes of a file from the cache's blocks; fetch and keep the blocks that it lacks."""
    length, version = _facts(url, options)
    if stop > length:
        raise OSError(f"{url}: bytes {start}-{stop}: the file ends at {length}")
    block = options.read_ahead_bytes
    cache = _cache(str(options.cache_dir), options.cache_bytes)
    digest = hashlib.sha256(f"{url}\n{length}\n{version}\n{block}".encode()).hexdigest()[:32]
    slices = []
    for number in range(start // block, -(-stop // block)):
        first, last = number * block, min((number + 1) * block, length)
        begin, end = max(start, first) - first, min(stop, last) - first
        name = f"{digest}-{number}"
        content = cache.get(name, last - first, begin, end)
        if content is None:
            data = _fetch(url, first, last, options)
            cache.put(name, data)
            content = data[begin:end]
        slices.append(content)
    return b"".join(slices)


@lru_cache
def _cache(folder: str, limit: int) -> Cache:
    return Cache(folder, limit)


def _fetch(url: str, start: int, stop: int, options: Storage) -> bytes:
    """Fetch bytes from the server, in pieces that meet the timeout and cost little to repeat."""
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
    """Return the size, and a text that tells this version of the file from another."""
    info = _retry(lambda: _call(url, "info", options), url, options)
    if info.get("size") is None:
        raise OSError(f"{url}: the server does not tell the file's size")
    names = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
    return int(info["size"]), str(next((info[name] for name in names if info.get(name)), ""))


def _call(url: str, method: str, options: Storage, **arguments: Any) -> Any:
    """Call a method of the url's fsspec file system, within the timeout where that can be kept."""
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


def _retry(attempt: Callable[[], _T], subject: str, options: Storage) -> _T:
    """Return what an attempt returns, after retries; raise OSError, beginning with `subject`."""
    for number in range(options.retries + 1):
        try:
            return attempt()
        except Exception as error:  # Each file system raises exceptions of its client's.
            if isinstance(error, ValueError | TypeError):
                raise
            reason = str(error) or type(error).__name__
            if _is_final(error):
                raise OSError(f"{subject}: {reason}") from error
            if number == options.retries:
                tries = options.retries + 1
                raise OSError(f"{subject}: {reason}; gave up after {tries} tries") from error
        time.sleep(min(options.backoff * 2**number, 60.0) * _RANDOM.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Return whether another try would end the same, as for a file that is not there."""
    if isinstance(error, _FinalError):
        return True
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    # fsspec calls a file missing whenever asking an HTTP server for its size fails.
    if type(cause).__module__.startswith("aiohttp"):
        return False
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
