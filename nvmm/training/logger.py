"""The outlets of a run's numbers: log files, TensorBoard, W&B and a progress line."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from nvmm.config.nested import flat
from nvmm.io.files import disk_error, write
from nvmm.io.progress import progress
from nvmm.training.summary import finite


class Logger:
    """The writer of a run's log files and its progress line. It does nothing where not enabled.

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
        for package, chosen in {"tensorboard": tensorboard, "wandb": wandb}.items():
            # Every rank checks this: one that stops alone would leave the others waiting.
            if chosen and find_spec(package) is None:
                raise ValueError(f"logger.{package}=true needs a package: pip install {package}")

    def resume(self, step: int) -> None:
        """Go on after `step` steps, and drop the lines behind them that an earlier run left.

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
            self._progress = progress(
                max_steps, self.run_name, "step", initial=record["step"], postfix=postfix
            )
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
        try:
            self._files[name].write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise disk_error(self.run_dir / name, error) from error
        self._done = record["step"]
        scalars = {
            key: value
            for key, value in flat(record, "/")
            if value is not None and key.rpartition("/")[2] not in ("step", "sample_ids")
        }
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def _wandb_id(self) -> str:
        """Return the id of this directory's run in W&B: made once, and kept beside its files.

        Names make no id: two people's runs may have the same.
        """
        path = self.run_dir / "wandb_id"
        if not path.exists():
            write(path, f"{secrets.token_hex(8)}\n")
        return path.read_text(encoding="utf-8").strip()

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
                id=self._wandb_id(),
                resume="allow",
                dir=str(self.run_dir),
                config=dict(self._config),
                mode=None if wandb.login(prompt=False) else "offline",
            )


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines of `path` up to `step`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A process that died while writing leaves a last line without its end.
    complete = [line for line in lines if line.endswith("\n")]
    write(path, "".join(line for line in complete if json.loads(line)["step"] <= step))
