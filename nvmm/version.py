"""Versions of nvmm, of its code and of the packages it runs on. Nothing here imports them."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nvmm import __version__

PACKAGE = Path(__file__).resolve().parent
REVISION = "revision.txt"
"""The file beside this one in which a wheel has the commit that it was built from."""
NEEDED = ("megatron-core", "torch", "transformers")


def revision(package: Path = PACKAGE) -> str | None:
    """Return the commit of nvmm's own code ("-dirty" if changed), None where it is not known.

    A checkout is asked; an installed package has it from its build. The repository of a user,
    in which nvmm may be installed, is another one.
    """
    if (package.parent / ".git").exists():
        return described(package.parent)
    recorded = package / REVISION
    return recorded.read_text(encoding="utf-8").strip() or None if recorded.exists() else None


def project_revision(folder: Path, package: Path = PACKAGE) -> str | None:
    """Return the commit of the repository that a run starts in, None for nvmm's own or none."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (parent / ".git").exists():
            return None if parent == package.parent else described(parent)
    return None


def described(folder: Path) -> str | None:
    """Return the commit that a repository is at, "-dirty" if changed; None where git cannot say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages() -> dict[str, str | None]:
    """Return the versions of nvmm and of the packages whose numbers it has."""
    return {"nvmm": __version__, **{name: installed(name) for name in NEEDED}}


def line() -> str:
    """Return what --version prints: versions of nvmm and what it needs, and its commit."""
    versions = packages()
    others = ", ".join(f"{name} {versions[name] or 'missing'}" for name in NEEDED)
    commit = revision() or "commit unknown"
    return f"nvmm {versions['nvmm']} ({commit}), {others}, Python {platform.python_version()}"
