"""nvmm torchrun: a refusal is printed once, and nothing follows it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvmm.config import compose

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("local_rank", "waits"), [("0", False), ("1", True)])
def test_the_first_rank_speaks_first(
    local_rank: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "_FIRST_SPEAKS", 0.3)
    for name, value in (("RANK", local_rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="2"):
        compose.refuse("train", ["key=1 is wrong"])
    assert (time.monotonic() - begin > 0.25) == waits


@pytest.mark.slow
def test_a_refusal_is_printed_once_without_a_trace(tmp_path: Path) -> None:
    launch = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "nvmm", "train")
    given = ("experiment=language/tiny", "trainer.micro_batch_size=4", "tokenizer.path=/nope")
    done = subprocess.run(
        [sys.executable, "-m", "nvmm", *launch, *given, "data.train.shards=/nope/*.tar"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == compose.BAD_CONFIG
    assert done.stderr.splitlines() == [
        "nvmm.train: 2 problems in the config",
        "  tokenizer.path=/nope does not exist",
        "  data.train.shards=/nope/*.tar matches no file",
    ]
    assert not any(tmp_path.iterdir())
