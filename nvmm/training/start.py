"""Begin a run: at step 0 from the seed or from given weights, or at the step where it stopped."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.files import (
    any_checkpoint,
    find,
    latest,
    read_state,
    require_resumable,
)
from nvmm.checkpoint.load import is_other_graph, load, load_scales, load_weights
from nvmm.checkpoint.record import DamagedError
from nvmm.config.batch_sizes import BatchSizes
from nvmm.config.changes import Change, compare, loss_changes
from nvmm.modules.fp8_scales import Scaling
from nvmm.objectives.objective import Objective
from nvmm.training.accounting import Digested
from nvmm.training.optim import Optim
from nvmm.training.optimizer import Optimizer
from nvmm.training.reference import Reference, check_scores

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
    tokenizer: Digested,
    templates: Mapping[str, str],
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
        templates: digests of the run's templates whose text stands in files.
        resume: "auto", "never", or the checkpoint or run directory to go on from.
        init_from: the checkpoint whose weights a new run starts from.
        objective: the run's; it knows when another layout changes its loss.
        adapts: the run trains adapters on the weights that `init_from` gives.
        reference: takes the weights that the run started from, also those of a resumed run.
        command: the command that resumes this run, for the log.

    With resume=auto a damaged checkpoint is left aside, by name, for the one before it.

    Raises ValueError when the checkpoint is of another model or config or is damaged, or
    `resume=never` and the run has one.
    """
    path = checkpoint_to_resume(run_dir, resume)
    # 1. A new run: the seed's weights are there already, `init_from` replaces them.
    if path is None:
        base = None
        check_scores(config, init_from)
        if init_from is not None:
            path = find(init_from)
            missing = load_weights(path, chunks, other_graph=True)
            optimizer.reload_parameters()
            if adapts and not is_other_graph(path, chunks):
                base = BaseCheckpoint.of(path)
            if reference is not None:
                reference.take(BaseCheckpoint.of(path))
            say(f"weights from {path}; not in it: {missing or 'none'}")
        say(f"starting {run_dir} from step 0; resume it with: {command}")
        return Start(base=base)
    # 2. A resumed run: damage to the data shows while they are read.
    moved = Path(init_from).expanduser() if init_from is not None else None
    damaged: set[Path] = set()
    while True:
        state, notable = _resumable(path, config, tokenizer, templates, objective, reference)
        try:
            # The base's weights come before the run's own, and so do those of the reference, which
            # is the same for all checkpoints of a run.
            base = BaseCheckpoint.saved(state)
            base = base.located(moved) if base is not None else None
            if reference is not None and not damaged:
                reference.take_again(path, state, moved)
            load(path, chunks, optimizer, moved)
            fresh = load_scales(path, scaling)
            break
        except DamagedError as error:
            if resume != "auto" or error.path != path:
                raise
            damaged.add(path)
            path = checkpoint_to_resume(run_dir, resume, damaged)
            assert path is not None
            say(f"{error}; going on from {path} instead")
    # 3. What is not as it was is said.
    if fresh:
        say(f"{path.name} lacks {len(fresh)} FP8 scales, which start anew: {fresh[:3]} ...")
    for change in notable:
        say(f"changed since {path.name}: {change}")
    rates = changed_rates(state["config"], config, int(state["step"]))
    if rates is not None:
        say(f"changed since {path.name}: {rates}")
    say(f"resuming {path} at step {state['step']}; again with: {command}")
    return Start(int(state["step"]), state["position"], state["counters"], base)


def _resumable(
    path: Path,
    config: dict[str, Any],
    tokenizer: Digested,
    templates: Mapping[str, str],
    objective: Objective,
    reference: Reference | None,
) -> tuple[dict[str, Any], list[Change]]:
    """Return the state of a checkpoint and the changes of config to print, before it is loaded.

    Raises ValueError when it is of another model, or cannot be resumed.
    """
    state, refused, notable = compared(path, config)
    notable += loss_changes(
        (state["config"], state["world_size"]),
        (config, dist.get_world_size()),
        objective.samples_in_loss,
    )
    if not tokenizer.is_of(state["tokenizer_digest"]):
        refused.append(Change("tokenizer (digest)", state["tokenizer_digest"], tokenizer.digest))
    before = state.get("template_digests") or {}
    notable += [
        Change(f"template of {name} (digest)", before[name], templates[name])
        for name in sorted(before.keys() & templates.keys())
        if before[name] != templates[name]
    ]
    if reference is not None:
        # A parameter that was trained and is frozen now has no copy of the value it started from.
        refused += [change for change in notable if change.key == "optim.freeze"]
    if refused:
        listing = "\n  ".join(map(str, refused))
        raise ValueError(f"cannot resume {path}: these keys make another model:\n  {listing}")
    return state, notable


def compared(
    path: Path, config: dict[str, Any]
) -> tuple[dict[str, Any], list[Change], list[Change]]:
    """Return a checkpoint's state, and the keys that refuse a resume with `config`, and the others.

    Raises ValueError when it holds weights alone, and when its run is finished and `config` has
    other values: nothing would be trained with them.
    """
    require_resumable(path)
    state = read_state(path)
    refused, notable = compare(state["config"], config)
    max_steps = config.get("trainer", {}).get("max_steps")
    if notable and not refused and max_steps is not None and state["step"] >= max_steps:
        listing = "\n  ".join(map(str, notable))
        raise ValueError(
            f"{path} has done the {max_steps} steps of trainer.max_steps={max_steps} with other"
            f" values:\n  {listing}\n  give this run a run.id (or run.dir) of its own, or a larger"
            " trainer.max_steps to go on from there with these values (docs/checkpoints.md says"
            " which may change)"
        )
    return state, refused, notable


def require_unchanged(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state. Raises ValueError when a run of `config` may not resume it."""
    state, refused, _ = compared(path, config)
    if refused:
        listing = "\n  ".join(map(str, refused))
        raise ValueError(f"cannot resume {path}: these keys make another model:\n  {listing}")
    return state


def changed_rates(saved: dict[str, Any], config: dict[str, Any], step: int) -> str | None:
    """Say how the learning rate of the step after `step` differs between two configs, if it does.

    A schedule without optim.decay_steps ends at trainer.max_steps, so that a longer run has other
    rates at every step; one by tokens changes with the batch sizes too.
    """
    schedules = []
    for each in (saved, config):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # not our Optim
            options = {k: v for k, v in each["optim"].items() if not k.startswith("_")}
            optim = Optim(**options)
            sizes = BatchSizes.of_config(each) if optim.by_tokens else None
            run = each["trainer"]["max_steps"], sizes
            unit = "token" if optim.by_tokens else "step"
            schedules.append((optim.rates(step, *run), f"{unit} {optim.end(*run)}"))
    if len(schedules) < 2 or schedules[0] == schedules[1]:
        return None
    (before, old_end), (now, end) = schedules
    listed = [f"{a:.6g} -> {b:.6g}" for a, b in zip(before, now, strict=False) if a != b]
    if not listed:
        return None
    rates = ", ".join(listed)
    return f"learning rate of step {step + 1}: {rates} (the schedule ends at {old_end} -> {end})"


def checkpoint_to_resume(
    run_dir: Path, resume: str, damaged: Set[Path] = frozenset()
) -> Path | None:
    """Return the checkpoint that `resume` asks for, None for a new run; collective.

    damaged: checkpoints that are known to be so.

    Raises ValueError where the run has checkpoints and none of them is whole.
    """
    if resume not in ("auto", "never"):
        return find(resume)
    folder = run_dir / "checkpoints"
    newest = latest(folder, damaged)
    there = any_checkpoint(folder) if newest is None else None
    if there is not None:
        raise ValueError(
            f"no checkpoint in {folder} is whole (the log says what is wrong with each); to start"
            f" from step 0, move {there.name} and the others away or use another run.dir"
        )
    if resume == "never" and newest is not None:
        raise ValueError(
            f"resume=never, but {run_dir} already has {newest.name}; use resume=auto"
            " or another run.dir"
        )
    return newest
