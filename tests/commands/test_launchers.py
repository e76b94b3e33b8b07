"""launchers/slurm.sh as Slurm runs it: a copy, from any folder, with the commands of a cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    # More names than a pipe holds: who reads the first alone would end scontrol by a signal.
    "scontrol": 'for i in $(seq 20000); do echo "node$i"; done',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "python": f"""
case "$*" in *torchrun*) echo "$NVMM_COMMAND"; echo "$*";; *) exec {sys.executable} "$@";; esac""",
}


def test_slurm_starts_torchrun_on_a_node_from_anywhere(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SCRIPTS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    shutil.copy(ROOT / "launchers" / "slurm.sh", tmp_path / "spooled")
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NPROC": "8",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-20000]",
    }
    given = ["experiment=mine/a", "run.note=two words"]
    done = subprocess.run(
        ["bash", tmp_path / "spooled", *given],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    submitted, started = done.stdout.splitlines()
    script = str(ROOT / "launchers" / "slurm.sh")
    assert shlex.split(submitted) == ["sbatch", "--nodes", "2", script, *given]
    for part in ("--nnodes 2 --node-rank 1", "--rdzv-endpoint node1:29400 --rdzv-id 77"):
        assert part in started
    assert started.endswith(f"--nproc-per-node 8 -m nvmm train {' '.join(given)}")
