"""torchrun --max-restarts: the ranks of a new attempt meet, and the run is the undisturbed one."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.shards.dataset import write_shards
from nvmm.parallel.setup import attempt_store
from tests.data.conftest import chat

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = '''
import os, signal
from nvmm.objectives.next_token import NextToken

class Deadly(NextToken):
    """Next-token loss; rank 1 kills itself in step 3, once: it leaves the file DIE_MARK."""

    calls = 0

    def loss(self, output, batch):
        self.calls += 1
        mark = os.environ.get("DIE_MARK", "")
        if self.calls == 6 and os.environ["RANK"] == "1" and mark and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(output, batch)
'''


def test_an_attempt_has_a_store_of_its_own_whatever_an_earlier_one_left() -> None:
    shared = dist.HashStore()
    seen = []
    for _ in range(2):  # the second time finds the first one's questions, answers and names
        with ThreadPoolExecutor(3) as pool:
            joined = [
                pool.submit(
                    attempt_store,
                    shared,
                    rank=rank,
                    world_size=3,
                    timeout=datetime.timedelta(seconds=60),
                )
                for rank in range(3)
            ]
            stores = [each.result() for each in joined]
        assert not stores[2].check(["address"])
        stores[0].set("address", "here")
        seen.append([store.get("address") for store in stores])
    assert seen == [[b"here"] * 3] * 2


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        attempt_store(
            dist.HashStore(), rank=0, world_size=3, timeout=datetime.timedelta(seconds=0.05)
        )


def _torchrun(folder: Path, run_dir: Path, nodes: int, mark: str) -> str:
    """Train with two ranks, on one node or on two of one rank each; return the output."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "DIE_MARK": mark}
    where = ["--standalone", "--nproc-per-node", "2"]
    if nodes == 2:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        where += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts", "1"]
    command += ["-m", "nvmm.train", "experiment=language/tiny", f"run.dir={run_dir}"]
    command += [f"tokenizer.path={folder}/tokenizer", f"data.train.shards={folder}/a-*.tar"]
    command += ["data.sequence_length=64", "trainer.max_steps=6", "trainer.micro_batch_size=2"]
    command += ["optim.warmup_steps=2", "checkpoint.save_interval=1", "data.log_samples=true"]
    command += ["parallel.timeout_minutes=1", "objective._target_=deadly.Deadly"]
    processes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(nodes)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes, "\n".join(outputs)[-6000:]
    return "\n".join(outputs)


def _steps(run_dir: Path) -> list[tuple[int, float, list[int]]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["sample_ids"]) for r in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_killed_under_torchrun_changes_nothing(tmp_path: Path, nodes: int) -> None:
    """On two nodes the agent without the failure does not count the restart."""
    train_tokenizer(tmp_path / "tokenizer")
    samples = [
        chat(("human", f"Read {n}."), ("gpt", str(n) * 3)) | {"__key__": f"{n:03d}"}
        for n in range(60)
    ]
    write_shards(tmp_path, "a", samples, samples_per_shard=20)
    (tmp_path / "deadly.py").write_text(OBJECTIVE)
    _torchrun(tmp_path, tmp_path / "peace", 1, mark="")
    output = _torchrun(tmp_path, tmp_path / "war", nodes, mark=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert "resuming" in output
    assert _steps(tmp_path / "war") == _steps(tmp_path / "peace")
