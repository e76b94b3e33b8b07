"""`nvmm verify-parallel` by its old name, in a checkout."""

from nvmm.commands.main import run
from nvmm.commands.verify_parallel import main

__all__ = ["main"]

if __name__ == "__main__":
    run("verify-parallel")
