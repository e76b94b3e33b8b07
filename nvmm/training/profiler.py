"""Write a torch profiler trace of some steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch


@contextlib.contextmanager
def profiled(trace: Path, steps: Sequence[int] | None) -> Iterator[Callable[[], object]]:
    """Write a trace of this process's steps [start, stop), counted from the first one run here.

    Yields a function to call after each step. Without `steps` nothing is profiled.
    """
    if steps is None:
        yield lambda: None
        return
    start, stop = steps
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=start, warmup=0, active=stop - start, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
    ) as profiler:
        yield profiler.step
