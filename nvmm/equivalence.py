"""What "every parallel layout equals one rank" means, as code: shrink, run, compare.

Equal, everywhere in this project, with dropout 0:

- every step's loss and gradient norm agree within 1e-5 relative;
- from the same weights (step 1, and the last step after loading the reference's weights) each
  parameter's whole gradient, gathered under its global name, has
  rms(g - g_ref) <= 1e-5 * max(rms(g_ref), 0.01 * rms(all reference gradients));
- every replica of a gradient (a norm weight on each TP rank, say) is the same gradient;
- the supervised tokens of all ranks' micro-batches are the reference's;
- the parameters compared are exactly the model's trainable ones.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.batch import ATTENDED, IGNORE_INDEX, IMAGE, Batch, Media
from nvmm.miniature import ONE_RANK, Layout, shrink
from nvmm.parallel import context_parallel
from nvmm.parallel.ranks import run_ranks
from nvmm.parallel.setup import Parallel

__all__ = ["ONE_RANK", "Layout", "compare", "run", "shrink"]

TOLERANCE = 1e-5
PLACEHOLDER = 508


@dataclass
class Result:
    """What one layout computed.

    losses, grad_norms: one per step. gradients: (step 1, last step) by global name.
    tokens: per rank, the supervised tokens it computed the loss of in every step.
    weights: checkpoint of the weights at the start of the last step (the reference run's).
    replica_errors: global names whose replicas disagree.
    """

    layout: Layout
    losses: list[float]
    grad_norms: list[float]
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]
    replica_errors: list[str]
    tokens: list[list[int]]
    weights: Path | None = None


@dataclass
class Comparison:
    """Verdict on two results; `failures` says what differs, worst parameters first."""

    num_parameters: int
    failures: list[str]
    worst: list[tuple[str, float]]

    @property
    def equal(self) -> bool:
        """Whether the layouts agree."""
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
    merged: bool = False,
    reference: Path | None = None,
    weights: Path | None = None,
    fault: Callable[[], None] | None = None,
    timeout: float = 300.0,
) -> Result:
    """Train a shrunk config for a few steps under a layout, on gloo ranks of this machine.

    Args:
        reference: checkpoint of the reference run's weights at the start of the last step.
        weights: where to write that checkpoint (the reference run itself).
        fault: called first on every rank; plants a fault that the comparison must find.
        packed: one packed row per micro-batch instead of padded rows.
        merged: each step's rows in one micro-batch instead of `num_micro_batches`.

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
            functools.partial(
                synthetic_steps,
                num_steps=num_steps,
                num_micro_batches=num_micro_batches,
                packed=packed,
                merged=merged,
            ),
            reference,
            fault,
            weights or Path(folder) / "weights",
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
    )


def _assemble(parts: list[list[Any]], errors: list[str]) -> dict[str, Tensor]:
    """Whole gradients from all ranks' pieces; replicas that disagree are noted in `errors`."""
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    pieces = [piece for part in parts for piece in part]
    for main_first in (True, False):
        for name, shape, offset, value, is_main in pieces:
            if is_main != main_first:
                continue
            index = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            if name not in whole:
                whole[name] = torch.zeros(shape)
                filled[name] = torch.zeros(shape, dtype=torch.bool)
            if not filled[name][index].any():
                whole[name][index] = value
                filled[name][index] = True
            elif _rms(whole[name][index] - value) > TOLERANCE * max(_rms(value), 1e-6):
                errors.append(name)
    for name, mask in filled.items():
        if not mask.all():
            errors.append(f"{name} (incomplete)")
    return whole


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _token_failures(reference: Result, other: Result) -> list[str]:
    """Steps whose supervised tokens, each counted on every rank that holds it, are not all there.

    A tensor-parallel or pipeline rank holds what its replica holds.
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


def compare(reference: Result, other: Result) -> Comparison:
    """Whether `other` equals `reference` in the sense of this module's first lines."""
    failures: list[str] = []
    for what in ("losses", "grad_norms"):
        a, b = getattr(reference, what), getattr(other, what)
        if len(a) != len(b):
            failures.append(f"{what}: {len(b)} steps, not {len(a)}")
        for step, (x, y) in enumerate(zip(a, b, strict=False), 1):
            if not abs(x - y) <= TOLERANCE * abs(x):
                failures.append(f"{what} at step {step}: {y!r}, not {x!r}")
    failures += _token_failures(reference, other)
    failures += [f"replicas differ: {name}" for name in other.replica_errors]
    worst: dict[str, float] = {}
    for moment, a, b in zip(("first", "last"), reference.gradients, other.gradients, strict=True):
        for name in sorted(a.keys() ^ b.keys()):
            side = "the reference" if name in b else other.layout.name
            failures.append(f"{moment} step: {name} is missing in {side}")
        overall = _rms(torch.cat([x.flatten() for x in a.values()]))
        for name in sorted(a.keys() & b.keys()):
            if a[name].shape != b[name].shape:
                failures.append(f"{name}: shape {tuple(b[name].shape)}, not {tuple(a[name].shape)}")
                continue
            error = _rms(a[name] - b[name]) / max(_rms(a[name]), 0.01 * overall, 1e-30)
            worst[name] = max(worst.get(name, 0.0), error)
    ranked = sorted(worst.items(), key=lambda item: -item[1])
    failures += [f"gradient of {name}: off by {e:.2e}" for name, e in ranked if not e <= TOLERANCE]
    return Comparison(len(worst), failures, ranked[:5])


@dataclass(frozen=True)
class SyntheticTokenizer:
    """Stands for the tokenizer of a run without text."""

    digest: str = "synthetic"


class SyntheticData:
    """A few steps of synthetic micro-batches behind the loader's interface."""

    log_samples = False

    def __init__(self, steps: list[list[Batch]]) -> None:
        self.steps = steps
        self.tokenizer = SyntheticTokenizer()

    def batches(self, *, rank: int, size: int, start: int, **kwargs: Any) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step, dealt as the loader deals them."""
        for step in self.steps[start:]:
            yield step[rank::size]

    def position(self, step: int) -> dict[str, int]:
        """The data's place before a step."""
        return {"step": step}

    def count(self, batches: list[Batch]) -> dict[str, float]:
        """No datasets, so no counts of them."""
        return {}

    def check_bad(self, totals: dict[str, Any]) -> None:
        """No sample is bad."""


def synthetic_steps(
    config: dict[str, Any],
    num_steps: int,
    num_micro_batches: int,
    *,
    packed: bool = False,
    merged: bool = False,
) -> list[list[Batch]]:
    """Micro-batches with images unevenly spread, some without any; ragged rows; an odd vocabulary.

    `config["attended"]` says which tiles have no placeholders but are for cross-attention.

    Every second micro-batch of odd steps has no image at all, so with two data-parallel ranks one
    sees none in the whole step; of even steps the last micro-batch has none. With `merged` the
    same rows form one micro-batch a step (no gradient accumulation). Rows and packed segments are
    padded as `config["parallel"]` needs; the tokens are the same at any layout.

    For an embedder a micro-batch is two samples of a query, its positive and a hard negative.
    """
    parallel = Parallel(**config.get("parallel", {}))
    texts = 3 if "pooling" in config["model"] else 1
    generator = torch.Generator().manual_seed(11)
    steps = []
    for step in range(num_steps):
        groups = []
        for index in range(num_micro_batches):
            bare = index % 2 == 1 if step % 2 == 0 else index == num_micro_batches - 1
            model = None if bare or "vision" not in config["model"] else config["model"]
            groups.append(
                [
                    _row(
                        generator,
                        model,
                        1 - i * (index % 2 == 0),
                        config.get("attended", "none"),
                    )
                    for i in range(2 * texts)
                ]
            )
        if merged:
            groups = [[row for group in groups for row in group]]
        steps.append(
            [_collate(rows, 100 * step + 10 * i, packed, parallel) for i, rows in enumerate(groups)]
        )
    if texts > 1:
        return [[_as_retrieval(batch) for batch in step] for step in steps]
    return steps


def _as_retrieval(batch: Batch) -> Batch:
    """Every three rows as a query, its positive and a hard negative; some masked, some alike."""
    lengths = batch.lengths[batch.lengths > 0].long()
    role = torch.arange(len(lengths)) % 3
    starts = batch.cu_seqlens[: len(role)].long() if batch.cu_seqlens is not None else 0
    rows = 0 if batch.cu_seqlens is not None else torch.arange(len(role))
    first = batch.tokens[rows, starts]
    return batch.replace(
        sample_ids=batch.sample_ids[::3],
        extras={
            "role": role,
            "pool_from": torch.where(role == 0, 3, 0),
            # Some documents are alike, also across micro-batches: false negatives.
            "document_id": first % 17,
            "text_hash": first,
            "in_batch": first % 5 != 0,
            "teacher": lengths.float() / 10,
        },
    )


@dataclass(frozen=True)
class _Row:
    """tokens [n + 1]; tiles uint8 [k, 3, size, size]; starts of the placeholders of the first of
    them; the others are attended, their tags columns [start, stop) of the text or `tags`."""

    tokens: Tensor
    starts: list[int]
    tiles: Tensor
    tokens_per_tile: int
    attended: list[tuple[int, int]]
    tags: Tensor


def _row(
    generator: torch.Generator,
    model: dict[str, Any] | None,
    least_tiles: int,
    attended: str = "none",
) -> _Row:
    count, size, per_tile = 0, 0, 0
    if model is not None:
        size = model["vision"]["image_size"]
        grid = size // model["vision"]["patch_size"] // model["connector"].get("downsample", 1)
        per_tile = grid * grid
        count = int(torch.randint(least_tiles, 4, (), generator=generator))
    # Like NVLM-D's, -H's or -X's rows: all tiles, the first one or none in the sequence.
    placed = {"none": count, "regular": min(count, 1), "all": 0}[attended]
    length = int(torch.randint(9, 14, (), generator=generator)) + placed * (per_tile + 1)
    tokens = torch.randint(0, PLACEHOLDER, (length + 1,), generator=generator)
    starts = [2 + i * (per_tile + 1) for i in range(placed)]
    for start in starts:
        tokens[start : start + per_tile] = PLACEHOLDER
    shape = (count, 3, size, size)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    in_text = attended == "all"
    spans = [(1 + 2 * i, 3 + 2 * i) if in_text else (1, 1) for i in range(count - placed)]
    tags = torch.randint(0, PLACEHOLDER, (len(spans), 0 if in_text else 2), generator=generator)
    tags[1::2, 1:] = -1  # tags of two lengths
    return _Row(tokens, starts, tiles, per_tile, spans, tags)


def _collate(rows: list[_Row], first_id: int, packed: bool, parallel: Parallel) -> Batch:
    lengths = [len(row.tokens) - 1 for row in rows]
    multiple = parallel.segment_multiple if packed else 1
    padded = [-(-length // multiple) * multiple for length in lengths]
    multiple = math.lcm(4, parallel.sequence_multiple)
    width = -(-(sum(padded) if packed else max(lengths)) // multiple) * multiple
    shape = (1 if packed else len(rows), width)
    tokens = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    position_ids = torch.arange(width).repeat(shape[0], 1)
    where: list[tuple[int, int, int, int]] = []
    outside: list[tuple[int, int, int, int, int]] = []
    bounds = [0]
    for index, row in enumerate(rows):
        line, start = (0, bounds[-1]) if packed else (index, 0)
        end = start + lengths[index]
        tokens[line, start:end] = row.tokens[:-1]
        target = row.tokens[1:].clone()
        target[target == PLACEHOLDER] = IGNORE_INDEX
        target[: 1 + index % 2] = IGNORE_INDEX  # two rows a micro-batch, also when merged
        labels[line, start:end] = target
        if packed:
            position_ids[line, start : start + padded[index]] = torch.arange(padded[index])
        where += [(line, start + s, index, tile) for tile, s in enumerate(row.starts)]
        outside += [
            (line, start + first, start + stop, index, tile)
            for tile, (first, stop) in enumerate(row.attended)
        ]
        bounds.append(start + padded[index])
    if packed and bounds[-1] < width:
        position_ids[0, bounds[-1] :] = torch.arange(width - bounds[-1])
        bounds.append(width)
        lengths.append(0)
    media = {}
    if where:
        lines, positions, samples, tiles = torch.tensor(where).unbind(1)
        with_tiles = [row for row in rows if row.starts]
        media[IMAGE] = Media(
            values=torch.cat([row.tiles[: len(row.starts)] for row in with_tiles]),
            rows=lines,
            positions=positions,
            samples=samples,
            items=torch.zeros_like(lines),
            tiles=tiles,
            placeholder_id=PLACEHOLDER,
            tokens_per_item=with_tiles[0].tokens_per_tile,
        )
    if outside:
        media[ATTENDED] = _attended(rows, torch.tensor(outside))
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        position_ids=position_ids,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        sample_ids=torch.arange(first_id, first_id + len(rows)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if packed else None,
        media=media,
    )


def _attended(rows: list[_Row], outside: Tensor) -> Media:
    """Tiles for cross-attention, two an image; outside: [n, (row, start, stop, sample, tile)]."""
    lines, positions, ends, samples, tiles = outside.unbind(1)
    with_tiles = [row for row in rows if row.attended]
    return Media(
        values=torch.cat([row.tiles[len(row.starts) :] for row in with_tiles]),
        rows=lines,
        positions=positions,
        samples=samples,
        items=tiles // 2,
        tiles=tiles % 2 + 1,
        placeholder_id=-1,
        tokens_per_item=with_tiles[0].tokens_per_tile,
        ends=ends,
        tag_ids=torch.cat([row.tags for row in with_tiles]),
    )


def build_trainer(
    config: dict[str, Any], data: Any, run_dir: Path, *, log: bool = False, **settings: Any
) -> Any:
    """A Trainer over a shrunk config in an initialised world, as the entry point builds it."""
    from hydra.utils import instantiate

    from nvmm.checkpoint import Checkpoint
    from nvmm.metrics import Logger
    from nvmm.parallel.setup import Precision
    from nvmm.trainer import Trainer

    return Trainer(
        **{"max_steps": 100, "global_batch_size": 8} | settings,
        model=instantiate(config["model"], _convert_="all"),
        objective=instantiate(config["objective"]),
        optim=instantiate(config["optim"], _convert_="all"),
        lora=instantiate(config.get("lora"), _convert_="all"),
        data=data,
        parallel=Parallel(**config.get("parallel", {})),
        precision=Precision(**config.get("precision", {})),
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
) -> dict[str, Any]:
    from nvmm.checkpoint import load_weights
    from nvmm.parallel.setup import shutdown

    if fault is not None:
        fault()
    config = config | {"parallel": layout.parallel}
    Parallel(**layout.parallel).initialize(
        seed=config["seed"], rank=rank, world_size=world_size, init_method=init_method
    )
    steps = make_steps(config)
    data = SyntheticData(steps)
    trainer = build_trainer(config, data, weights.parent, global_batch_size=4)
    batches = trainer._batches("train", 0)
    output: dict[str, Any] = {"losses": [], "grad_norms": [], "tokens": []}
    for step in range(len(steps)):
        micro_batches = next(batches)
        last = step == len(steps) - 1
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
        own = map(context_parallel.share, micro_batches)
        output["tokens"].append(sum(batch.num_tokens for batch in own))
    if reference is not None:
        missing = load_weights(next(reference.glob("step_*")), trainer.chunks)
        if missing:
            raise ValueError(f"the reference's weights lack {missing}")
        trainer.optimizer.reload_parameters()
        trainer.forward_backward(micro_batches)
        output["last"] = _gradients(trainer)
    shutdown()
    return output


def _gradients(trainer: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor, bool]]:
    """This rank's pieces of the finalised gradients, after undoing the reduce-scatter over DP."""
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    from nvmm.parallel.parameters import sharded_parameters

    for model in trainer.models:
        for buffer in model.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    return [
        (sharded.name, sharded.global_shape, offset, piece.float().clone(), sharded.is_main_replica)
        for sharded in sharded_parameters(trainer.chunks)
        if sharded.parameter.requires_grad
        for offset, piece in sharded.pieces(getattr(sharded.parameter, "main_grad"))  # noqa: B009
    ]
