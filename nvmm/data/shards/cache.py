"""A folder of byte blocks with a size limit, shared by every process of a machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nvmm.io.files import lock, publish

_PARTS = 100
"""A process looks at the whole folder after it has written this fraction of the limit."""


class Cache:
    """Blocks by name; the least recently read ones are deleted when the folder is full.

    A block appears under its name only when it is complete. Processes need no agreement: a block
    that two of them write at once is the same, and one that is deleted while another reads it is
    fetched again. Each process may exceed `limit` (bytes) by a hundredth of it.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = limit
        # Bytes written since the last look at the folder. An earlier run may have left some, so the
        # first write looks at once.
        self._unseen = limit

    def get(self, name: str, size: int, start: int, stop: int) -> bytes | None:
        """Return bytes `start` to `stop` of a block of `size` bytes; None where it is not there."""
        try:
            file = os.open(self._path(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(file).st_size != size:  # A crash of the machine cut it short.
                return None
            os.utime(file)
            return os.pread(file, stop - start, start)
        finally:
            os.close(file)

    def put(self, name: str, data: bytes) -> None:
        """Keep a block. Raises OSError when the disk is full."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # `get` checks the size, so nothing waits for the disk.
            with publish(path, shared=True, durable=False) as temporary:
                temporary.write_bytes(data)
        except FileNotFoundError:
            return  # Another process has evicted it already.
        self._unseen += len(data)
        if self._unseen * _PARTS >= self.limit:
            self._evict()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _evict(self) -> None:
        """Delete the oldest blocks until a tenth of the limit is free."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock(self.folder / ".lock", wait=False))
            except BlockingIOError:
                return  # Another process is evicting.
            blocks = sorted(self._blocks())
            total = sum(size for _, size, _ in blocks)
            if total > self.limit:
                for _, size, path in blocks:
                    if total <= self.limit * 9 // 10:
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size
            self._unseen = 0

    def _blocks(self) -> list[tuple[float, int, str]]:
        """Return time of last use, size and path of every block."""
        blocks = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    blocks.append((status.st_mtime, status.st_size, entry.path))
        return blocks
