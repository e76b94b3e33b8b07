"""Whose commit a run is of: nvmm's own, and that of the folder that it was started in."""

from __future__ import annotations

import subprocess
from pathlib import Path

from nvmm import __version__
from nvmm.version import packages, project_revision, revision


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_says_its_commit_and_that_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "nvmm"
    package.mkdir()
    (package / "module.py").write_text("1\n")
    assert revision(package) is None
    git(tmp_path, "init")
    assert revision(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision(package) == head
    assert project_revision(package, package) is None
    (package / "module.py").write_text("2\n")
    assert revision(package) == f"{head}-dirty"


def test_an_installed_package_is_not_of_the_users_repository(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "site-packages" / "nvmm"
    package.mkdir(parents=True)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "the user's")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision(package) is None
    (package / "revision.txt").write_text("0123abc\n")
    assert revision(package) == "0123abc"
    assert project_revision(tmp_path / "venv", package) == head
    assert project_revision(Path("/"), package) is None


def test_versions_are_read_without_importing() -> None:
    versions = packages()
    assert versions["nvmm"] == __version__ and versions["megatron-core"]
