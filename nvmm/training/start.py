"""Begin a run: at step 0 from the seed or from given weights, or at the step where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.files import find, latest, read_state, require_resumable
from nvmm.checkpoint.load import load, load_scales, load_weights
from nvmm.config.changes import Change, compare, loss_changes
from nvmm.modules.fp8_scales import Scaling
from nvmm.objectives.objective import Objective
from nvmm.training.optimizer import Optimizer
from nvmm.training.reference import Reference

log = logging.getLogger("nvmm")


@dataclass(frozen=True)
class Start:
    """The beginning of a run.

    step: optimizer steps done. position: where the data order stands, None at its beginning.
    counters: what the run has counted so far. base: the checkpoint whose frozen weights this run's
    checkpoints leave out (LoRA).
    """

    step: int = 0
    position: dict[str, Any] | None = None
    counters: dict[str, Any] = field(default_factory=dict)
    base: BaseCheckpoint | None = None


def start(
    run_dir: Path,
    chunks: list[Module],
    optimizer: Optimizer,
    scaling: Scaling,
    *,
    config: dict[str, Any],
    tokenizer_digest: str,
    resume: str,
    init_from: str | None,
    objective: Objective,
    adapts: bool,
    reference: Reference | None,
    command: str,
    say: Callable[[str], None],
) -> Start:
    """Fill model and optimizer with the weights and state that the run begins from; collective.

    Args:
        config: the run's; a resume compares it with the checkpoint's.
        resume: "auto", "never", or the checkpoint or run directory to go on from.
        init_from: the checkpoint whose weights a new run starts from.
        objective: the run's; it knows when another layout changes its loss.
        adapts: the run trains adapters on the weights that `init_from` gives.
        reference: takes the weights that the run started from, also those of a resumed run.
        command: the command that resumes this run, for the log.

    Raises ValueError when the checkpoint is of another model or config, or `resume=never` and the
    run has one.
    """
    path = checkpoint_to_resume(run_dir, resume)
    # 1. A new run: the seed's weights are there already, `init_from` replaces them.
    if path is None:
        base = None
        if init_from is not None:
            path = find(init_from)
            missing = load_weights(path, chunks)
            optimizer.reload_parameters()
            base = BaseCheckpoint.of(path) if adapts else None
            if reference is not None:
                reference.take(BaseCheckpoint.of(path))
            say(f"weights from {path}; not in it: {missing or 'none'}")
        say(f"starting {run_dir} from step 0; resume it with: {command}")
        return Start(base=base)
    # 2. A resumed run: its config is compared before anything is loaded.
    require_resumable(path)
    state = read_state(path)
    refused, notable = compare(state["config"], config)
    notable += loss_changes(
        (state["config"], state["world_size"]),
        (config, dist.get_world_size()),
        objective.samples_in_loss,
    )
    if state["tokenizer_digest"] != tokenizer_digest:
        refused.append(Change("tokenizer (digest)", state["tokenizer_digest"], tokenizer_digest))
    if reference is not None:
        # A parameter that was trained and is frozen now has no copy of the value it started from.
        refused += [change for change in notable if change.key == "optim.freeze"]
    if refused:
        listing = "\n  ".join(map(str, refused))
        raise ValueError(f"cannot resume {path}: these keys make another model:\n  {listing}")
    # 3. The base's weights come before the run's own, and so do those of the reference.
    moved = Path(init_from).expanduser() if init_from is not None else None
    base = BaseCheckpoint.saved(state)
    base = base.located(moved) if base is not None else None
    if reference is not None:
        reference.take_again(path, state, moved)
    load(path, chunks, optimizer, moved)
    fresh = load_scales(path, scaling)
    if fresh:
        say(f"{path.name} lacks {len(fresh)} FP8 scales, which start anew: {fresh[:3]} ...")
    for change in notable:
        say(f"changed since {path.name}: {change}")
    say(f"resuming {path} at step {state['step']}; again with: {command}")
    return Start(int(state["step"]), state["position"], state["counters"], base)


def checkpoint_to_resume(run_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint that `resume` asks for, None for a new run; collective."""
    newest = latest(run_dir / "checkpoints")
    if resume == "never":
        if newest is not None:
            raise ValueError(
                f"resume=never, but {run_dir} already has {newest.name}; use resume=auto"
                " or another run.dir"
            )
        return None
    return newest if resume == "auto" else find(resume)
