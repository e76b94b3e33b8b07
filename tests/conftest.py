"""Settings of every test process: no network, one thread a rank."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A launcher around pytest is not the launcher of the runs that the tests start.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden files anew")
    parser.addoption(
        "--shard", default="1/1", help="k/n: every n-th test of a file from the k-th on"
    )


HEAVY = (
    *("proof/test_equivalence.py", "checkpoint/test_checkpoint.py", "kernels/test_simulator.py"),
    *("training/test_trainer.py", "modules/test_fp8_scales.py", "proof/test_equivalence_fp8.py"),
    *("config/test_no_dead_knobs.py", "proof/test_mutants.py", "training/test_reference.py"),
    *("proof/test_equivalence_embedder.py", "test_configs.py", "data/test_kill.py"),
)
"""Files that take longest: they go first, so that two processes end together."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a shard, and put the heavy files first; the order within a file stays."""
    shard, count = map(int, config.getoption("--shard").split("/"))
    if not 1 <= shard <= count:
        raise pytest.UsageError(
            f"--shard={shard}/{count} must be from 1/{count} to {count}/{count}"
        )
    left_out = [item for number, item in enumerate(items) if number % count != shard - 1]
    config.hook.pytest_deselected(items=left_out)
    items[:] = items[shard - 1 :: count]
    order = {name: number for number, name in enumerate(HEAVY)}

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return order.get(name, len(order))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Forked ranks hang in a torch that has already run more than one thread."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
