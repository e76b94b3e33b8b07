"""Shards in steps: a call that was killed at any sample, or while names were given, goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmm.data.prepare import resume
from nvmm.data.prepare.resume import from_start, write_steps


class Killed(BaseException):
    pass


def samples(count: int, killed_at: int | None = None) -> Iterator[dict[str, bytes | str]]:
    for number in range(count):
        if number == killed_at:
            raise Killed
        yield {"__key__": f"{number:04d}", "txt": str(number).encode()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(folder: Path, count: int = 10, killed_at: int | None = None) -> list[Path]:
    make = from_start(lambda: samples(count, killed_at))
    return write_steps(folder, "a", make, {"count": count}, samples_per_shard=3)


def test_killed_at_any_sample(tmp_path: Path) -> None:
    assert [path.name for path in write(tmp_path / "whole")] == [f"a-0000{n}.tar" for n in range(4)]
    for place in range(10):
        folder = tmp_path / str(place)
        with pytest.raises(Killed):
            write(folder, killed_at=place)
        assert content(folder) == {}
        write(folder)
        assert content(folder) == content(tmp_path / "whole")
        assert not (folder / ".a.part").exists()


def test_killed_while_names_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    folder = tmp_path / "to"
    write(folder, count=20)  # seven shards that the next call replaces
    moves, replace = 0, Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal moves
        if self.parent.name == ".a.part" and target.parent == folder:
            moves += 1
            if moves == 3:
                raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(Killed):
        write(folder)
    monkeypatch.undo()
    assert len(content(folder)) < 7
    make = from_start(lambda: pytest.fail("complete shards are not made again"))
    assert len(write_steps(folder, "a", make, {"count": 10}, samples_per_shard=3)) == 4
    assert content(folder) == content(tmp_path / "whole")


def test_other_settings_and_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, killed_at=5)
    with pytest.raises(
        ValueError, match=r"unfinished call with count=10; give the same, or delete"
    ):
        write(tmp_path, count=11)
    assert write(tmp_path / "none", count=0) == []
    assert not resume.part_folder(tmp_path / "none", "a").exists()
