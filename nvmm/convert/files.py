"""The paths that conversions read and write: local ones, and URLs of any fsspec file system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from nvmm.io import files


def at(text: str) -> Path:
    """Return a local path, or a RemotePath for a URL (s3://, gs://, memory://, hf:// ...).

    A URL needs fsspec's package for its scheme. A RemotePath has as much of Path as conversions
    use; `is_local` tells them apart.
    """
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if "://" not in text:
        return Path(text).expanduser()
    import fsspec  # type: ignore[import-untyped]

    try:
        file_system, path = fsspec.core.url_to_fs(text)
    except ImportError as error:
        raise ValueError(f"{text}: {error}") from error
    return RemotePath(file_system, path.rstrip("/"))  # type: ignore[return-value]


def is_local(path: Any) -> bool:
    """Return True for a path of this machine's file system, which can be mapped and renamed."""
    return isinstance(path, Path)


class RemotePath:
    """A file or folder behind fsspec, with the methods of pathlib's Path that conversions use."""

    def __init__(self, files: Any, path: str) -> None:
        self._files = files
        self._path = path

    def __str__(self) -> str:
        return str(self._files.unstrip_protocol(self._path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._files, f"{self._path}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that holds it."""
        return RemotePath(self._files, self._path.rpartition("/")[0])

    def resolve(self) -> RemotePath:
        """Return the path itself: a URL is absolute."""
        return self

    def exists(self) -> bool:
        """Return True when there is a file or folder."""
        return bool(self._files.exists(self._path))

    def is_file(self) -> bool:
        """Return True when there is a file."""
        return bool(self._files.isfile(self._path))

    def is_dir(self) -> bool:
        """Return True when there is a folder."""
        return bool(self._files.isdir(self._path))

    def stat(self) -> SimpleNamespace:
        """Return an object with st_size, in bytes."""
        return SimpleNamespace(st_size=self._files.size(self._path))

    def glob(self, pattern: str) -> list[RemotePath]:
        """List the entries of a folder that match."""
        paths = self._files.glob(f"{self._path}/{pattern}")
        return [RemotePath(self._files, str(path)) for path in paths]

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder, where the file system has any."""
        self._files.makedirs(self._path, exist_ok=exist_ok)

    def remove(self) -> None:
        """Remove a folder with all that is in it."""
        self._files.rm(self._path, recursive=True)

    def open(self, mode: str = "r", buffering: int = -1) -> IO[Any]:
        """Open the file; buffering is the file system's."""
        return self._files.open(self._path, mode)  # type: ignore[no-any-return]

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the content as text."""
        return self.read_bytes().decode(encoding)

    def read_bytes(self) -> bytes:
        """Read the content."""
        return bytes(self._files.cat_file(self._path))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Replace the content."""
        self.write_bytes(text.encode(encoding))

    def write_bytes(self, content: bytes) -> None:
        """Replace the content."""
        with self.open("wb") as stream:
            stream.write(content)


@contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Give a folder to write in, which is `final` when the block has ended well.

    On this machine's file system it is a temporary one beside `final` (`nvmm.io.files.publish`).
    Behind a URL, where renaming copies, it is `final` itself: the file that completes a folder
    (state.json, config.json) must be written last.

    Raises ValueError when `final` exists already. What the block wrote is removed when it fails.
    """
    if final.exists():
        raise ValueError(f"{final} exists already; name another folder or remove it")
    if isinstance(final, RemotePath):
        final.mkdir(parents=True, exist_ok=True)
        try:
            yield final
        except BaseException:
            if final.exists():
                final.remove()
            raise
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with files.publish(final) as temporary:
        temporary.mkdir()
        yield temporary
