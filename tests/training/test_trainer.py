"""The training loop: exact resume on any layout, signals, non-finite steps, missing gradients."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nvmm.batch import Batch
from nvmm.checkpoint.record import write_record
from nvmm.objectives.contrastive import Contrastive
from nvmm.objectives.next_token import NextToken
from nvmm.objectives.objective import Objective
from nvmm.parallel import generators
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import build_trainer
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from nvmm.training.start import changed_rates, require_unchanged
from tests import tiny
from tests.ranks import run_ranks

STEPS = 10
GROUPS = [{"pattern": "*mlp*", "learning_rate": 5e-4, "weight_decay": 0.05}]
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


class Data(SyntheticData):
    """Synthetic steps that note which samples were read."""

    def __init__(self, steps: list[list[Batch]], poison: int | None = None) -> None:
        super().__init__(steps)
        self.poison = poison
        self.read: list[list[int]] = []

    def batches(self, *, split: str, **kwargs: Any) -> Iterator[list[Batch]]:
        if split == "validation":
            yield from super().batches(**kwargs | {"start": 0})
        for number, step in enumerate(super().batches(**kwargs), kwargs["start"]):
            self.read.append([i for batch in step for i in batch.sample_ids.tolist()])
            if number == self.poison:
                step = [b.replace(loss_mask=b.loss_mask * float("inf")) for b in step]
            yield step


def _fit(
    rank: int,
    world_size: int,
    init: str,
    run_dir: Path,
    max_steps: int,
    layout: dict[str, Any],
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    options = dict(options or {})
    model = tiny.language()
    model["transformer"] |= options.pop("transformer", {})
    config = tiny.config(model, groups=GROUPS, **options.pop("optim", {})) | {"parallel": layout}
    config["precision"] = options.pop("precision", {})
    Parallel(**layout).initialize(
        seed=config["seed"], rank=rank, world_size=world_size, init_method=init
    )
    steps = synthetic_steps(config, STEPS, 4)
    data = Data(steps, options.pop("poison", None))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nvmm").addHandler(handler)
    logging.getLogger("nvmm").setLevel(logging.INFO)
    run_dir.mkdir(exist_ok=True)
    hook = options.pop("hook", None)
    # Decay to the same end whatever the number of steps of this part.
    config["optim"]["decay_steps"] = STEPS
    trainer = build_trainer(
        config,
        data,
        run_dir,
        max_steps=max_steps,
        log=rank == 0,
        global_batch_size=8,
        micro_batch_size=2,
        **options,
    )
    if hook is not None:
        hook(trainer, rank)
    summary = trainer.fit(started=lambda: (run_dir / "started").write_text(str(max_steps)))
    return {"summary": summary, "read": data.read, "messages": messages}


def _losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


def _state(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    file = run_dir / f"checkpoints/step_{step:08d}/state.json"
    state: dict[str, Any] = json.loads(file.read_text())["state"]
    return state


def test_five_and_five_steps_are_bit_equal_to_ten(tmp_path: Path) -> None:
    dropout = {"transformer": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
    for number, (world_size, layout) in enumerate(((1, {}), (2, {}), (2, CP2))):
        whole, parts = tmp_path / f"whole{number}", tmp_path / f"parts{number}"
        expected = run_ranks(_fit, world_size, whole, STEPS, layout, dropout)
        first = run_ranks(_fit, world_size, parts, 5, layout, dropout)
        second = run_ranks(_fit, world_size, parts, STEPS, layout, dropout)
        assert _losses(parts) == _losses(whole)
        for rank in range(world_size):
            read = first[rank]["read"] + second[rank]["read"]
            assert read == expected[rank]["read"]
            assert len(read) == STEPS
        assert second[0]["summary"]["samples_seen"] == expected[0]["summary"]["samples_seen"] == 80
        counters = [_state(run_dir)["counters"] for run_dir in (whole, parts)]
        assert counters[0] == counters[1]
        assert counters[0]["tokens"] > _state(parts, 5)["counters"]["tokens"] > 0
        assert any("resuming" in m and "step_00000005" in m for m in second[0]["messages"])


def test_resume_across_layouts_equals_one_rank(tmp_path: Path) -> None:
    run_ranks(_fit, 1, tmp_path / "whole", STEPS, {})
    stages = [(1, {}, 2), (2, TP2, 4), (2, PP2, 6), (2, CP2, 7), (2, {}, 8), (2, TP2, STEPS)]
    for world_size, layout, until in stages:
        run_ranks(_fit, world_size, tmp_path / "parts", until, layout)
    expected, found = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert [row[0] for row in found] == list(range(1, STEPS + 1))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", [{}, CP2], ids=["dp2", "cp2"])
def test_metrics_have_every_field(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Replicas count each batch once, whichever ranks of them share its sequence."""
    options = {"validation_interval": 2, "validation_batches": 1}
    run_ranks(_fit, 2, tmp_path, 2, layout, options)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "step": 2,
        "num_samples": 8,
        "media": {},
        "skipped_steps": 0,
        "mfu": None,
    }
    assert record | expected == record
    batches = synthetic_steps(tiny.config(tiny.language()) | {"parallel": layout}, 2, 4)[1]
    assert record["num_tokens"] == sum(int(batch.lengths.sum()) for batch in batches)
    places = sum(batch.tokens.numel() for batch in batches)
    assert record["packing_efficiency"] == record["num_tokens"] / places < 1
    assert record["model_flops"].keys() == {"language"} and record["model_flops"]["language"] > 0
    for name in ("tokens_per_second", "samples_per_second", "step_seconds", "memory_peak_bytes"):
        assert record[name] > 0
    for name in ("learning_rate", "data_wait_seconds", "checkpoint_stall_seconds"):
        assert record[name] >= 0
    validation = json.loads((tmp_path / "validation.jsonl").read_text())
    assert validation["step"] == 2
    assert validation["validation_loss"] > 0


def test_non_finite_steps_stop_or_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step 3: loss (inf|nan).*samples of this rank"):
        run_ranks(_fit, 2, tmp_path / "stop", 5, {}, {"poison": 2})
    options = {"poison": 2, "on_nonfinite": "skip"}
    result = run_ranks(_fit, 1, tmp_path / "skip", 5, {}, options)[0]
    assert result["summary"]["skipped_steps"] == 1
    records = [json.loads(x) for x in (tmp_path / "skip/metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 1, 1]
    assert records[2]["loss"] is None
    assert records[4]["loss"] > 0


class Spoiled(NextToken):
    """Next-token loss that says infinity in some steps, though its gradients are finite."""

    steps: tuple[int, ...] = ()
    step = -1

    def prepare(self, run: Any, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        self.step += 1
        return batches, {"loss": math.inf} if self.step in self.steps else {}


def _spoil(
    trainer: Any, rank: int, *, steps: tuple[int, ...], keep_last: int | None = None
) -> None:
    trainer.objective = Spoiled()
    trainer.objective.steps = steps
    if keep_last is not None:
        trainer.checkpoint.save_interval, trainer.checkpoint.keep_last = 1, keep_last


def _weights_of(trainer: Any, rank: int, *, steps: tuple[int, ...], folder: Path) -> None:
    """Keep the weights before and after the spoiled step."""
    _spoil(trainer, rank, steps=steps)
    train_step = trainer.train_step

    def watched(step: int, *args: Any, **kwargs: Any) -> Any:
        before = {n: p.detach().clone() for n, p in trainer.chunks[0].named_parameters()}
        result = train_step(step, *args, **kwargs)
        after = dict(trainer.chunks[0].named_parameters())
        same = all(torch.equal(before[name], after[name]) for name in before)
        with (folder / "seen.jsonl").open("a") as file:
            file.write(json.dumps([step, same, math.isfinite(result.grad_norm)]) + "\n")
        return result

    trainer.train_step = watched


def test_a_step_of_non_finite_loss_and_finite_norm_is_not_applied(tmp_path: Path) -> None:
    hook = partial(_weights_of, steps=(1,), folder=tmp_path)
    run_ranks(_fit, 1, tmp_path, 3, {}, {"hook": hook, "on_nonfinite": "skip"})
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert seen == [[0, False, True], [1, True, True], [2, False, True]]


@pytest.mark.parametrize(
    ("options", "steps", "says"),
    [
        ({"max_consecutive_skips": 2}, (1, 2, 3), "step 4: .*3 steps were skipped in a row, more"),
        ({"max_skips": 2}, (0, 2, 4), "step 5: .*3 steps were skipped in all, .*max_skips=2"),
    ],
)
def test_skipped_steps_are_bounded(
    tmp_path: Path, options: dict[str, Any], steps: tuple[int, ...], says: str
) -> None:
    options = {"on_nonfinite": "skip", "hook": partial(_spoil, steps=steps), **options}
    with pytest.raises(RuntimeError, match=says):
        run_ranks(_fit, 2, tmp_path, STEPS, {}, options)


def test_seven_of_eight_skipped_steps_end_a_run_by_default(tmp_path: Path) -> None:
    hook = partial(_spoil, steps=tuple(range(1, 8)))
    with pytest.raises(RuntimeError, match="6 steps were skipped in a row"):
        run_ranks(_fit, 1, tmp_path, 8, {}, {"on_nonfinite": "skip", "hook": hook})


def test_the_count_in_a_row_goes_on_over_a_resume(tmp_path: Path) -> None:
    options = {"on_nonfinite": "skip", "max_consecutive_skips": 2}
    run_ranks(_fit, 1, tmp_path, 3, {}, options | {"hook": partial(_spoil, steps=(1, 2))})
    with pytest.raises(RuntimeError, match=r"step 4: .*3 steps were skipped in a row"):
        run_ranks(_fit, 1, tmp_path, 5, {}, options | {"hook": partial(_spoil, steps=(0,))})


def test_skipped_stretches_push_no_good_checkpoint_out(tmp_path: Path) -> None:
    hook = partial(_spoil, steps=(2, 3), keep_last=1)
    run_ranks(_fit, 1, tmp_path, 4, {}, {"on_nonfinite": "skip", "hook": hook})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


def _interrupt(trainer: Any, rank: int, number: int = signal.SIGUSR1) -> None:
    """Rank 1 alone (the only one, of one) gets a signal during its third step."""
    step = trainer.train_step

    def interrupted(step_number: int, *args: Any, **kwargs: Any) -> Any:
        if step_number == 2 and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)
        return step(step_number, *args, **kwargs)

    trainer.train_step = interrupted


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_on_one_rank_saves_and_ends_all(tmp_path: Path, number: int) -> None:
    hook = partial(_interrupt, number=number)
    results = run_ranks(_fit, 2, tmp_path, STEPS, {}, {"hook": hook})
    assert [r["summary"]["steps"] for r in results] == [3, 3]
    assert (tmp_path / "checkpoints/step_00000003/state.json").exists()
    assert any("stopped at step 3" in m for m in results[0]["messages"])


def test_max_minutes_saves_and_ends(tmp_path: Path) -> None:
    result = run_ranks(_fit, 1, tmp_path, STEPS, {}, {"max_minutes": 0.0})[0]
    assert result["summary"]["steps"] == 1
    assert (tmp_path / "checkpoints/step_00000001").exists()


def test_resume_never_and_another_model_are_refused(tmp_path: Path) -> None:
    run_ranks(_fit, 1, tmp_path, 1, {})
    with pytest.raises(RuntimeError, match=r"resume=never, but .* already has step_00000001"):
        run_ranks(_fit, 1, tmp_path, 2, {}, {"resume": "never"})
    with pytest.raises(
        RuntimeError, match=r"model\.transformer\.layernorm_epsilon: 1e-06 -> 1e-05"
    ):
        run_ranks(_fit, 1, tmp_path, 2, {}, {"transformer": {"layernorm_epsilon": 1e-5}})
    assert (tmp_path / "started").read_text() == "1"
    result = run_ranks(_fit, 1, tmp_path, 2, {}, {"optim": {"clip_grad": 2.0}})[0]
    assert "changed since step_00000001: optim.clip_grad: 1.0 -> 2.0" in result["messages"]


def test_a_finished_run_writes_nothing_and_refuses_other_values(tmp_path: Path) -> None:
    run_ranks(_fit, 1, tmp_path, 2, {})
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run_ranks(_fit, 1, tmp_path, 2, {})[0]
    assert result["summary"]["steps"] == result["summary"]["first_step"] == 2
    [message] = [m for m in result["messages"] if m.startswith("nothing left to do")]
    assert "is at step 2 of trainer.max_steps=2" in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_what_a_finished_run_refuses(tmp_path: Path) -> None:
    optim = {"_target_": "nvmm.training.optim.Optim", "learning_rate": 1e-3}
    saved = {"trainer": {"max_steps": 2}, "optim": optim, "parallel": {}}
    record = {"step": 2, "layout": {}, "optimizer": {"steps": 2}, "number": 1}
    write_record(tmp_path, record | {"state": {"step": 2, "config": saved}})
    other = saved | {"optim": optim | {"learning_rate": 9e-4}}
    with pytest.raises(ValueError, match=r"rate: 0\.001 -> 0\.0009\n.*give this run a run"):
        require_unchanged(tmp_path, other)
    for allowed in (saved, saved | {"parallel": TP2}, other | {"trainer": {"max_steps": 3}}):
        assert require_unchanged(tmp_path, allowed)["step"] == 2
    with pytest.raises(ValueError, match=r"another model:\n  seed: None -> 3"):
        require_unchanged(tmp_path, saved | {"seed": 3})


def test_a_longer_run_says_its_learning_rates() -> None:
    saved = {"trainer": {"max_steps": 10}, "optim": {"learning_rate": 1.0, "schedule": "linear"}}
    longer = saved | {"trainer": {"max_steps": 20}}
    assert changed_rates(saved, longer, 5) == (
        "learning rate of step 6: 0.5 -> 0.75 (the schedule ends at step 10 -> step 20)"
    )
    assert changed_rates(saved, saved, 5) is None
    fixed = {"optim": saved["optim"] | {"decay_steps": 10}}
    assert changed_rates(saved | fixed, longer | fixed, 5) is None
    by_tokens = {"optim": saved["optim"] | {"warmup_tokens": 0}, "data": {"sequence_length": 8}}
    small, large = (
        by_tokens | {"trainer": {"max_steps": 10, "global_batch_size": 4, "batch_ramp": ramp}}
        for ramp in ([], [{"global_batch_size": 2, "steps": 4}])
    )
    assert changed_rates(small, large, 5) == (
        "learning rate of step 6: 0.5 -> 0.625 (the schedule ends at token 320 -> token 256)"
    )
    groups = {"optim": saved["optim"] | {"groups": [{"pattern": "a", "learning_rate": 2.0}]}}
    assert "0.5 -> 0.75, 1 -> 1.5 (" in str(changed_rates(saved | groups, longer | groups, 5))


def test_init_from_loads_weights_and_lists_the_rest(tmp_path: Path) -> None:
    run_ranks(_fit, 1, tmp_path / "first", 3, {})
    path = str(tmp_path / "first/checkpoints/step_00000003")
    options = {"init_from": path, "transformer": {"add_bias_linear": True}}
    result = run_ranks(_fit, 2, tmp_path / "second", 1, TP2, options)[0]
    [message] = [m for m in result["messages"] if m.startswith("weights from")]
    assert "mlp.linear_fc1.bias" in message
    assert "linear_fc1.weight" not in message


def _stand_still(trainer: Any, rank: int) -> None:
    """Steps at a learning rate of 0."""
    trainer.optimizer.set_step = lambda step: 0.0
    for group in trainer.optimizer.mcore.param_groups:
        group["lr"] = 0.0


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_init_from_gives_the_masters_too(tmp_path: Path, dtype: str) -> None:
    """A step writes the masters into the weights: those of the random start would undo the load."""
    run_ranks(_fit, 1, tmp_path / "first", 2, {}, {"precision": {"dtype": dtype}})
    path = tmp_path / "first/checkpoints/step_00000002"
    options = {"init_from": str(path), "precision": {"dtype": dtype}, "hook": _stand_still}
    run_ranks(_fit, 2, tmp_path / "second", 1, {}, options)
    second = tmp_path / "second/checkpoints/step_00000001"
    first, found = (json.loads((p / "weights.json").read_text()) for p in (path, second))
    assert found == first


def test_a_resume_says_that_another_layout_changes_the_loss(tmp_path: Path) -> None:
    """Where the objective compares samples with each other and not all of the batch's; and that
    a template's file has another text."""
    options = {"hook": _compare_a_ranks_samples}
    run_ranks(_fit, 1, tmp_path, 1, {}, options)
    message = (
        "samples in one loss (objective, trainer.micro_batch_size, data-parallel ranks): 8 -> 4"
    )
    messages = run_ranks(_fit, 2, tmp_path, 2, {}, options)[0]["messages"]
    assert f"changed since step_00000001: {message}" in messages
    changed = "template of train (digest): 'of 1 ranks' -> 'of 2 ranks'"
    assert f"changed since step_00000001: {changed}" in messages
    messages = run_ranks(_fit, 2, tmp_path, 3, TP2, options)[0]["messages"]
    assert f"changed since step_00000002: {message.replace('8 -> 4', '4 -> 8')}" in messages
    assert not any("template" in text for text in messages)


def _compare_a_ranks_samples(trainer: Any, rank: int) -> None:
    trainer.objective.samples_in_loss = Contrastive(cross_rank_negatives=False).samples_in_loss
    trainer.config["trainer"] = {"global_batch_size": 8, "micro_batch_size": 2}
    trainer.data.template_digests = {"train": f"of {dist.get_world_size()} ranks"}


@pytest.mark.slow
def test_generators_after_a_resume_at_another_layout(tmp_path: Path) -> None:
    """They are new ones, the same at every such resume; ranks differ as in a new run."""
    run_ranks(_fit, 1, tmp_path / "run", 1, {})
    states = {}
    for name, layout in (("dp2", {}), ("again", {}), ("tp2", TP2)):
        options = {"hook": functools.partial(_note_generators, tmp_path / name)}
        run_ranks(_fit, 2, tmp_path / "run", 1, layout, options)
        states[name] = [json.loads((tmp_path / f"{name}{rank}").read_text()) for rank in range(2)]
    fresh = {"hook": functools.partial(_note_generators, tmp_path / "fresh")}
    run_ranks(_fit, 2, tmp_path / "fresh_run", 0, {}, fresh)
    states["fresh"] = [json.loads((tmp_path / f"fresh{rank}").read_text()) for rank in range(2)]
    assert states["dp2"] == states["again"]
    for name in ("device", "tracker"):
        kept = [states[kind][rank][name] for kind in ("dp2", "fresh") for rank in range(2)]
        assert all(a != b for a, b in itertools.combinations(kept, 2)), name
    first, second = states["tp2"]
    assert first["device"] == second["device"] and first["tracker"] != second["tracker"]


def _note_generators(path: Path, trainer: Any, rank: int) -> None:
    start = trainer._start

    def noting() -> int:
        step: int = start()
        Path(f"{path}{rank}").write_bytes(generators.capture().numpy().tobytes())
        return step

    trainer._start = noting


def _detach(trainer: Any, rank: int) -> None:
    """A fault: layer 1 sees an input that is cut from the graph."""
    layer = trainer.chunks[0].decoder.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden_states, **kw: forward(hidden_states=hidden_states.detach(), **kw)


def test_a_parameter_that_is_used_but_gets_no_gradient_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"got no gradient: decoder\.layers\.0\.mlp"):
        run_ranks(_fit, 1, tmp_path, 2, {}, {"hook": _detach})


@pytest.mark.parametrize(
    "freeze",
    [["embedding.*"], ["embedding.*", "decoder.*norm*", "*bias", "*qkv*", "*proj*", "output*"]],
    ids=["embedding", "one linear"],
)
def test_full_recompute_behind_a_frozen_embedding_trains(tmp_path: Path, freeze: list[str]) -> None:
    optim = {"optim": {"freeze": freeze}}
    run_ranks(_fit, 1, tmp_path / "plain", 3, {}, optim)
    run_ranks(_fit, 1, tmp_path / "recompute", 3, {"recompute_granularity": "full"}, optim)
    plain, recomputed = _losses(tmp_path / "plain"), _losses(tmp_path / "recompute")
    for expected, found in zip(plain, recomputed, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert plain[0][2] > 0


def test_bf16_trains_on_the_cpu(tmp_path: Path) -> None:
    result = run_ranks(_bf16, 2, tmp_path)[0]
    assert result[0] == "torch.bfloat16"
    assert result[1] == pytest.approx(result[2], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "reduced"),
    [({"dtype": "bf16"}, torch.float32), ({"dtype": "bf16", "grad_reduce_in_fp32": False}, None)],
)
def test_bf16_is_every_weight_s_and_fp32_the_sums_of_gradients(
    tmp_path: Path, precision: dict[str, Any], reduced: torch.dtype | None
) -> None:
    """Encoder, connector, cross-attention and adapters; no gradient rounds while it adds up."""
    [(weights, gradients, pixels, features)] = run_ranks(_dtypes, 1, tmp_path, precision)
    assert set(weights.values()) == {torch.bfloat16}
    assert {name.split(".")[0] for name in weights} == {"language", "vision", "connector"}
    assert any("_lora" in name for name in weights)
    assert set(gradients.values()) == {reduced or torch.bfloat16}
    assert (pixels, features) == (torch.bfloat16, torch.bfloat16)


def _dtypes(rank: int, world_size: int, init: str, run_dir: Path, precision: dict[str, Any]) -> Any:
    config = tiny.config(tiny.cross_attending(), attended="all") | {"precision": precision}
    config["lora"] = tiny.lora(["*linear*"], train=["*gate", "connector.*"])
    Parallel().initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    [batches] = synthetic_steps(config, 1, 1)
    trainer = build_trainer(config, Data([batches]), run_dir, global_batch_size=2)
    model = trainer.chunks[0]
    seen: dict[str, torch.dtype] = {}
    model.vision.decoder.register_forward_hook(
        lambda module, inputs, output: seen.update(features=output.dtype)
    )
    model.vision.conv1.register_forward_pre_hook(
        lambda module, inputs: seen.update(pixels=inputs[0].dtype)
    )
    trainer.forward_backward(batches)
    weights = {name: p.dtype for name, p in model.named_parameters()}
    gradients = {n: p.main_grad.dtype for n, p in model.named_parameters() if p.requires_grad}
    return weights, gradients, seen["pixels"], seen["features"]


def test_the_loader_is_asked_for_rows_that_fit_layout_and_precision(tmp_path: Path) -> None:
    """FP8 under sequence parallelism wants whole blocks on every rank, context parallelism two
    chunks; a segment is asked for the latter alone."""
    fp8 = {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "recipe": "mxfp8"}
    fp8_precision = {"precision": {"dtype": "bf16", "fp8": fp8}}
    sp = TP2 | {"sequence_parallel": True}
    for layout, options, rows, segments in (
        (sp, fp8_precision, 64, 1),
        (CP2, {}, 4, 4),
    ):
        asked = run_ranks(_asked, 2, tmp_path, layout, options)[0]
        assert asked == {"pad_multiple": rows, "segment_multiple": segments}


def _asked(
    rank: int,
    world_size: int,
    init: str,
    run_dir: Path,
    layout: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, int]:
    model = tiny.language()
    model["transformer"] |= {"hidden_size": 128, "kv_channels": 32, "ffn_hidden_size": 128}
    config = tiny.config(model) | {"parallel": layout} | options
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    asked: dict[str, int] = {}

    class Asked(Data):
        def batches(self, **kwargs: Any) -> Iterator[list[Batch]]:
            asked.update(kwargs)
            yield from super().batches(**kwargs)

    data = Asked(synthetic_steps(config | {"row_multiple": 64}, 1, 2))
    trainer = build_trainer(config, data, run_dir, global_batch_size=4)
    next(trainer.batches("train", 0))
    return {name: asked[name] for name in ("pad_multiple", "segment_multiple") if name in asked}


def _bf16(rank: int, world_size: int, init: str, run_dir: Path) -> tuple[str, float, float]:
    config = tiny.config(tiny.language()) | {"parallel": TP2}
    Parallel(**TP2).initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    batches = synthetic_steps(config, 1, 2)
    losses = []
    for dtype in ("bf16", "fp32"):
        precision = {"precision": {"dtype": dtype}}
        trainer = build_trainer(config | precision, Data(batches), run_dir, global_batch_size=4)
        loss = trainer.forward_backward(batches[0])["loss"]
        trainer.update(0, loss, batches[0])
        losses.append(loss)
        if dtype == "bf16":
            found = str(next(trainer.chunks[0].parameters()).dtype)
    return found, losses[0], losses[1]


def _read(
    rank: int, world_size: int, init: str, config: dict[str, Any], extras: list[str], split: str
) -> str:
    """Read the first batch, with these extras, at PP 2; the refusal, if there is one."""
    config = config | {"parallel": PP2}
    Parallel(**PP2).initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    [[batch]] = synthetic_steps(config, 1, 1)
    data = Data([[batch.replace(extras={name: torch.zeros(6) for name in extras})]])
    trainer = build_trainer(config, data, Path("/nowhere"), global_batch_size=2)
    try:
        next(trainer.batches(split, 0))
    except ValueError as refusal:
        return str(refusal)
    return ""


RETRIEVAL = sorted([*Contrastive.extras, "pool_from"])


@pytest.mark.parametrize(
    ("config", "extras", "split", "message"),
    [
        (tiny.contrastive(tiny.embedder("Mean"), {}), RETRIEVAL, "train", ""),
        (
            tiny.contrastive(tiny.embedder("Mean"), {}),
            ["role", "answers"],
            "train",
            "Contrastive needs extras ['document_id', 'in_batch', 'teacher', 'text_hash'], which"
            " data.train.build does not give; it gives ['answers', 'role']",
        ),
        (
            tiny.contrastive(tiny.embedder("Mean"), {}),
            [*RETRIEVAL, "weight"],
            "validation",
            "data.validation.build gives extras ['weight'], which neither Contrastive nor"
            f" EmbeddingModel reads; they read {RETRIEVAL}",
        ),
        (
            tiny.config(tiny.language()),
            ["pool_from"],
            "train",
            "data.train.build gives extras ['pool_from'], which neither NextToken nor"
            " LanguageModel reads; they read none",
        ),
    ],
)
def test_extras_that_are_missing_or_unread_are_refused_on_every_rank(
    config: dict[str, Any], extras: list[str], split: str, message: str
) -> None:
    assert run_ranks(_read, 2, config, extras, split) == [message] * 2


def test_run_replays_the_training_pass(tmp_path: Path) -> None:
    first, second = run_ranks(_prepare, 1, tmp_path)[0]
    assert torch.equal(first, second)


def _prepare(rank: int, world_size: int, init: str, run_dir: Path) -> Any:
    model = tiny.language()
    model["transformer"] |= {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    config = tiny.config(model)
    Parallel().initialize(seed=1234, rank=rank, world_size=world_size, init_method=init)
    steps = synthetic_steps(config, 1, 1)
    trainer = build_trainer(config, Data(steps), run_dir, global_batch_size=2)
    seen: dict[str, torch.Tensor] = {}

    class Watching(Objective):
        """An objective with a first pass."""

        def prepare(self, run: Any, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
            [seen["first"]] = run(batches)
            return batches, {}

        def loss(self, output: torch.Tensor, batch: Batch) -> Any:
            seen["second"] = output.detach().clone()
            count = torch.tensor(1, dtype=torch.int)
            return (
                output.sum(),
                count,
                {"loss": torch.stack([output.detach().sum(), torch.ones(())])},
            )

    trainer.objective = Watching()
    trainer.forward_backward(steps[0])
    return seen["first"], seen["second"]
