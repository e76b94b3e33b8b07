"""Files are whole or not there, also after a crash; locks exclude."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvmm.io import files
from nvmm.io.files import lock, publish, write

CRASH = """
import os, sys
from pathlib import Path
from nvmm.io.files import publish

with publish(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os._exit(1)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = r"name cannot be written \(.*No space left.*bytes are free"
    with pytest.raises(OSError, match=said), publish(tmp_path / "name") as temporary:
        temporary.write_text("half")
        full()
    assert list(tmp_path.iterdir()) == []
    # Whatever else is raised stays what it is.
    with pytest.raises(KeyError), publish(tmp_path / "name"):
        raise KeyError


def test_a_lock_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "getpid", lambda: "p" * 4096)  # more than the limit below
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.lock cannot be written .*bytes are free"):
            files.hold(tmp_path / ".lock")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_write_replaces_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    write(tmp_path / "a", "new ü")
    assert (tmp_path / "a").read_bytes() == "new ü".encode()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_block_leaves_the_old_file(tmp_path: Path, shared: bool) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="broken"), publish(tmp_path / "a", shared=shared) as path:
        path.write_text("half")
        raise ValueError("broken")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_crash_leaves_the_old_file_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    result = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "a")], check=False)
    assert result.returncode == 1
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == [".tmp_a", "a"]
    write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with publish(tmp_path / "folder") as path:
            path.mkdir()
            (path / content).write_text(content)
            assert content == "first" or names(tmp_path / "folder") == ["first"]
    assert names(tmp_path / "folder") == ["second"]
    assert names(tmp_path) == ["folder"]


def test_two_that_share_a_name_write_apart(tmp_path: Path) -> None:
    with publish(tmp_path / "a", shared=True) as one, publish(tmp_path / "a", shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"


def test_a_lock_excludes_until_its_block_ends(tmp_path: Path) -> None:
    with (
        lock(tmp_path / "lock"),
        pytest.raises(BlockingIOError),
        lock(tmp_path / "lock", wait=False, required=False),
    ):
        pass
    with lock(tmp_path / "lock", wait=False):
        pass
