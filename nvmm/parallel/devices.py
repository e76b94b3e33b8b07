"""What this machine has to compute with: GPUs and the libraries that they need."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gpus() -> list[dict[str, Any]]:
    """Return name, memory in GB and compute capability of each GPU that torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        gigabytes = round(about.total_memory / 1e9)
        found.append({"name": about.name, "gigabytes": gigabytes, "capability": capability})
    return found


def communication() -> dict[str, str | None]:
    """Return the versions of CUDA and NCCL that torch was built with, None for what it lacks."""
    nccl = None
    if dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "gloo": "yes" if dist.is_gloo_available() else None,
    }
