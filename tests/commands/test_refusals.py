"""Every command refuses a path that is not there before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAYS = """
import atexit, sys
from nvmm.commands import main
atexit.register(lambda: print(sorted({"torch", "megatron", "transformers"} & {*sys.modules})))
main.run(sys.argv[1], sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "checkpoint=/nope", "prompt=a"], "checkpoint.path=/nope does not exist"),
        (
            ["evaluate", "checkpoint=/nope", "benchmark=heldout", "benchmark.shards=/nope/*.tar"],
            "benchmark.shards=/nope/*.tar matches no file",
        ),
        (["convert", "export", "--from", "/nope", "--to", "x", "--format", "llama"], "/nope does"),
        (["convert", "import", "--from", "language=/nope", "--to", "x"], "language=/nope does not"),
        (["convert", "inspect", "/nope"], "/nope does not exist"),
    ],
)
def test_a_path_that_is_not_there(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAYS, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert says in done.stderr and "Traceback" not in done.stderr
