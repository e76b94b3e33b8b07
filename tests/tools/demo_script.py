"""A demo's script, run in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(script: Path, options: Sequence[str], folder: Path) -> str:
    """Run a script in a folder, which must end well; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
