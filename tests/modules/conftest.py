"""A world of this process alone, for tests that need modules but no ranks."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    from nvmm.parallel.setup import Parallel, shutdown

    Parallel().initialize(seed=1, rank=0, world_size=1)
    yield
    shutdown()
