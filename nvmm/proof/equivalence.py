"""The definition of "every parallel layout equals one rank" as code: shrink, run, compare.

Equal, everywhere in this project, with dropout 0:

- every step's loss and gradient norm agree within 1e-5 relative;
- from the same weights (step 1, and the last step after loading the reference's weights) each
  parameter's whole gradient, gathered under its global name, has
  rms(g - g_ref) <= 1e-5 * max(rms(g_ref), 0.01 * rms(all reference gradients));
- every replica of a gradient (a norm weight on each TP rank, say) is the same gradient;
- the supervised tokens of all ranks' micro-batches are the reference's;
- the parameters compared are exactly the model's trainable ones;
- the scales and amax histories of FP8 are the reference's, within 1e-5.

Single precision rounds by more than that where a sum cancels (the gradient of a scalar gate) or
a small temperature multiplies it: such layouts are compared in double precision. In bf16 the bound
is derived: `compare(..., rounding=)` allows twice the distance of one bf16 rank from double
precision.

FP8 is compared in double precision: in single, the rounding that layouts differ by puts a value in
millions on the other side of a rounding to three bits, and the layouts apart by more than 1e-5.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvmm.batch import Batch
from nvmm.parallel import context_parallel
from nvmm.parallel.setup import Parallel
from nvmm.proof.miniature import ONE_RANK, Layout, shrink
from nvmm.proof.ranks import run_ranks
from nvmm.proof.synthetic import SyntheticData, synthetic_steps

if TYPE_CHECKING:
    from nvmm.training.accounting import TrainingData

__all__ = ["ONE_RANK", "Layout", "compare", "run", "shrink"]

TOLERANCE = 1e-5


@dataclass
class Result:
    """The results of one layout.

    losses, grad_norms: one per step. gradients: (step 1, last step) by global name.
    tokens: per rank, the supervised tokens it computed the loss of in every step.
    weights: checkpoint of the weights at the start of the last step (the reference run's).
    scales: of FP8's delayed scaling after the last step, by their names in a checkpoint.
    replica_errors: global names whose replicas disagree.
    """

    layout: Layout
    losses: list[float]
    grad_norms: list[float]
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]
    replica_errors: list[str]
    tokens: list[list[int]]
    weights: Path | None = None
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Comparison:
    """The verdict on two results; `failures` lists the differences, worst parameters first."""

    num_parameters: int
    failures: list[str]
    worst: list[tuple[str, float]]

    @property
    def equal(self) -> bool:
        """True when the layouts agree."""
        return not self.failures

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "DIFFERENT"
        lines = [f"{verdict}: {self.num_parameters} parameters compared", *self.failures[:12]]
        return "\n  ".join(lines)


def run(
    config: dict[str, Any],
    layout: Layout,
    *,
    num_steps: int = 5,
    num_micro_batches: int = 4,
    packed: bool = False,
    merge: int = 1,
    reference: Path | None = None,
    weights: Path | None = None,
    fault: Callable[[], None] | None = None,
    make_steps: Callable[[dict[str, Any]], list[list[Batch]]] | None = None,
    timeout: float = 300.0,
) -> Result:
    """Train a shrunk config for a few steps under a layout, on gloo ranks of this machine.

    Args:
        reference: checkpoint of the reference run's weights at the start of the last step.
        weights: the directory to write that checkpoint to (the reference run itself).
        fault: called first on every rank; plants a fault that the comparison must find.
        packed: one packed row per micro-batch instead of padded rows.
        make_steps: config with the layout's sizes -> the micro-batches of every step; by default
            synthetic ones.
        merge: make one of every so many micro-batches, with the same rows.

    Returns rank-independent results. Raises RuntimeError with the traceback of a failing rank.
    """
    if layout.world_size > 4:
        raise ValueError(f"layout {layout.name}: at most 4 ranks on one machine")
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_ranks(
            _run_rank,
            layout.world_size,
            config,
            layout,
            make_steps
            or functools.partial(
                synthetic_steps,
                num_steps=num_steps,
                num_micro_batches=num_micro_batches,
                packed=packed,
                merge=merge,
            ),
            reference,
            fault,
            weights or Path(folder) / "weights",
            num_micro_batches,
            timeout=timeout,
        )
    errors: list[str] = []
    gradients = tuple(_assemble([out[key] for out in outputs], errors) for key in ("first", "last"))
    return Result(
        layout=layout,
        losses=outputs[0]["losses"],
        grad_norms=outputs[0]["grad_norms"],
        gradients=gradients,  # type: ignore[arg-type]
        replica_errors=sorted(set(errors)),
        tokens=[out["tokens"] for out in outputs],
        weights=weights,
        scales={name: value for out in outputs for name, value in out["scales"].items()},
    )


def _assemble(parts: list[list[Any]], errors: list[str]) -> dict[str, Tensor]:
    """Assemble whole gradients from all ranks' pieces; note replicas that disagree in `errors`."""
    gradients: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    pieces = [piece for part in parts for piece in part]
    for main_first in (True, False):
        for name, shape, offset, value, is_main in pieces:
            if is_main != main_first:
                continue
            index = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            if name not in gradients:
                gradients[name] = torch.zeros(shape)
                filled[name] = torch.zeros(shape, dtype=torch.bool)
            if not filled[name][index].any():
                gradients[name][index] = value
                filled[name][index] = True
            elif _rms(gradients[name][index] - value) > TOLERANCE * max(_rms(value), 1e-6):
                errors.append(name)
    for name, mask in filled.items():
        if not mask.all():
            errors.append(f"{name} (incomplete)")
    return gradients


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _token_failures(reference: Result, other: Result) -> list[str]:
    """List the steps whose supervised tokens are not all there.

    Each token is counted on every rank that holds it: all tensor-parallel and pipeline ranks of a
    replica hold the same ones.
    """
    sizes = other.layout.parallel
    copies = sizes.get("tensor_model_parallel_size", 1) * sizes.get(
        "pipeline_model_parallel_size", 1
    )
    failures = []
    steps = zip(reference.tokens[0], zip(*other.tokens, strict=True), strict=False)
    for step, (expected, held) in enumerate(steps, 1):
        if sum(held) != expected * copies:
            counts = ", ".join(map(str, held))
            failures.append(f"tokens at step {step}: {counts} on the ranks, {expected} in all")
    return failures


def _scale_failures(reference: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    names = sorted(reference.keys() | other.keys())
    absent = [name for name in names if name not in reference or name not in other]
    return [f"scale {name} is missing on one side" for name in absent] + [
        f"scale {name} differs"
        for name in names
        if name not in absent
        and not torch.allclose(other[name], reference[name], rtol=TOLERANCE, atol=0)
    ]


def compare(reference: Result, other: Result, rounding: Result | None = None) -> Comparison:
    """Compare `other` with `reference` in the sense of this module's first lines.

    rounding: one rank in the low precision of `other`, where `reference` is one rank in double
        precision. Bounds are then twice its own distances from the reference: those of losses and
        norms twice the largest of all steps, those of gradients twice the parameter's, or twice
        all parameters' root mean square where that is more. Replicas must still agree.
    """
    failures: list[str] = []
    scalars, bounds = _bounds(reference, rounding)
    # 1. Losses and norms of every step, tokens, replicas and scales.
    for what in ("losses", "grad_norms"):
        a, b = getattr(reference, what), getattr(other, what)
        if len(a) != len(b):
            failures.append(f"{what}: {len(b)} steps, not {len(a)}")
        for step, (x, y) in enumerate(zip(a, b, strict=False), 1):
            if not abs(x - y) <= scalars[what] * abs(x):
                failures.append(f"{what} at step {step}: {y!r}, not {x!r}")
    failures += _token_failures(reference, other)
    failures += [f"replicas differ: {name}" for name in other.replica_errors]
    failures += _scale_failures(reference.scales, other.scales)
    # 2. Every parameter's gradient, relative to its own size, but not to less than a hundredth of
    # all gradients': a parameter that hardly learns must not fail by its rounding.
    for moment, a, b in zip(("first", "last"), reference.gradients, other.gradients, strict=True):
        for name in sorted(a.keys() ^ b.keys()):
            side = "the reference" if name in b else other.layout.name
            failures.append(f"{moment} step: {name} is missing in {side}")
        for name in sorted(a.keys() & b.keys()):
            if a[name].shape != b[name].shape:
                failures.append(f"{name}: shape {tuple(b[name].shape)}, not {tuple(a[name].shape)}")
    worst = _errors(reference, other)
    ranked = sorted(worst.items(), key=lambda item: -item[1])
    failures += [
        f"gradient of {name}: off by {error:.2e}"
        for name, error in ranked
        if not error <= bounds.get(name, TOLERANCE)
    ]
    return Comparison(len(worst), failures, ranked[:5])


def _errors(reference: Result, other: Result) -> dict[str, float]:
    """Return the larger relative error of each parameter's two gradients that both sides have."""
    worst: dict[str, float] = {}
    for a, b in zip(reference.gradients, other.gradients, strict=True):
        overall = _rms(torch.cat([x.flatten() for x in a.values()]))
        for name in sorted(a.keys() & b.keys()):
            if a[name].shape == b[name].shape:
                error = _rms(a[name] - b[name]) / max(_rms(a[name]), 0.01 * overall, 1e-30)
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _bounds(
    reference: Result, rounding: Result | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bounds of losses and norms, and those of gradients that are not TOLERANCE."""
    if rounding is None:
        return dict.fromkeys(("losses", "grad_norms"), TOLERANCE), {}
    scalars = {
        what: 2
        * max(
            abs(x - y) / abs(x)
            for x, y in zip(getattr(reference, what), getattr(rounding, what), strict=True)
        )
        for what in ("losses", "grad_norms")
    }
    errors = _errors(reference, rounding)
    typical = math.sqrt(fmean(error**2 for error in errors.values()))
    return scalars, {name: 2 * max(error, typical) for name, error in errors.items()}


def build_trainer(
    config: dict[str, Any], data: TrainingData, run_dir: Path, *, log: bool = False, **settings: Any
) -> Any:
    """Build a Trainer over a shrunk config in an initialised world, as the entry point does."""
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.config.compose import instantiate
    from nvmm.training.logger import Logger
    from nvmm.training.trainer import Trainer

    return Trainer(
        **{"max_steps": 100, "global_batch_size": 8} | settings,
        model=instantiate(config["model"]),
        objective=instantiate(config["objective"]),
        optim=instantiate(config["optim"]),
        lora=instantiate(config.get("lora")),
        data=data,
        parallel=Parallel(**config.get("parallel", {})),
        precision=instantiate(
            {"_target_": "nvmm.parallel.setup.Precision", **config.get("precision", {})}
        ),
        checkpoint=Checkpoint(save_interval=None, directory=run_dir / "checkpoints"),
        logger=Logger(run_dir=run_dir, config=config, run_name="equivalence", enabled=log),
        run_dir=run_dir,
        config=config,
        backend=config["backend"],
        seed=config["seed"],
    )


def _run_rank(
    rank: int,
    world_size: int,
    init_method: str,
    config: dict[str, Any],
    layout: Layout,
    make_steps: Callable[[dict[str, Any]], list[list[Batch]]],
    reference: Path | None,
    fault: Callable[[], None] | None,
    weights: Path,
    num_micro_batches: int,
) -> dict[str, Any]:
    from nvmm.checkpoint.load import load_scales, load_weights
    from nvmm.config.compose import instantiate
    from nvmm.parallel.setup import shutdown

    if fault is not None:
        fault()
    if config.get("kernels"):
        instantiate(config["kernels"]).install(log=False)
    config = config | {"parallel": layout.parallel}
    Parallel(**layout.parallel).initialize(
        seed=config["seed"], rank=rank, world_size=world_size, init_method=init_method
    )
    # 1. A trainer on synthetic steps, which this rank reads as it would read data.
    steps = make_steps(config)
    data = SyntheticData(steps)
    trainer = build_trainer(config, data, weights.parent, global_batch_size=num_micro_batches)
    batches = trainer.batches("train", 0)
    output: dict[str, Any] = {"losses": [], "grad_norms": [], "tokens": []}
    for step in range(len(steps)):
        micro_batches = next(batches)
        last = step == len(steps) - 1
        # 2. The reference run saves the weights that its last step starts from.
        if last and reference is None:
            trainer.checkpoint.directory = weights
            trainer.save(step)
        loss = trainer.forward_backward(micro_batches)["loss"]
        if step == 0:
            output["first"] = _gradients(trainer)
        if last and reference is None:
            output["last"] = _gradients(trainer)
        output["losses"].append(loss)
        output["grad_norms"].append(trainer.update(step, loss, micro_batches)[0])
        local_batches = map(context_parallel.share, micro_batches)
        output["tokens"].append(sum(batch.num_tokens for batch in local_batches))
    scales = trainer.scaling.sharded_state_dict()
    output["scales"] = {name: entry.data.clone() for name, entry in scales.items()}
    # 3. Another layout takes its last gradients from the reference's weights: its own have drifted
    # from them by rounding.
    if reference is not None:
        path = next(reference.glob("step_*"))
        missing = load_weights(path, trainer.chunks)
        load_scales(path, trainer.scaling)
        if missing:
            raise ValueError(f"the reference's weights lack {missing}")
        trainer.optimizer.reload_parameters()
        trainer.forward_backward(micro_batches)
        output["last"] = _gradients(trainer)
    shutdown()
    return output


def _gradients(trainer: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor, bool]]:
    """Return this rank's pieces of the finalised gradients, after undoing DP's reduce-scatter."""
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    from nvmm.parallel.parameters import sharded_parameters

    for model in trainer.models:
        for buffer in model.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    return [
        (sharded.name, sharded.global_shape, offset, piece.float().clone(), sharded.is_main_replica)
        for sharded in sharded_parameters(trainer.chunks)
        if sharded.parameter.requires_grad
        for offset, piece in sharded.pieces(getattr(sharded.parameter, "main_grad"))  # noqa: B009
    ]
