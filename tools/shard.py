"""`nvmm shard` by its old name, in a checkout."""

from nvmm.commands.main import run
from nvmm.commands.shard import main

__all__ = ["main"]

if __name__ == "__main__":
    run("shard")
