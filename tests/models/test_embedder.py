"""Sizes and global names of the configured embedders."""

from __future__ import annotations

import pytest

from tests.models.parameter_names import build, golden_path, parameter_names

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", ["nv_embed_7b", "nv_embed_tiny"])
def test_golden_parameter_names(name: str, request: pytest.FixtureRequest) -> None:
    names = parameter_names(name)
    path = golden_path(name)
    if request.config.getoption("--golden"):
        path.write_text("\n".join(names) + "\n")
    assert path.read_text().splitlines() == names
    assert not any(line.startswith("output_layer") for line in names)


def test_nv_embed_has_the_published_size() -> None:
    """Mistral-7B-v0.1 without its output layer, and the pooling's 740,356,096."""
    model = build("nv_embed_7b")
    assert sum(p.numel() for p in model.parameters()) == 7_851_016_192
