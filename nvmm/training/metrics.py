"""Reduce a training step's metrics over ranks, and ask the device for its name and memory."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Dense bf16 FLOP/s of NVIDIA's data sheets (without sparsity), by a word of the device's name."""


def reduce_metrics(
    metrics: Sequence[Mapping[str, Tensor]], device: torch.device | str
) -> dict[str, float]:
    """Return the means of a step's metrics, the same on every rank; collective.

    Args:
        metrics: the schedule's results: on the last pipeline stage one {name: [sum, count]} per
            micro-batch, elsewhere empty. Every micro-batch has the same names.
        device: the device of the collective's tensors.

    Sums and counts are added over micro-batches, data- and context-parallel ranks; only then comes
    the one division (a count of 0 gives the sum, 0).
    """
    from megatron.core import parallel_state

    means: dict[str, float] = {}
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        names = sorted(metrics[0]) if metrics else []
        if any(sorted(each) != names for each in metrics):
            raise ValueError(f"every micro-batch must return the metrics {names}")
        if names:
            totals = torch.stack(
                [torch.stack([each[name].double() for each in metrics]).sum(0) for name in names]
            ).to(device)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(totals, group=group)
            means = {
                name: total / max(count, 1.0)
                for name, (total, count) in zip(names, totals.tolist(), strict=True)
            }
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [means]
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        means = box[0]
    return means


def reduce_counters(counters: Mapping[str, float], device: torch.device | str) -> dict[str, float]:
    """Return the counters' sums over all ranks, the same everywhere; collective.

    One rank of each model replica gives the replica's counts; the others give zeros.
    """
    values = torch.tensor(list(counters.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(counters, values.tolist(), strict=True))


def device_name() -> str | None:
    """Return the name of this rank's GPU, None on the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_flops(dtype: torch.dtype, device: str | None = None) -> float | None:
    """Return the peak FLOP/s of this rank's GPU, or of a device of the given name.

    Returns None where it is unknown: on the CPU, and in other dtypes than bf16.
    """
    device = device or device_name()
    if device is None or dtype != torch.bfloat16:
        return None
    words = re.split(r"[\s-]+", device)
    for first, second in zip(words, [*words[1:], ""], strict=True):
        if first in PEAK_FLOPS:
            return PEAK_FLOPS.get(f"{first} {second}", PEAK_FLOPS[first])
    return None


def memory_peak_bytes() -> int:
    """Return the most memory this process has used: allocated on its GPU, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
