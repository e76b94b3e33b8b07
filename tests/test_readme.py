"""What the README and the docs name exists: make targets, experiments, files, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> tuple[Path, str]:
    return request.param, request.param.read_text()


def test_make_targets_exist(page: tuple[Path, str]) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9-]+)", page[1]))
    named |= set(re.findall(r"^(?:\$ )?make ([a-z0-9-]+)", page[1], re.MULTILINE))
    assert named <= targets


def test_experiments_exist(page: tuple[Path, str]) -> None:
    for name in re.findall(r"experiment=([a-z0-9_]+/[a-z0-9_]+)", page[1]):
        assert (ROOT / "configs" / "experiment" / f"{name}.yaml").exists(), name


def test_links_and_paths_exist(page: tuple[Path, str]) -> None:
    path, text = page
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:nvmm|configs|tools|tests|launchers|docs)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text
    assert "make test" in text
