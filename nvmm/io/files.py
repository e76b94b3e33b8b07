"""Files and folders that appear under their name only when they are complete, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

TEMPORARY = ".tmp_"
"""Prefix of names that `publish` writes at; a crash may leave them behind."""


@contextlib.contextmanager
def publish(path: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Give a temporary name beside `path`, which becomes `path` when the block has ended well.

    The block makes a file or a folder there, in the folder of `path`, which must exist. It replaces
    a file or folder that has the name already. When the block fails, its work is removed and the
    old content stays. A crash leaves the temporary name, and the next call removes it.

    shared: several processes may publish `path` at once without a lock, so that each writes at a
        name of its own. The one that ends last wins, and nobody removes what a crash leaves.
    durable: bring the content to the disk before the renaming, and the new name after it. False is
        for content that its reader checks.
    """
    token = f"_{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f"{TEMPORARY}{path.name}{token}")
    _remove(temporary)
    try:
        yield temporary
        if durable:
            for entry in [*temporary.rglob("*"), temporary]:
                sync(entry)
        if temporary.is_dir():  # renaming replaces a file, but no folder that has content
            _remove(path)
        temporary.replace(path)
    except BaseException as error:
        explained = disk_error(path, error) if is_full(error) else error
        _remove(temporary)
        if explained is error:
            raise
        raise explained from error
    if durable:
        sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole (text as UTF-8), or leave the old one."""
    with publish(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def disk_error(path: Path, error: BaseException, needed: int | None = None) -> OSError:
    """Return an OSError that says why `path` could not be written and what space there is.

    needed: bytes of the whole content, None where that is not known.
    """
    folder = next((p for p in [path, *path.parents] if p.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    size = "" if needed is None else f"it takes {needed} bytes, and "
    reason = str([*_causes(error)][-1]).strip().rpartition("\n")[2]
    advice = "; make room or name another folder" if is_full(error) else ""
    return OSError(
        f"{path} cannot be written ({reason}): {size}{free} bytes are free there{advice}"
    )


def is_full(error: BaseException) -> bool:
    """Return whether there was no room left, on the disk or in the user's share of it."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # An error that another process has sent is left with its words alone.
    words = [os.strerror(number) for number in full]
    return any(
        getattr(e, "errno", None) in full or any(word in str(e) for word in words)
        for e in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those behind it, also those that torch collected from ranks."""
    yield error
    for failure, _ in getattr(error, "failures", {}).values():
        yield from _causes(failure)
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True, required: bool = True) -> Iterator[None]:
    """Exclude this machine's (and, where the file system can, the cluster's) other processes.

    path: an empty file, made where it is missing and never removed. Threads exclude each other too.
    wait: wait for the lock. False: raise BlockingIOError when another holds it.
    required: raise OSError on a file system without locks. False: go on there without one.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            if required:
                raise
        yield


def hold(path: Path, wait: float = 0.0) -> str | None:
    """Keep the file `path` locked as long as this process lives; return who has it, None when held.

    Processes that this one forks do not hold it. wait: seconds to wait for a holder on another
    machine, whose death a network file system notices late. A file system without locks holds
    nothing, and is taken for free.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as this process
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
        file.seek(0)
        holder = file.read().strip()
        if holder.endswith(f" {socket.gethostname()}") or time.monotonic() > end:
            file.close()
            return holder or "another process"
        time.sleep(1.0)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise disk_error(path, error) from error
    _HELD.append(file)
    return None


_HELD: list[TextIO] = []


def _remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
