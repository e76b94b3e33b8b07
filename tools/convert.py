"""`nvmm convert` by its old name, in a checkout."""

from nvmm.commands.convert import main
from nvmm.commands.main import run

__all__ = ["main"]

if __name__ == "__main__":
    run("convert")
