"""The training loop, readable from top to bottom: fit, train_step, validate."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads as mcore_finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from nvmm import resume as resuming
from nvmm.base import Base
from nvmm.batch import Batch
from nvmm.checkpoint import (
    Checkpoint,
    find,
    load_scales,
    load_weights,
    read_state,
    require_resumable,
)
from nvmm.flops import segment_lengths
from nvmm.metrics import (
    Logger,
    memory_peak_bytes,
    peak_flops,
    reduce_counters,
    reduce_metrics,
)
from nvmm.modules.lora import Lora
from nvmm.modules.scaling import Scaling
from nvmm.objectives.objective import Objective
from nvmm.optim import Optim, Optimizer, build_optimizer, freeze, wrap
from nvmm.parallel import context_parallel, generators
from nvmm.parallel.broadcast import broadcast_batches, is_reader
from nvmm.parallel.gradients import GradientCheck, sum_replicated_gradients
from nvmm.parallel.parameters import build_chunks, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision

log = logging.getLogger("nvmm")


@dataclass(frozen=True)
class StepResult:
    """What a step gave: the objective's reduced means, summed counters, norm and rate.

    sample_ids: of all ranks, sorted, where the data ask for them to be logged.
    """

    metrics: dict[str, float]
    counters: dict[str, float]
    grad_norm: float
    learning_rate: float
    sample_ids: list[int] | None = None


class Trainer:
    """Trains one model with one objective on one dataset.

    Args:
        max_steps: optimizer steps of the whole run.
        global_batch_size: samples per step over all data-parallel ranks and micro-batches; packs
            where the data are packed.
        micro_batch_size: samples, or packs, per forward pass of one rank.
        log_interval: steps between lines of metrics.jsonl.
        validation_interval: steps between validations (None: never).
        validation_batches: global batches of one validation (None: the whole split once).
        max_minutes: save and stop after this wall time.
        profile: [start, stop] steps of a torch profiler trace.
        on_nonfinite: "stop" the run at a non-finite loss or gradient, or "skip" the step.
        run_dir: where everything is written; config: the resolved config; overrides: the command
            line's, for the message that says how to resume.
        lora: adapters; all of the base but what it names is then frozen.
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
        on_nonfinite: str = "stop",
        *,
        model: Callable[..., Module],
        objective: Objective,
        optim: Optim,
        data: Any,
        parallel: Parallel,
        precision: Precision,
        checkpoint: Checkpoint,
        logger: Logger,
        run_dir: Path,
        config: dict[str, Any],
        overrides: list[str] | None = None,
        lora: Lora | None = None,
        backend: str = "native",
        seed: int = 1234,
        resume: str = "auto",
        init_from: str | None = None,
    ) -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"trainer.on_nonfinite={on_nonfinite} must be stop or skip")
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        if global_batch_size % (micro_batch_size * self.data_parallel_size):
            raise ValueError(
                f"trainer.global_batch_size={global_batch_size} must be a multiple of"
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
        self.optimizer: Optimizer = build_optimizer(self.models, optim, precision, max_steps)
        self.device = next(self.chunks[0].parameters()).device
        self.counters: dict[str, Any] = {"samples": 0, "tokens": 0, "skipped_steps": 0}
        self.counters["datasets"] = {}
        self.position: dict[str, Any] | None = None
        self.lora = lora
        self.base: Base | None = None
        self.started = time.monotonic()
        self._stop_signal = 0
        self._configure_schedule()

    def fit(self, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train to max_steps (or a signal, or max_minutes); return the run's summary.

        `started` is called once nothing refuses the start or the resume any more.
        """
        first = self._start()
        started()
        step = first
        batches = self._batches("train", first)
        self._catch_signals()
        stalled = 0.0
        with self._profiler() as profiler:
            while step < self.max_steps:
                begin = time.monotonic()
                micro_batches = next(batches)
                waited = time.monotonic() - begin
                if step == first:
                    self._say_payload(micro_batches)
                result = self.train_step(step, micro_batches, check=step == first)
                step += 1
                profiler.step()
                seconds = {
                    "step_seconds": time.monotonic() - begin + stalled,
                    "data_wait_seconds": waited,
                    "checkpoint_stall_seconds": stalled,
                }
                # Before the save: what a checkpoint has is in the log, whatever kills the run.
                self._log_step(step, seconds, result)
                stalled = self._save_if_due(step)
                if self.validation_interval and step % self.validation_interval == 0:
                    self.validate(step)
                if self._must_stop():
                    break
        self._finish(step)
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
        counters = reduce_counters(self._count(batches), self.device)
        grad_norm, learning_rate = self.update(step, metrics["loss"], batches)
        self.counters["samples"] += int(counters["samples"])
        self.counters["tokens"] += int(counters["tokens"])
        self._count_datasets(counters)
        sample_ids = self._sample_ids(batches) if self.data.log_samples else None
        return StepResult(metrics, counters, grad_norm, learning_rate, sample_ids)

    def update(self, step: int, loss: float, batches: list[Batch]) -> tuple[float, float]:
        """Apply the gradients, unless the loss or their norm is not finite; the same everywhere.

        Returns the gradient norm before clipping and the learning rate.
        """
        learning_rate = self.optimizer.set_step(step)
        grad_norm = self.optimizer.prepare()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.apply()
            self.scaling.update()
        elif self.on_nonfinite == "skip":
            self.optimizer.discard()
            self.scaling.discard()
            self.counters["skipped_steps"] += 1
        else:
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; samples of this rank"
                f" {[batch.sample_ids.tolist() for batch in batches]}"
            )
        return grad_norm, learning_rate

    def forward_backward(self, batches: list[Batch]) -> dict[str, float]:
        """Fill the gradients of one step and return its metrics, reduced over all ranks."""
        self.optimizer.zero_grad()
        batches, surrogate = self._prepare(batches)
        outputs = self._schedule(batches, self._forward_step, forward_only=False)
        return reduce_metrics(outputs, self.device) | surrogate

    def _prepare(self, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        prepare = getattr(self.objective, "prepare", None)
        return (batches, {}) if prepare is None else prepare(self.run, batches)

    def _forward_step(self, batches: Iterator[Batch], model: Module) -> tuple[Tensor, Any]:
        """The single adapter to mcore's schedules."""
        batch = next(batches)
        own = context_parallel.share(batch)
        return self.objective.forward(model, batch), partial(self.objective.loss, batch=own)

    def run(self, batches: list[Batch], weights: str = "current") -> list[Tensor]:
        """A forward-only pass for `Objective.prepare`: outputs per micro-batch on the last stage.

        The random numbers of the training pass that follows are the ones used here.
        """
        if weights != "current":
            raise ValueError(f"weights={weights}: only the current weights are kept")

        def forward_step(iterator: Iterator[Batch], model: Module) -> tuple[Tensor, Any]:
            batch = next(iterator)
            return self.objective.forward(model, batch), lambda output, non_loss_data: output

        with generators.replayed(), torch.no_grad():
            return self._schedule(batches, forward_step, forward_only=True, collect=True)

    def validate(self, step: int) -> dict[str, float]:
        """Mean of the objective's metrics over held-out batches; weights are left alone.

        A loss over the whole batch is one here too: `Objective.prepare` runs as in training.
        """
        count = -(-len(self.data.validation) // self.global_batch_size)
        count = min(count, self.validation_batches or count)
        batches = self._batches("validation", 0)
        for model in self.models:
            model.eval()
        outputs: list[dict[str, Tensor]] = []
        surrogates: list[dict[str, float]] = []
        with torch.no_grad(), self._gathered_parameters():
            for _ in range(count):
                prepared, surrogate = self._prepare(next(batches))
                outputs += self._schedule(prepared, self._forward_step, forward_only=True)
                surrogates.append(surrogate)
        for model in self.models:
            model.train()
        means = {
            name: fmean(each[name] for each in surrogates) for name in next(iter(surrogates), {})
        }
        metrics = reduce_metrics(outputs, self.device) | means
        self.logger.validation(step, metrics)
        return metrics

    # -- schedule ---------------------------------------------------------------------------

    def _configure_schedule(self) -> None:
        """Give mcore's schedule our gradient finalisation and DDP's overlap hooks."""
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        if self.parallel.overlap_grad_reduce:
            several = len(self.models) > 1
            no_sync = [model.no_sync for model in self.models]
            config.no_sync_func = no_sync if several else no_sync[0]
            if several:
                config.grad_sync_func = [model.start_grad_sync for model in self.models]
        for chunk in self.chunks[1:]:
            for name in ("finalize_model_grads_func", "no_sync_func", "grad_sync_func"):
                setattr(chunk.config, name, getattr(config, name))

    def _schedule(
        self,
        batches: list[Batch],
        forward_step: Callable[..., tuple[Tensor, Any]],
        *,
        forward_only: bool,
        collect: bool = False,
    ) -> list[Any]:
        """Run mcore's schedule; every model chunk gets its own iterator over the same batches."""
        lengths = {batch.tokens.shape[1] for batch in batches}
        config = self.chunks[0].config
        if len(lengths) > 1 and config.pipeline_model_parallel_size > 1:
            if not config.variable_seq_lengths:
                raise ValueError(
                    f"parallel.variable_seq_lengths=false needs micro-batches of one length, got"
                    f" {sorted(lengths)}"
                )
        iterators = [iter(batches) for _ in self.models]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=max(lengths),
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    @contextlib.contextmanager
    def _gathered_parameters(self) -> Iterator[None]:
        """With overlapped parameter gathers, complete them and pause the hooks."""
        if not self.parallel.overlap_param_gather:
            yield
            return
        for model in self.models:
            model.disable_forward_pre_hook(param_sync=True)
        yield
        for model in self.models:
            model.enable_forward_pre_hook()

    # -- data -------------------------------------------------------------------------------

    def _batches(self, split: str, start: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step from `start` on, read once per replica."""
        source: Iterator[list[Batch]] | None = None
        if is_reader():
            source = self.data.batches(
                split=split,
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                rank=parallel_state.get_data_parallel_rank(),
                size=self.data_parallel_size,
                start=start,
                position=self.position if split == "train" else None,
                pad_multiple=self.precision.sequence_multiple(self.parallel),
                segment_multiple=self.parallel.segment_multiple,
            )
        while True:
            read, error = None, None
            if source is not None:
                try:
                    read = next(source)
                except (ValueError, OSError) as failure:
                    error = str(failure)
            yield broadcast_batches(read, error, self.device)

    def _count(self, batches: list[Batch]) -> dict[str, float]:
        """What this rank adds to the step's counters: its replica's batches where it reads them.

        Every context-parallel rank's group reads the same batches: the first one counts.
        """
        names = ("tokens", "places", "samples", "images", "tiles", "language", "vision")
        counts = dict.fromkeys(names, 0.0)
        if not self._speaks_for_replica():
            return counts | self.data.count([])
        for batch in batches:
            lengths = segment_lengths(batch)
            counts["tokens"] += sum(lengths)
            counts["places"] += batch.tokens.numel()
            counts["samples"] += int((batch.sample_ids >= 0).sum())
            images, tiles = batch.count_media().sum(1).tolist()
            counts["images"] += images
            counts["tiles"] += tiles
            for part, flops in self.chunks[0].flops(batch).items():
                counts[part] += flops
        return counts | self.data.count(batches)

    def _speaks_for_replica(self) -> bool:
        return is_reader() and parallel_state.get_context_parallel_rank() == 0

    def _count_datasets(self, counters: dict[str, float]) -> None:
        """Add a step's counts of each dataset to the run's; too many bad samples stop the run."""
        totals = self.counters["datasets"]
        for name in self.data.count([]):
            dataset, _, what = name.rpartition("/")
            of_dataset = totals.setdefault(dataset, {})
            of_dataset[what] = of_dataset.get(what, 0) + int(counters[name])
        self.data.check_bad(totals)

    def _sample_ids(self, batches: list[Batch]) -> list[int]:
        """Ids of the samples of this step on all ranks, those of holes negative; collective."""
        own: list[int] = []
        if self._speaks_for_replica():
            own = [i for batch in batches for i in batch.sample_ids.tolist()]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return sorted(i for ids in found for i in ids)

    # -- start, save, stop ------------------------------------------------------------------

    def _start(self) -> int:
        """Resume, or start from `init_from` or from the seed; return the first step."""
        path = self._resume_path()
        if path is None:
            if self.init_from is not None:
                path = find(self.init_from)
                missing = load_weights(path, self.chunks)
                self.optimizer.reload_parameters()
                self.base = Base.of(path) if self.lora is not None else None
                self._say(f"weights from {path}; not in it: {missing or 'none'}")
            self._say(f"starting {self.run_dir} from step 0; resume it with: {self._command()}")
            return 0
        require_resumable(path)
        state = read_state(path)
        refused, notable = resuming.compare(state["config"], self.config)
        if state["tokenizer_digest"] != self.data.tokenizer.digest:
            saved, current = state["tokenizer_digest"], self.data.tokenizer.digest
            refused.append(resuming.Change("tokenizer (digest)", saved, current))
        if refused:
            listing = "\n  ".join(map(str, refused))
            raise ValueError(f"cannot resume {path}: these keys make another model:\n  {listing}")
        moved = Path(self.init_from).expanduser() if self.init_from is not None else None
        base = Base.saved(state)
        self.base = base.located(moved) if base is not None else None
        self.checkpoint.load(path, self.chunks, self.optimizer, moved)
        fresh = load_scales(path, self.scaling)
        if fresh:
            self._say(
                f"{path.name} lacks {len(fresh)} FP8 scales, which start anew: {fresh[:3]} ..."
            )
        self.counters |= state["counters"]
        self.position = state["position"]
        for change in notable:
            self._say(f"changed since {path.name}: {change}")
        self.logger.resume(int(state["step"]))
        self._say(f"resuming {path} at step {state['step']}; again with: {self._command()}")
        return int(state["step"])

    def _resume_path(self) -> Path | None:
        latest = self.checkpoint.latest()
        if self.resume == "never":
            if latest is not None:
                raise ValueError(
                    f"resume=never, but {self.run_dir} already has {latest.name}; use resume=auto"
                    " or another run.dir"
                )
            return None
        return latest if self.resume == "auto" else find(self.resume)

    def _command(self) -> str:
        overrides = [o for o in self.overrides if not o.startswith(("run.dir=", "resume="))]
        words = ["python", "-m", "nvmm.train", *overrides, f"run.dir={self.run_dir}"]
        size = dist.get_world_size()
        launcher = f"torchrun --standalone --nproc-per-node {size} -m nvmm.train"
        return shlex.join(words) if size == 1 else f"{launcher} {shlex.join(words[3:])}"

    def _save_if_due(self, step: int) -> float:
        """Save when the interval says so; seconds the loop waited, logged with the next step."""
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
                    "counters": self.counters,
                    "config": self.config,
                    "tokenizer_digest": self.data.tokenizer.digest,
                    "world_size": dist.get_world_size(),
                    "base": asdict(self.base) if self.base is not None else None,
                },
                self._left_out,
                self.scaling,
            )

    @cached_property
    def _left_out(self) -> set[str]:
        """This rank's weights that a LoRA run does not save: frozen, and given by its base.

        Neither changes once the run has started.
        """
        if self.base is None:
            return set()
        frozen = {p.name for p in sharded_parameters(self.chunks) if not p.parameter.requires_grad}
        return frozen & self.base.names()

    def _catch_signals(self) -> None:
        def remember(number: int, frame: Any) -> None:
            self._stop_signal = number

        for number in (signal.SIGTERM, signal.SIGUSR1):
            with contextlib.suppress(ValueError):
                signal.signal(number, remember)

    def _must_stop(self) -> bool:
        """Whether any rank got a signal or rank 0's time is up: all ranks agree on the step."""
        minutes = (time.monotonic() - self.started) / 60
        late = self.max_minutes is not None and minutes >= self.max_minutes
        flag = torch.tensor([float(self._stop_signal != 0 or late)], device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _finish(self, step: int) -> None:
        self.checkpoint.finalize(blocking=True)
        latest = self.checkpoint.latest()
        if step > 0 and (latest is None or latest.name != f"step_{step:08d}"):
            self.save(step)
            self.checkpoint.finalize(blocking=True)
        if step < self.max_steps:
            self._say(f"stopped at step {step} of {self.max_steps}; go on: {self._command()}")

    # -- reporting --------------------------------------------------------------------------

    def _log_step(self, step: int, seconds: dict[str, float], result: StepResult) -> None:
        """One object of metrics.jsonl."""
        if step % self.log_interval and step != self.max_steps:
            return
        counts = {
            f"num_{n}": int(result.counters[n]) for n in ("tokens", "samples", "images", "tiles")
        }
        flops = {part: result.counters[part] for part in ("language", "vision")}
        peak = peak_flops(self.precision.torch_dtype)
        elapsed = seconds["step_seconds"]
        record = {
            "step": step,
            "loss": result.metrics["loss"],
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            **counts,
            "packing_efficiency": counts["num_tokens"] / result.counters["places"],
            "tokens_per_second": counts["num_tokens"] / elapsed,
            "samples_per_second": counts["num_samples"] / elapsed,
            **seconds,
            "memory_peak_bytes": memory_peak_bytes(),
            "skipped_steps": self.counters["skipped_steps"],
            "model_flops": flops,
            "mfu": sum(flops.values()) / (elapsed * peak * dist.get_world_size()) if peak else None,
            "datasets": self.counters["datasets"],
        }
        if result.sample_ids is not None:
            record["sample_ids"] = result.sample_ids
        self.logger.step(record | result.metrics, self.max_steps)

    def _summary(self, first: int, step: int) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {
            "train_seconds": seconds,
            "steps": step,
            "samples_seen": self.counters["samples"],
            "tokens_per_second": self.counters["tokens"] / seconds,
            "num_parameters": count_parameters(self.chunks),
            "world_size": dist.get_world_size(),
            "skipped_steps": self.counters["skipped_steps"],
            "first_step": first,
        }

    def _say_payload(self, batches: list[Batch]) -> None:
        """What a model packs behind the hidden states between pipeline stages, if it does."""
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

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        """A torch profiler trace of steps [start, stop) of this process, on rank 0."""
        if self.profile is None or dist.get_rank() != 0:
            yield _NoProfiler()
            return
        start, stop = self.profile
        trace = str(self.run_dir / "profile.json")
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=start, warmup=0, active=stop - start, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(trace),
        ) as profiler:
            yield profiler


class _NoProfiler:
    def step(self) -> None:
        """Nothing is profiled."""


def finalize_model_grads(
    models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """mcore's reductions, then the sum over TP of gradients of replicated encoders.

    mcore decides by flags of the language model's config, which know nothing of an encoder whose
    tiles were dealt over the tensor-parallel ranks.
    """
    mcore_finalize_model_grads(models, num_tokens, **kwargs)
    sum_replicated_gradients(models)


def count_parameters(chunks: list[Module]) -> int:
    """Parameters of the whole model, each counted once; collective."""
    own = sum(
        piece.numel()
        for sharded in sharded_parameters(chunks)
        if sharded.is_main_replica
        for _, piece in sharded.pieces(sharded.parameter.data)
    )
    total = torch.tensor([own], dtype=torch.int64, device=next(chunks[0].parameters()).device)
    dist.all_reduce(total)
    return int(total.item())
