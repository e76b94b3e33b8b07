"""The same world of one process as tests/modules."""

from tests.modules.conftest import world

__all__ = ["world"]
