"""Speed and memory of the index, the order and a resume, by number of samples.

    python tools/bench_index.py --to build/bench_index

Builds an index of real tar shards (small ones, written for it) and reports the rate; then writes
synthetic indices of 10^4, 10^6 and 10^7 samples and measures, each in a process of its own: seconds
to open, resident memory, microseconds per sample of planning with and without packing, seconds to
resume in the middle of an epoch and from a position, and the size of a position.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (10**4, 10**6, 10**7)
PER_SHARD = 10_000
BATCH = 128


def build_rate(folder: Path, count: int) -> dict[str, Any]:
    """Index `count` samples of shards with a text and an image each, by one process and by all."""
    import io

    from PIL import Image

    from nvmm.data.shards.dataset import write_shards
    from nvmm.data.shards.index import open_index

    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    record = json.dumps({"question": "What is it?", "answer": "x" * 200}).encode()
    samples = (
        {"__key__": f"{i:09d}", "json": record, "jpg": buffer.getvalue()} for i in range(count)
    )
    paths = write_shards(folder, "real", samples, samples_per_shard=count // 8)
    result: dict[str, Any] = {"samples": count, "bytes": sum(p.stat().st_size for p in paths)}
    for workers in (0, os.cpu_count() or 1):
        begin = time.perf_counter()
        index = open_index([str(p) for p in paths], str(folder / f"by{workers}"), workers)
        result[f"samples_per_second_{workers or 1}_processes"] = round(
            len(index) / (time.perf_counter() - begin)
        )
    return result


def write_synthetic(folder: Path, count: int) -> None:
    """Make an index of `count` samples, token counts with it, whose shards are empty files."""
    from nvmm.data.shards import index as module
    from nvmm.data.shards.dataset import builder_digest
    from nvmm.data.shards.index import open_index

    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"s-{i:06d}.tar" for i in range(-(-count // PER_SHARD))]
    for shard in shards:
        shard.touch()
    names = [str(shard) for shard in shards]
    module.scan = synthetic_scan  # type: ignore[assignment]
    index = open_index(names)
    rng = np.random.default_rng(1)
    tokens = np.clip(rng.lognormal(6, 1, len(index)), 8, 4096).astype("<i4")
    tiles = rng.integers(0, 8, len(index), dtype="<i4")
    np.stack([tokens, tiles], axis=1).tofile(index.path / f"lengths-{builder_digest(Builder())}")


def synthetic_scan(shard: str) -> tuple[dict[str, Any], Counter[str], None]:
    """Return the columns of a shard of PER_SHARD samples with one image each."""
    rng = np.random.default_rng(int(Path(shard).stem.rpartition("-")[2]))
    starts = np.arange(PER_SHARD) * 50_000
    keys = "".join(f"{i:09d}" for i in range(PER_SHARD)).encode()
    columns = {
        "start": starts,
        "stop": starts + 50_000,
        "key": np.arange(1, PER_SHARD + 1) * 9,
        "keys": np.frombuffer(keys, dtype=np.uint8),
        "text": rng.integers(20, 2000, PER_SHARD),
        "image": np.arange(1, PER_SHARD + 1),
        "sizes": rng.integers(200, 2000, 2 * PER_SHARD),
    }
    return columns, Counter(json=len(columns["start"])), None


class Builder:
    """A stand-in for a builder; nothing is built."""


def measure(folder: Path) -> dict[str, Any]:
    """Measure one process's use of an index that lies in `folder`."""
    from nvmm.data.order.mixture import Component
    from nvmm.data.order.order import Order, Settings
    from nvmm.data.shards.dataset import Dataset, builder_digest

    dataset = Dataset(str(folder / "*.tar"), Builder())
    before = resident()
    begin = time.perf_counter()
    count = len(dataset)
    columns = dataset.index.columns
    result: dict[str, Any] = {"samples": count, "open_seconds": time.perf_counter() - begin}
    assert len(columns["start"]) == count
    result["open_MiB"] = resident() - before
    digest = builder_digest(dataset.build)
    components = [Component("one", dataset, Fraction(1), None, count)]
    for name, settings in (
        ("plain", Settings(4096)),
        ("packed", Settings(4096, 4096, 1, {"one": digest})),
    ):
        order = Order(components, 1, settings, BATCH)
        done = 0
        begin = time.perf_counter()
        for k in range(200 if name == "plain" else 60):
            done += sum(len(pack.samples) for pack in order.batch(k))
        result[f"{name}_us_per_sample"] = (time.perf_counter() - begin) / done * 1e6
        position = json.loads(json.dumps(order.position(k + 1)))
        result[f"{name}_position_bytes"] = len(json.dumps(position))
        begin = time.perf_counter()
        Order(components, 1, settings, BATCH, position).batch(k + 1)
        result[f"{name}_resume_seconds"] = time.perf_counter() - begin
    begin = time.perf_counter()
    Order(components, 1, Settings(4096), BATCH).batch(1000 * count // BATCH)
    result["plain_seek_1000_epochs_seconds"] = time.perf_counter() - begin
    result["peak_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def resident() -> float:
    """Return the MiB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("build/bench_index"))
    parser.add_argument("--real", type=int, default=80_000, help="samples of the real shards")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    show(build_rate(options.to / "real", options.real))
    for count in SIZES:
        folder = options.to / f"{count:.0e}"
        write_synthetic(folder, count)
        command = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        show(json.loads(done.stdout))


def show(result: dict[str, Any]) -> None:
    """Print one line a figure."""
    for name, value in result.items():
        print(f"{name:32} {value:,.4f}" if isinstance(value, float) else f"{name:32} {value:,}")
    print(flush=True)


if __name__ == "__main__":
    main()
