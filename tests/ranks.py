"""N gloo ranks from a warm forkserver, for tests: `run_ranks(function, world_size, *args)`."""

from nvmm.parallel.ranks import run_ranks

__all__ = ["run_ranks"]
