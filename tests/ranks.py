"""N gloo ranks from a warm forkserver, for tests: `run_ranks(function, world_size, *args)`."""

from nvmm.proof.ranks import run_ranks

__all__ = ["run_ranks"]
