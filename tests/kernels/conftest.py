"""The kernels are asked for in every test, but where a test is about choosing or falling back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nvmm.kernels import library
from tests.kernels.accuracy import FUSED


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """Every operation runs on its kernel, or raises."""
    library._choices = FUSED
    yield
    library._choices = library.Kernels()


@pytest.fixture
def auto(_fused: None) -> None:
    """What has no kernel (float64, meta, a strange layout) runs eagerly."""
    library._choices = library.Kernels()
