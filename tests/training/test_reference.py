"""The weights a run started from: the same bits at any time, and no trace in the training."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch
from nvmm.checkpoint.files import find, read_state
from nvmm.checkpoint.record import read_record, write_record
from nvmm.objectives.next_token import NextToken
from nvmm.objectives.objective import Objective, Run
from nvmm.parallel import schedule
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, build_trainer, compare, run
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from nvmm.training.reference import Reference
from tests import tiny
from tests.damage import data_byte, flip
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FP8 = {"fp8": {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "amax_history_len": 4}}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


class Preference(Objective):
    """DPO (arXiv:2305.18290) that takes a micro-batch's first row to be better than its second."""

    needs_reference = True

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        outputs = run(batches, weights="reference")
        if not outputs:
            return batches, {}
        return [
            batch.replace(extras=batch.extras | {"reference": output})
            for batch, output in zip(batches, outputs, strict=True)
        ], {}

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        gain = ((batch.extras["reference"] - output) * batch.loss_mask).sum(1)
        total = -F.logsigmoid(0.5 * (gain[0] - gain[1]))
        count = torch.tensor(1, dtype=torch.int)
        return total, count, {"loss": torch.stack([total.detach(), count.to(total.dtype)])}


class Glancing(NextToken):
    """NextToken that looks at both weights before every pass."""

    needs_reference = True

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        run(batches)
        run(batches, weights="reference")
        return batches, {}


def preference(model: dict[str, Any], **optim: Any) -> dict[str, Any]:
    return tiny.config(model, **optim) | {"objective": {"_target_": f"{__name__}.Preference"}}


# -- every layout equals one rank -------------------------------------------------------------

CONFIG = preference(tiny.language(), learning_rate=1e-2)
# Three such steps take fp32's rounding beyond what is called equal.
CONFIG |= {"precision": {"dtype": "fp64", "grad_reduce_in_fp32": False}}
LAYOUTS = {
    "tp2": Layout("TP2", 2, TP2),
    "pp2": Layout("PP2", 2, PP2),
    "pp2_vp2": Layout("PP2xVPP2", 2, VPP2),
    "dp2": Layout("DP2", 2),
    "dp2_overlap": Layout("DP2, overlapped", 2, OVERLAP),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(CONFIG, ONE_RANK, num_steps=3, weights=tmp_path_factory.mktemp("one") / "weights")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_of_both_weights_is_that_of_one_rank(layout: str, one_rank: Result) -> None:
    assert one_rank.losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert one_rank.losses[1] < 0.69
    result = run(CONFIG, LAYOUTS[layout], num_steps=3, reference=one_rank.weights)
    comparison = compare(one_rank, result)
    assert comparison.equal, str(comparison)


def keep_no_copy() -> None:
    """The reference is the current weights."""
    Reference._swap = lambda self: None  # type: ignore[method-assign]


def forget_later_chunks() -> None:
    """Virtual stages but the first run the current weights."""
    build = Reference.__init__

    def wrong(self: Any, chunks: Any, scaling: Any) -> None:
        build(self, chunks[:1], scaling)

    Reference.__init__ = wrong  # type: ignore[method-assign]


def leave_gathers_open() -> None:
    """The swap copies parameters whose other parts have not arrived."""
    from nvmm.training.trainer import Trainer

    Trainer._gathered_parameters = lambda self: contextlib.nullcontext()  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        (keep_no_copy, "dp2"),
        (forget_later_chunks, "pp2_vp2"),
        (leave_gathers_open, "dp2_overlap"),
    ],
)
def test_planted_faults_are_caught(
    fault: Callable[[], None], layout: str, one_rank: Result
) -> None:
    result = run(CONFIG, LAYOUTS[layout], num_steps=3, reference=one_rank.weights, fault=fault)
    assert compare(one_rank, result).failures[0].startswith("losses at step 2")


# -- the reference's bits, and no trace of it -------------------------------------------------


def _train(
    rank: int,
    world_size: int,
    init: str,
    layout: dict[str, Any],
    options: dict[str, Any],
    objective: str,
    fault: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Three steps; then whether the reference gives what a copy of the start gives, bit by bit."""
    if fault is not None:
        fault()
    model = tiny.language()
    model["transformer"] |= DROPOUT
    config = tiny.config(model, learning_rate=1e-2) | {"parallel": layout} | options
    config["objective"] = {"_target_": f"{__name__}.{objective}"}
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    data = SyntheticData(synthetic_steps(config, 4, 4))
    trainer = build_trainer(config, data, Path("/nowhere"), global_batch_size=8)
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    start = [p.detach().clone() for p in parameters]
    batches = trainer.batches("train", 0)
    losses = [trainer.train_step(step, next(batches)).metrics["loss"] for step in range(3)]
    scales = {n: e.data.clone() for n, e in trainer.scaling.sharded_state_dict().items()}
    if trainer.reference is None:
        return {"losses": losses, "scales": scales}
    last = next(batches)
    state = torch.get_rng_state()
    current = trainer.run(last)
    outputs = trainer.run(last, weights="reference")
    again = trainer.run(last)
    trained = [p.detach().clone() for p in parameters]
    assert all(chunk.training for chunk in trainer.chunks)
    with torch.no_grad(), trainer._gathered_parameters():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
        trainer.scaling.forget_weights()
        for chunk in trainer.chunks:
            chunk.eval()
        expected = schedule.outputs(trainer.models, last, trainer.objective.forward)
    return {
        "losses": losses,
        "moved": any(not torch.equal(a, b) for a, b in zip(trained, start, strict=True)),
        "same_reference": len(outputs) == len(expected)
        and all(map(torch.equal, outputs, expected)),
        "same_current": all(map(torch.equal, current, again)),
        "same_random": torch.equal(state, torch.get_rng_state()),
        "scales": scales,
    }


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, OVERLAP, {"precision": {"dtype": "bf16"}}),
    (2, VPP2, {}),
    (2, TP2 | {"sequence_parallel": True}, {"precision": FP8}),
    (1, {}, {"precision": FP8, "lora": tiny.lora(["*linear*"], dropout=0.2, train=["output*"])}),
]


@pytest.mark.parametrize(
    ("world_size", "layout", "options"), CASES, ids=["overlap", "vpp", "fp8", "lora"]
)
def test_it_has_the_starts_bits_and_leaves_no_trace(
    world_size: int, layout: dict[str, Any], options: dict[str, Any]
) -> None:
    results = run_ranks(_train, world_size, layout, options, "Glancing")
    for result in results:
        assert result["moved"] and result["same_random"]
        assert result["same_reference"] and result["same_current"]
    plain = run_ranks(_train, world_size, layout, options, "NextToken")
    for result, other in zip(results, plain, strict=True):
        assert result["losses"] == other["losses"]
        assert result["scales"].keys() == other["scales"].keys()
        assert all(torch.equal(x, other["scales"][name]) for name, x in result["scales"].items())


def keep_quantised_weights() -> None:
    """FP8 multiplies with the weights of the pass before."""
    build = Reference.__init__

    def wrong(self: Any, chunks: Any, scaling: Any) -> None:
        build(self, chunks, scaling)
        self.scaling = SimpleNamespace(forget_weights=lambda: None)

    Reference.__init__ = wrong  # type: ignore[method-assign]


def run_in_training_mode() -> None:
    """The reference drops, and its amaxes enter the histories."""
    from torch.nn import Module

    Module.eval = lambda self: self  # type: ignore[method-assign]


def test_faults_of_the_swap_are_caught() -> None:
    options = {"precision": FP8}
    plain = run_ranks(_train, 1, {}, options, "NextToken")[0]["scales"]
    stale = run_ranks(_train, 1, {}, options, "Glancing", keep_quantised_weights)[0]
    assert not stale["same_reference"]
    noisy = run_ranks(_train, 1, {}, options, "Glancing", run_in_training_mode)[0]["scales"]
    assert any(not torch.equal(scale, noisy[name]) for name, scale in plain.items())


def test_weights_that_are_not_kept_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"weights=reference: Asking\.needs_reference is False"):
        run_ranks(_train, 1, {}, {}, "Asking")
    with pytest.raises(RuntimeError, match="weights=base must be current or reference"):
        run_ranks(_train, 1, {}, {}, "AskingForBase")


class Asking(NextToken):
    weights = "reference"

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        run(batches, weights=self.weights)
        return batches, {}


class AskingForBase(Asking):
    weights = "base"


# -- resume -----------------------------------------------------------------------------------

STEPS = 10


def _fit(
    rank: int,
    world_size: int,
    init: str,
    run_dir: Path,
    until: int,
    layout: dict[str, Any],
    init_from: Path | None = None,
    lora: dict[str, Any] | None = None,
    objective: str = "Preference",
    fault: Callable[[], None] | None = None,
    freeze: tuple[str, ...] = (),
) -> list[Tensor]:
    """Train to a step; the reference's outputs for the first batch, then the current ones."""
    if fault is not None:
        fault()
    model = tiny.language()
    model["transformer"] |= DROPOUT
    config = preference(model, decay_steps=STEPS, freeze=list(freeze))
    config |= {"parallel": layout, "lora": lora}
    config["objective"] = {"_target_": f"{__name__}.{objective}"}
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    data = SyntheticData(synthetic_steps(config, STEPS, 2))
    run_dir.mkdir(exist_ok=True)
    trainer = build_trainer(
        config,
        data,
        run_dir,
        max_steps=until,
        log=rank == 0,
        global_batch_size=4,
        micro_batch_size=2,
        validation_interval=5,
        validation_batches=1,
        init_from=str(init_from) if init_from is not None else None,
    )
    trainer.fit()
    batches = data.steps[0]
    outputs = trainer.run(batches, weights="reference") if trainer.reference else []
    for chunk in trainer.chunks:
        chunk.eval()
    return outputs + trainer.run(batches)


def _losses(run_dir: Path) -> list[tuple[float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


def _validation(run_dir: Path) -> list[float]:
    lines = (run_dir / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["validation_loss"] for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose weights others start from."""
    path = tmp_path_factory.mktemp("base") / "run"
    run_ranks(_fit, 1, path, 2, {}, None, None, "NextToken")
    return path


@pytest.mark.parametrize(
    ("start", "world_size", "layout"),
    [
        pytest.param("seed", 1, {}, marks=pytest.mark.slow),
        pytest.param("weights", 1, {}, marks=pytest.mark.slow),
        ("weights", 2, OVERLAP),
        pytest.param("lora", 1, {}, marks=pytest.mark.slow),
    ],
    ids=["seed", "weights", "overlap", "lora"],
)
def test_five_and_five_steps_are_bit_equal_to_ten(
    tmp_path: Path, base: Path, start: str, world_size: int, layout: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    places = (None, None) if start == "seed" else (base, moved)
    lora = tiny.lora(["*linear*"], dropout=0.1, train=["output*"]) if start == "lora" else None
    expected = run_ranks(_fit, world_size, whole, STEPS, layout, places[0], lora)
    first = run_ranks(_fit, world_size, parts, 5, layout, places[1], lora)
    saved = read_state(find(parts))["reference"]
    assert saved is None if start == "seed" else saved["path"] == str(find(moved))
    second = run_ranks(_fit, world_size, parts, STEPS, layout, None, lora)
    assert _losses(parts) == _losses(whole)
    assert _validation(parts) == _validation(whole)
    for rank in range(world_size):
        assert all(map(torch.equal, second[rank], expected[rank]))
        assert all(map(torch.equal, second[rank][:2], first[rank][:2]))


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_change_the_reference(tmp_path: Path) -> None:
    """The seed's weights are taken before a checkpoint that proves damaged has loaded some."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(_fit, 1, whole, STEPS, {})
    for until in (4, 6):
        run_ranks(_fit, 1, parts, until, {})
    # Its last tensor: what lies before has been loaded by then.
    name = "optimizer.state.param.output_layer.weight"
    flip(*data_byte(find(parts), name, random.Random(1)))
    run_ranks(_fit, 1, parts, STEPS, {})
    assert find(parts).name == f"step_{STEPS:08d}"
    assert _losses(parts)[4:] == _losses(whole)[4:]


def test_the_reference_of_a_lora_run_is_its_base(tmp_path: Path, base: Path) -> None:
    lora = tiny.lora(["*linear*"], dropout=0.1, train=["output*"])
    outputs = run_ranks(_fit, 1, tmp_path / "lora", 5, {}, base, lora)[0]
    # It makes no step: these are the base's outputs.
    [plain] = run_ranks(_fit, 1, tmp_path / "plain", 0, {}, base, None, "NextToken")
    assert len(plain) == 2 and len(outputs) == 4
    assert all(map(torch.equal, outputs[:2], plain))
    assert not torch.equal(outputs[2], plain[0])


def test_another_or_unknown_reference_is_refused(tmp_path: Path, base: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    run_dir = tmp_path / "run"
    run_ranks(_fit, 1, run_dir, 1, {}, own)
    with pytest.raises(RuntimeError, match=r"optim\.freeze: \[\] -> \['embedding"):
        run_ranks(_fit, 1, run_dir, 2, {}, own, None, "Preference", None, ("embedding.*",))
    shutil.rmtree(own)
    run_ranks(_fit, 1, own, 3, {}, None, None, "NextToken")  # other weights
    with pytest.raises(
        RuntimeError, match=r"the reference that this run started from, weights of digest .* not at"
    ):
        run_ranks(_fit, 1, run_dir, 2, {}, own)
    path = find(run_dir)
    record = read_record(path)
    del record["state"]["reference"]
    write_record(path, record)
    with pytest.raises(RuntimeError, match="does not say which weights its run started from"):
        run_ranks(_fit, 1, run_dir, 2, {}, base)


def take_the_seeds_weights() -> None:
    """A resume draws the reference from the seed, whatever the run started from."""
    Reference.take_again = lambda self, path, state, moved: None  # type: ignore[method-assign]


def take_the_resumed_weights() -> None:
    """The reference is taken after the checkpoint is loaded."""
    from nvmm.training import start

    load = start.load
    references: list[Any] = []
    Reference.take_again = lambda self, path, state, moved: references.append(self)  # type: ignore[method-assign]

    def wrong(*args: Any) -> Any:
        state = load(*args)
        references[0].take(None)
        return state

    start.load = wrong


@pytest.mark.parametrize("fault", [take_the_seeds_weights, take_the_resumed_weights])
def test_faults_of_a_resume_are_caught(
    fault: Callable[[], None], tmp_path: Path, base: Path
) -> None:
    run_ranks(_fit, 1, tmp_path / "whole", 3, {}, base)
    run_ranks(_fit, 1, tmp_path / "parts", 2, {}, base)
    run_ranks(_fit, 1, tmp_path / "parts", 3, {}, base, None, "Preference", fault)
    whole, parts = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert parts[:2] == whole[:2] and parts[2] != whole[2]
