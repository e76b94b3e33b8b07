"""`nvmm inspect` by its old name, in a checkout."""

from nvmm.commands.inspect_batch import main
from nvmm.commands.main import run

__all__ = ["main"]

if __name__ == "__main__":
    run("inspect")
