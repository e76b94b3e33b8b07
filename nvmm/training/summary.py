"""The summary.json of a run: its time and counts, and the machine and revision it ran on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvmm.io.files import write
from nvmm.training.metrics import device_name
from nvmm.version import packages


def update_summary(run_dir: str | Path, **values: Any) -> dict[str, Any]:
    """Merge `values` into `run_dir/summary.json` (whole, or not at all) and return it.

    Training writes train_seconds, steps, samples_seen, tokens_per_second, num_parameters,
    world_size, git_revision (nvmm's), project_revision (of the folder it was started in), machine
    with the packages' versions; evaluation adds heldout_exact_match
    ({"overall": ..., question kind: ...}).
    """
    path = Path(run_dir) / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    summary.update(values)
    write(path, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    return summary


def machine() -> dict[str, Any]:
    """Describe the machine that this rank runs on."""
    return {
        "device": device_name() or _processor(),
        "cpu_cores": os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": packages(),
    }


def _processor() -> str:
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def finite(value: Any) -> Any:
    """Replace non-finite numbers by None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
