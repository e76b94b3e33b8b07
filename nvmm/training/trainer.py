"""The training loop, readable from top to bottom: fit, train_step, update, validate."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch
from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.save import Checkpoint
from nvmm.config.batch_sizes import BatchSizes
from nvmm.config.choices import Backend, require
from nvmm.modules.fp8_scales import Scaling
from nvmm.modules.lora import Lora
from nvmm.objectives.objective import Objective
from nvmm.parallel import context_parallel, generators, schedule
from nvmm.parallel.broadcast import broadcast_batches, is_reader
from nvmm.parallel.gradients import GradientCheck
from nvmm.parallel.parameters import build_chunks, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision
from nvmm.training.accounting import Accounting, StepResult, TrainingData
from nvmm.training.again import resume_command
from nvmm.training.logger import Logger
from nvmm.training.metrics import peak_flops, reduce_counters, reduce_metrics
from nvmm.training.optim import Optim
from nvmm.training.optimizer import Optimizer, build_optimizer, freeze, wrap
from nvmm.training.profiler import profiled
from nvmm.training.reference import Reference
from nvmm.training.start import start

log = logging.getLogger("nvmm")
OnNonfinite = Literal["stop", "skip"]


class Trainer:
    """The training of one model with one objective on one dataset.

    Args:
        max_steps: optimizer steps of the whole run.
        global_batch_size: samples per step over all data-parallel ranks and micro-batches; packs
            where the data are packed.
        batch_ramp: [{global_batch_size, steps | tokens}]: stages of the run's beginning with other
            sizes. A step counts as its samples x data.sequence_length tokens; a stage has
            the number of steps that comes nearest. Validation has global_batch_size throughout.
        micro_batch_size: samples, or packs, per forward pass of one rank.
        log_interval: steps between lines of metrics.jsonl.
        validation_interval: steps between validations (None: never).
        validation_batches: global batches of one validation (None: the whole split once).
        max_minutes: save and stop after this wall time.
        profile: [start, stop] steps of a torch profiler trace.
        on_nonfinite: "stop" the run at a non-finite loss or gradient, or "skip" the step.
        max_consecutive_skips, max_skips: skipped steps in a row, and in the whole run, that do not
            stop it yet (None: any number).
        run_dir: the directory of all output; config: the resolved config; overrides: the command
            line's, for the message that says how to resume.
        lora: adapters; all of the base but the parameters it names is then frozen.
    """

    def __init__(
        self,
        max_steps: int,
        global_batch_size: int,
        micro_batch_size: int = 1,
        log_interval: int = 1,
        validation_interval: int | None = None,
        validation_batches: int | None = None,
        max_minutes: float | None = None,
        profile: list[int] | None = None,
        on_nonfinite: OnNonfinite = "stop",
        max_consecutive_skips: int | None = 5,
        max_skips: int | None = 100,
        batch_ramp: Sequence[Mapping[str, Any]] = (),
        *,
        model: Callable[..., Module],
        objective: Objective,
        optim: Optim,
        data: TrainingData,
        parallel: Parallel,
        precision: Precision,
        checkpoint: Checkpoint,
        logger: Logger,
        run_dir: Path,
        config: dict[str, Any],
        overrides: list[str] | None = None,
        lora: Lora | None = None,
        backend: Backend = "native",
        seed: int = 1234,
        resume: str = "auto",
        init_from: str | None = None,
    ) -> None:
        require("trainer.on_nonfinite", on_nonfinite, OnNonfinite)
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.batch_sizes = BatchSizes.read(global_batch_size, batch_ramp, data.sequence_length)
        for key, size in self.batch_sizes.all:
            if size % (micro_batch_size * self.data_parallel_size):
                raise ValueError(
                    f"{key}={size} must be a multiple of"
                    f" trainer.micro_batch_size={micro_batch_size} x data parallel size"
                    f" {self.data_parallel_size}"
                )
        self.max_steps = max_steps
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.log_interval = log_interval
        self.validation_interval = validation_interval
        self.validation_batches = validation_batches
        self.max_minutes = max_minutes
        self.profile = profile
        self.on_nonfinite = on_nonfinite
        self.max_consecutive_skips = max_consecutive_skips
        self.max_skips = max_skips
        self.objective = objective
        self.data = data
        self.parallel = parallel
        self.precision = precision
        self.checkpoint = checkpoint
        self.logger = logger
        self.run_dir = run_dir
        self.config = config
        self.overrides = overrides or []
        self.resume = resume
        self.init_from = init_from

        adapt = None if lora is None else lora.attach
        self.chunks: list[Any] = build_chunks(model, parallel, precision, backend, seed, adapt)
        self.frozen = freeze(self.chunks, optim.freeze)
        if lora is not None:
            lora.freeze(self.chunks)
        self.scaling = Scaling(self.chunks, precision.fp8)
        self.models = wrap(self.chunks, parallel, precision)
        self.optimizer: Optimizer = build_optimizer(
            self.models, optim, precision, max_steps, self.batch_sizes
        )
        self.device = next(self.chunks[0].parameters()).device
        self.accounting = Accounting(data, self.chunks[0], peak_flops(precision.torch_dtype))
        self.position: dict[str, Any] | None = None
        self.lora = lora
        self.base: BaseCheckpoint | None = None
        needed = objective.needs_reference
        self.reference = Reference(self.chunks, self.scaling) if needed else None
        self.started = time.monotonic()
        self._stop_signal = 0
        self._configure_schedule()

    def fit(self, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train to max_steps (or a signal, or max_minutes); return the run's summary.

        `started` is called once nothing refuses the start or the resume any more.
        """
        # A refusal leaves nothing behind: only a run that has begun may replace its config.yaml.
        first = self._start()
        if first >= self.max_steps:
            self._say(
                f"nothing left to do: {self.run_dir} is at step {first} of"
                f" trainer.max_steps={self.max_steps}; a larger one goes on"
            )
            return self._summary(first, first)
        started()
        count, trained = (count_parameters(self.chunks, trained=only) for only in (False, True))
        self._say(f"parameters: {count:,}, {trained:,} of them trained, {count - trained:,} frozen")
        if self.batch_sizes.stages:
            self._say(f"global batch size: {self.batch_sizes}")
        step = first
        batches = self.batches("train", first)
        self._catch_signals()
        stalled = 0.0
        profile = self.profile if dist.get_rank() == 0 else None
        with profiled(self.run_dir / "profile.json", profile) as profile_step:
            while step < self.max_steps:
                # The only wait for data is here, so that the rest of a step is computation.
                begin = time.monotonic()
                micro_batches = next(batches)
                waited = time.monotonic() - begin
                if step == first:
                    self._say_payload(micro_batches)
                # A parameter that no gradient reaches shows at the first step already.
                result = self.train_step(step, micro_batches, check=step == first)
                step += 1
                profile_step()
                seconds = {
                    "step_seconds": time.monotonic() - begin + stalled,
                    "data_wait_seconds": waited,
                    "checkpoint_stall_seconds": stalled,
                }
                # Log before the save: a checkpoint's steps are in the log, whatever kills the run.
                if step % self.log_interval == 0 or step == self.max_steps:
                    self.logger.step(self.accounting.record(step, seconds, result), self.max_steps)
                stalled = self._save_if_due(step)
                if self.validation_interval and step % self.validation_interval == 0:
                    self.validate(step)
                # This comes last: it is collective, and ranks do different things above.
                if self._must_stop():
                    break
        self._finish(first, step)
        return self._summary(first, step)

    def train_step(self, step: int, batches: list[Batch], *, check: bool = False) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Counts, forward and backward, the decision on non-finite numbers (the same on all ranks),
        the update. With `check`, a trainable parameter that was used but got no gradient stops
        the run.
        """
        with GradientCheck(self.chunks) if check else contextlib.nullcontext() as gradients:
            metrics = self.forward_backward(batches)
        if gradients is not None:
            gradients.raise_on_missing()
        # Counters are summed over ranks: each replica counts once, other ranks give zeros.
        counters = reduce_counters(self.accounting.count(batches), self.device)
        grad_norm, learning_rate = self.update(step, metrics["loss"], batches)
        # Too many bad samples stop the run here, after the step has counted them all.
        self.accounting.add(counters)
        # The ids are gathered over all ranks, which costs time: only where the log wants them.
        sample_ids = self.accounting.sample_ids(batches) if self.data.log_samples else None
        return StepResult(metrics, counters, grad_norm, learning_rate, sample_ids)

    def forward_backward(self, batches: list[Batch]) -> dict[str, float]:
        """Fill the gradients of one step and return its metrics, reduced over all ranks."""
        self.optimizer.zero_grad()
        batches, surrogate = self.objective.prepare(self.run, batches)
        outputs = schedule.run_schedule(
            self.models, batches, self._forward_step, forward_only=False
        )
        # A training pass may have a surrogate loss, whose value says nothing; `prepare` then
        # gives the real one.
        return reduce_metrics(outputs, self.device) | surrogate

    def update(self, step: int, loss: float, batches: list[Batch]) -> tuple[float, float]:
        """Apply the gradients, unless the loss or their norm is not finite; the same everywhere.

        Returns the gradient norm before clipping and the learning rate.
        """
        learning_rate = self.optimizer.set_step(step)
        # Loss and norm are reduced over all ranks, so that all take the same branch.
        grad_norm = self.optimizer.prepare()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.apply()
            # FP8 scales move with the weights: all micro-batches of a step have seen the same.
            self.scaling.update()
            self.accounting.totals["consecutive_skips"] = 0
            return grad_norm, learning_rate
        what = f"step {step + 1}: loss {loss}, gradient norm {grad_norm}"
        if self.on_nonfinite == "skip":
            # Nothing of the step remains, but the schedule and the data have gone on.
            self.optimizer.discard()
            self.scaling.discard()
            limit = self._skip()
            if limit is None:
                return grad_norm, learning_rate
            what += f"; {limit}"
        ids = [batch.sample_ids.tolist() for batch in batches]
        raise FloatingPointError(f"{what}; samples of this rank {ids}")

    def _skip(self) -> str | None:
        """Count a skipped step; return the bound that it breaks, None while it breaks none."""
        totals = self.accounting.totals
        totals["skipped_steps"] += 1
        totals["consecutive_skips"] += 1
        for count, name, where in (
            (totals["consecutive_skips"], "max_consecutive_skips", "in a row"),
            (totals["skipped_steps"], "max_skips", "in all"),
        ):
            most = getattr(self, name)
            if most is not None and count > most:
                return f"{count} steps were skipped {where}, more than trainer.{name}={most}"
        return None

    def validate(self, step: int) -> dict[str, float]:
        """Return the means of the objective's metrics over held-out batches; weights stay.

        A loss over the whole batch is one here too: `Objective.prepare` runs as in training.
        """
        count = self.data.num_batches("validation", self.global_batch_size)
        count = min(count, self.validation_batches or count)
        # Each validation reads from the beginning, so that all see the same samples.
        batches = self.batches("validation", 0)
        for model in self.models:
            model.eval()
        outputs: list[dict[str, Tensor]] = []
        surrogates: list[dict[str, float]] = []
        # The hooks that gather parameters wait for a training step's optimizer: they are paused.
        with torch.no_grad(), self._gathered_parameters():
            for _ in range(count):
                prepared, surrogate = self.objective.prepare(self.run, next(batches))
                outputs += schedule.run_schedule(
                    self.models, prepared, self._forward_step, forward_only=True
                )
                surrogates.append(surrogate)
        for model in self.models:
            model.train()
        # Sums and counts add up over batches; a surrogate is a mean already, of equal batches.
        means = {
            name: fmean(each[name] for each in surrogates) for name in next(iter(surrogates), {})
        }
        metrics = reduce_metrics(outputs, self.device) | means
        self.logger.validation(step, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._say(f"validation after step {step}: {shown}")
        return metrics

    # -- schedule ---------------------------------------------------------------------------

    def _forward_step(self, batches: Iterator[Batch], model: Module) -> tuple[Tensor, Any]:
        """Run one micro-batch for mcore's schedules; return its output and its loss function."""
        batch = next(batches)
        local_batch = context_parallel.share(batch)
        loss = partial(self.objective.loss, batch=local_batch)
        return self.objective.forward(model, batch), loss

    def run(self, batches: list[Batch], weights: str = "current") -> list[Tensor]:
        """Run forward only for `Objective.prepare`; see `nvmm.objectives.objective.Run`."""
        if weights not in ("current", "reference"):
            raise ValueError(f"weights={weights} must be current or reference")
        with contextlib.ExitStack() as stack:
            stack.enter_context(generators.replayed())
            if weights == "reference":
                if self.reference is None:
                    name = type(self.objective).__name__
                    raise ValueError(f"weights=reference: {name}.needs_reference is False")
                stack.enter_context(self._gathered_parameters())
                stack.enter_context(self.reference.swapped_in())
            return schedule.outputs(self.models, batches, self.objective.forward)

    def _configure_schedule(self) -> None:
        """Give mcore's schedule our gradient finalisation and DDP's overlap hooks."""
        config = self.chunks[0].config
        config.finalize_model_grads_func = schedule.finalize_model_grads
        if self.parallel.overlap_grad_reduce:
            several = len(self.models) > 1
            no_sync = [model.no_sync for model in self.models]
            config.no_sync_func = no_sync if several else no_sync[0]
            if several:
                config.grad_sync_func = [model.start_grad_sync for model in self.models]
        for chunk in self.chunks[1:]:
            for name in ("finalize_model_grads_func", "no_sync_func", "grad_sync_func"):
                setattr(chunk.config, name, getattr(config, name))

    @contextlib.contextmanager
    def _gathered_parameters(self) -> Iterator[None]:
        """With overlapped parameter gathers, complete them and pause the hooks, once if nested."""
        hooked = [model for model in self.models if model.remove_forward_pre_hook_handles]
        for model in hooked:
            model.disable_forward_pre_hook(param_sync=True)
        yield
        for model in hooked:
            model.enable_forward_pre_hook()

    # -- data -------------------------------------------------------------------------------

    def batches(self, split: str, start: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of every step from `start` on, read once per replica.

        Raises ValueError when the reader cannot read, and for a batch whose extras are not those
        that objective and model read.
        """
        source: Iterator[list[Batch]] | None = None
        if is_reader():
            source = self.data.batches(
                split=split,
                global_batch_size=self.batch_sizes if split == "train" else self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                rank=parallel_state.get_data_parallel_rank(),
                size=self.data_parallel_size,
                start=start,
                position=self.position if split == "train" else None,
                pad_multiple=self.precision.sequence_multiple(self.parallel),
                segment_multiple=self.parallel.segment_multiple,
                images=any(kind.modality == "image" for kind in self.chunks[0].reads),
            )
        while True:
            read, error = None, None
            if source is not None:
                try:
                    read = next(source)
                    for batch in read:
                        self._check_batch(split, batch)
                except (ValueError, OSError) as failure:
                    read, error = None, str(failure)
            yield broadcast_batches(read, error, self.device)

    def _check_batch(self, split: str, batch: Batch) -> None:
        """Refuse data of another model or objective: extras are missing, or nothing reads them."""
        model: Any = self.chunks[0]
        batch.require(model.reads, type(model).__name__)
        needed, read = self.objective.extras, self.objective.extras | model.extras
        objective = type(self.objective).__name__
        missing = sorted(needed - batch.extras.keys())
        if missing:
            raise ValueError(
                f"{objective} needs extras {missing}, which data.{split}.build does not give; it"
                f" gives {sorted(batch.extras) or 'none'}"
            )
        unread = sorted(batch.extras.keys() - read)
        if unread:
            raise ValueError(
                f"data.{split}.build gives extras {unread}, which neither {objective} nor"
                f" {type(model).__name__} reads; they read {sorted(read) or 'none'}"
            )

    # -- start, save, stop ------------------------------------------------------------------

    def _start(self) -> int:
        """Resume, or start from `init_from` or from the seed; return the first step."""
        begin = start(
            self.run_dir,
            self.chunks,
            self.optimizer,
            self.scaling,
            config=self.config,
            tokenizer=self.data.tokenizer,
            templates=self.data.template_digests,
            resume=self.resume,
            init_from=self.init_from,
            objective=self.objective,
            adapts=self.lora is not None,
            reference=self.reference,
            command=self._command(),
            say=self._say,
        )
        self.accounting.restore(begin.counters)
        self.position, self.base = begin.position, begin.base
        if begin.step:
            self.logger.resume(begin.step)
        return begin.step

    def _command(self) -> str:
        return resume_command(self.overrides, self.run_dir, dist.get_world_size())

    def _save_if_due(self, step: int) -> float:
        """Save when the interval says so; return the seconds waited, logged with the next step."""
        begin = time.monotonic()
        self.checkpoint.finalize()
        interval = self.checkpoint.save_interval
        if interval and step % interval == 0 and step < self.max_steps:
            self.save(step)
        return time.monotonic() - begin

    def save(self, step: int) -> Path:
        """Write a checkpoint after `step` steps."""
        with self._gathered_parameters():
            return self.checkpoint.save(
                step,
                self.chunks,
                self.optimizer,
                {
                    "step": step,
                    "position": self.data.position(step),
                    "counters": self.accounting.totals,
                    "config": self.config,
                    "tokenizer_digest": self.data.tokenizer.digest,
                    "template_digests": dict(self.data.template_digests),
                    "world_size": dist.get_world_size(),
                    "base": asdict(self.base) if self.base is not None else None,
                    **(self.reference.state() if self.reference is not None else {}),
                },
                self._left_out,
                self.scaling,
            )

    @cached_property
    def _left_out(self) -> set[str]:
        """The names of this rank's weights that a LoRA run does not save: frozen, from its base.

        They do not change once the run has started.
        """
        if self.base is None:
            return set()
        frozen = {p.name for p in sharded_parameters(self.chunks) if not p.parameter.requires_grad}
        return frozen & self.base.names()

    def _catch_signals(self) -> None:
        def remember(number: int, frame: Any) -> None:
            self._stop_signal = number
            if number == signal.SIGINT:  # A second Ctrl-C ends the process where it is.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if dist.get_rank() == 0:  # A handler may interrupt the log, which it must not use.
                    os.write(2, b"\nstopping after this step; Ctrl-C again does not wait for it\n")

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            with contextlib.suppress(ValueError):
                signal.signal(number, remember)

    def _must_stop(self) -> bool:
        """Return True when any rank got a signal or its time is up: all agree on the step."""
        minutes = (time.monotonic() - self.started) / 60
        late = self.max_minutes is not None and minutes >= self.max_minutes
        flag = torch.tensor([float(self._stop_signal != 0 or late)], device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _finish(self, first: int, step: int) -> None:
        self.checkpoint.finalize(blocking=True)
        # A folder of this step that an earlier start left need not be this run's, nor whole.
        latest = self.checkpoint.saved if step > first else self.checkpoint.latest()
        if step > 0 and (latest is None or latest.name != f"step_{step:08d}"):
            self.save(step)
            self.checkpoint.finalize(blocking=True)
        totals = self.accounting.totals
        media = sum(
            each.get(f"{modality}.items", 0)
            for each in totals["datasets"].values()
            for modality in self.accounting.modalities
        )
        items = f", {media:,} {' and '.join(self.accounting.modalities)}s" if media else ""
        read = f"{totals['samples']:,} samples{items}, {totals['tokens']:,} tokens"
        self._say(f"read in {step} steps: {read}")
        self._say(f"checkpoint: {self.checkpoint.saved or self.checkpoint.latest()}")
        if step < self.max_steps:
            self._say(f"stopped at step {step} of {self.max_steps}; go on: {self._command()}")

    # -- reporting --------------------------------------------------------------------------

    def _summary(self, first: int, step: int) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {
            "train_seconds": seconds,
            "steps": step,
            "samples_seen": self.accounting.totals["samples"],
            "tokens_per_second": self.accounting.totals["tokens"] / seconds,
            "num_parameters": count_parameters(self.chunks),
            "world_size": dist.get_world_size(),
            "skipped_steps": self.accounting.totals["skipped_steps"],
            "first_step": first,
        }

    def _say_payload(self, batches: list[Batch]) -> None:
        """Log the bytes that a model packs behind the hidden states between pipeline stages."""
        size_of = getattr(self.chunks[0], "payload_bytes", None)
        if size_of is None or self.parallel.pipeline_model_parallel_size == 1:
            return
        hidden, media = max(map(size_of, batches), key=sum)
        self._say(
            f"the first step's largest micro-batch sends {hidden + media} bytes over each stage"
            f" boundary and back: {hidden} of hidden states, {media} of media"
        )

    def _say(self, message: str) -> None:
        if dist.get_rank() == 0:
            log.info(message)


def count_parameters(chunks: list[Module], *, trained: bool = False) -> int:
    """Count the parameters of the whole model, or those that are trained, each once; collective."""
    local_count = sum(
        piece.numel()
        for sharded in sharded_parameters(chunks)
        if sharded.is_main_replica and (sharded.parameter.requires_grad or not trained)
        for _, piece in sharded.pieces(sharded.parameter.data)
    )
    total = torch.tensor(
        [local_count], dtype=torch.int64, device=next(chunks[0].parameters()).device
    )
    dist.all_reduce(total)
    return int(total.item())
