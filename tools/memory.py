"""`nvmm plan` by its old name, in a checkout."""

from nvmm.commands.main import run
from nvmm.commands.plan import main

__all__ = ["main"]

if __name__ == "__main__":
    run("plan")
