"""The CUDA sources, built for the simulator and loaded as `torch.ops.nvmm_simulated`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults.cu")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


@functools.cache
def builder() -> ModuleType:
    """csrc/build.py, which is a script beside the package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def simulator(sanitized: bool = False) -> Path:
    """The library, built once for each state of the sources (in build/)."""
    sources = sorted([*(ROOT / "csrc").iterdir(), FAULTS])
    state = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        if path.is_file():
            state.update(path.read_bytes())
    name = f"simulated-{'sanitized-' if sanitized else ''}{state.hexdigest()[:16]}.so"
    target = ROOT / "build" / name
    if not target.is_file():
        builder().build_simulated(target, [FAULTS], SANITIZED if sanitized else ())
    return target
