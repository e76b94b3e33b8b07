"""What a training step gave: metrics reduced over ranks, the run's log files.

A run directory gets `metrics.jsonl` (one object a logged step), `validation.jsonl`
(one object a validation) and `summary.json` (what a reader wants to know of the whole run).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

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

_LINE_SECONDS = 10.0
_LINE_FORMAT = (
    "{desc}: step {n_fmt}/{total_fmt} ({percentage:.0f}%),"
    " {elapsed} gone, {remaining} left{postfix}"
)


def reduce_metrics(
    metrics: Sequence[Mapping[str, Tensor]], device: torch.device | str
) -> dict[str, float]:
    """Means of a step's metrics, the same on every rank. Collective: every rank calls it.

    Args:
        metrics: what the schedule returned: on the last pipeline stage one {name: [sum, count]}
            per micro-batch, elsewhere empty. Every micro-batch has the same names.
        device: where the collective's tensors live.

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
    """Sums over all ranks, the same everywhere. Collective.

    One rank of each model replica gives the replica's counts; the others give zeros.
    """
    values = torch.tensor(list(counters.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(counters, values.tolist(), strict=True))


def device_name() -> str | None:
    """Name of this rank's GPU, None on the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_flops(dtype: torch.dtype, device: str | None = None) -> float | None:
    """Peak FLOP/s of this rank's GPU, or of a device of the given name.

    None where it is unknown: on the CPU, and in other dtypes than bf16.
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
    """Most memory this process has used: allocated on its GPU, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Logger:
    """Writes a run's log files and its progress line. Does nothing where it is not enabled.

    Args:
        tensorboard: also write event files to `run_dir/tensorboard`.
        wandb: also log to Weights & Biases; offline (`run_dir/wandb`) unless logged in.
        wandb_project: its project.
        run_dir: the run directory, which exists.
        config: the resolved config, shown by wandb.
        run_name: the run's name on the progress line and in wandb.
        enabled: True on rank 0 alone.
    """

    def __init__(
        self,
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str = "nvmm",
        *,
        run_dir: str | Path,
        config: Mapping[str, Any],
        run_name: str,
        enabled: bool,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_name = run_name
        self.enabled = enabled
        self._done = 0
        self._files: dict[str, TextIO] = {}
        self._progress: tqdm | None = None
        self._config = config
        self._use_tensorboard = tensorboard
        self._wandb_project = wandb_project if wandb else None
        self._tensorboard: Any = None
        self._wandb: Any = None
        for package, wanted in {"tensorboard": tensorboard, "wandb": wandb}.items():
            # On every rank: one that stops alone would leave the others waiting.
            if wanted and find_spec(package) is None:
                raise ValueError(f"logger.{package}=true needs a package: pip install {package}")

    def resume(self, step: int) -> None:
        """Go on after `step` steps: lines that a run left behind its last checkpoint are dropped.

        Without this call the run starts at 0 and its files anew.
        """
        self._done = step

    def step(self, record: Mapping[str, Any], max_steps: int) -> None:
        """Log one step: `record["step"]` steps of `max_steps` are done."""
        if not self.enabled:
            return
        self._write("metrics.jsonl", record)
        shown = {"loss": record["loss"], "tokens/s": record["tokens_per_second"]}
        postfix = {name: f"{value:.4g}" for name, value in shown.items()}
        if self._progress is None:
            self._progress = _progress(self.run_name, record["step"], max_steps, postfix)
        self._progress.set_postfix(postfix, refresh=False)
        self._progress.update(record["step"] - self._progress.n)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a validation after `step`: {"step", "validation_<name>": mean of each metric}."""
        if self.enabled:
            record = {f"validation_{name}": value for name, value in metrics.items()}
            self._write("validation.jsonl", {"step": step, **record})

    def close(self) -> None:
        """Flush and close everything. Idempotent."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._progress is not None:
            self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._progress = self._tensorboard = self._wandb = None

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if not self._files:
            self._open()
        self._files[name].write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._files[name].flush()
        self._done = record["step"]
        scalars = dict(_scalars(record))
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def _open(self) -> None:
        for name in ("metrics.jsonl", "validation.jsonl"):
            path = self.run_dir / name
            _drop_after(path, self._done)
            self._files[name] = path.open("a", encoding="utf-8")
        if self._use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.run_dir / "tensorboard")
            self._tensorboard = SummaryWriter(folder, purge_step=self._done + 1)
        if self._wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=self._wandb_project,
                name=self.run_name,
                id=re.sub(r"[^\w.-]+", "-", f"{self.run_name}-{self.run_dir.name}"),
                resume="allow",
                dir=str(self.run_dir),
                config=dict(self._config),
                mode=None if wandb.login(prompt=False) else "offline",
            )


def _progress(name: str, step: int, max_steps: int, postfix: dict[str, str]) -> tqdm:
    terminal = sys.stderr.isatty()
    return _Progress(
        total=max_steps,
        initial=step,
        desc=name,
        unit="step",
        postfix=postfix,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else _LINE_SECONDS,
        miniters=1,
        dynamic_ncols=terminal,
        bar_format=None if terminal else _LINE_FORMAT,
    )


class _Progress(tqdm):
    # tqdm's monitor is a thread, and a process that forks should have none; miniters=1 needs none.
    monitor_interval = 0


class _Lines:
    """Turns tqdm's redrawn line into one line a refresh, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def update_summary(run_dir: str | Path, **values: Any) -> dict[str, Any]:
    """Merge `values` into `run_dir/summary.json` (whole, or not at all) and return it.

    Training writes train_seconds, steps, samples_seen, tokens_per_second, num_parameters,
    world_size, git_revision, machine; evaluation adds heldout_exact_match
    ({"overall": ..., question kind: ...}).
    """
    path = Path(run_dir) / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    summary.update(values)
    _replace(path, json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")
    return summary


def git_revision() -> str | None:
    """Commit of the checkout this package runs from ("-dirty" if changed), None outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError):
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return result.stdout.strip() or None
    return None


def machine() -> dict[str, str | int]:
    """What this rank runs on."""
    return {
        "device": device_name() or _processor(),
        "cpu_cores": os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines of `path` up to `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A process that died while writing leaves a last line without its end.
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record by their path: ("model_flops/vision", 1.0)."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif value is not None and key not in ("step", "sample_ids"):
            yield f"{prefix}{key}", value
