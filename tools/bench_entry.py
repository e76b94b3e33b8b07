"""Time the commands up to the import of torch: python tools/bench_entry.py

Prints medians over several runs and their ratio to starting Python and importing Hydra alone, all
in this run. Aims: a refused config within 2 s, --help within 1.5 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

ROWS = {
    "import hydra": (["-c", "import hydra"], 0),
    "nvmm.train --help": (["-m", "nvmm.train", "--help"], 0),
    "nvmm.train --cfg job": (["-m", "nvmm.train", "experiment=language/tiny", "--cfg", "job"], 0),
    "nvmm.train, refused": (
        ["-m", "nvmm.train", "experiment=nvlm_d/sft_72b", "trainer.stpes=1"],
        2,
    ),
    "nvmm.evaluate, refused": (["-m", "nvmm.evaluate", "benchmark=heldout"], 2),
}


def seconds(arguments: list[str], status: int) -> float:
    """Return the wall time of one run; raise RuntimeError when it ends with another status."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    elapsed = time.perf_counter() - begin
    if done.returncode != status:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr.decode()}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for number in range(options.runs + 1):
        for name, (arguments, status) in ROWS.items():
            elapsed = seconds(arguments, status)
            if number > 0:  # The first round warms the file cache.
                times[name].append(elapsed)
    base = statistics.median(times["import hydra"])
    print(f"{'command':26} {'median s':>9} {'to import hydra':>16}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:26} {median:9.2f} {median / base:15.1f}x")


if __name__ == "__main__":
    main()
