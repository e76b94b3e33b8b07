"""Adapters: what they add, which parameters train and are kept in memory, what checkpoints hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.checkpoint.files import find, read_state
from nvmm.checkpoint.index import read_metadata
from nvmm.modules.lora import FACTORS, Lora, members, only_adapters_train, stacked
from nvmm.parallel.parameters import initialize, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.equivalence import build_trainer
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from nvmm.training.optimizer import freeze
from tests import tiny
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
STEPS = 6
TARGETS = ["language.*.linear_*", "vision.*.linear_qkv"]


def model() -> Any:
    [chunk] = Parallel().chunks(Precision())
    return instantiate(tiny.multimodal(), _convert_="all")(chunk=chunk)


def test_rows_of_a_fused_linear_belong_to_its_members() -> None:
    qkv = [0, 0, 0, 0, 1, 2] * 2
    assert members((4, 1, 1), 12).tolist() == qkv
    assert members((4, 1, 1), 6, first=3).tolist() == qkv[3:9]
    assert members((2, 2), 4).tolist() == [0, 0, 1, 1]
    assert members((5,), 5).tolist() == [0] * 5
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert stacked(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask).tolist() == [
        [1.0, 2.0, 0.0, 0.0],
        [0.0, 0.0, 3.0, 4.0],
    ]


@pytest.mark.usefixtures("world")
def test_each_member_multiplies_its_own_a() -> None:
    """A fused QKV of 2 groups, written out q by q, k by k, v by v; and a gated fc1."""
    net = model()
    lora = Lora(["language.decoder.layers.0.*"], rank=3, alpha=6.0)
    lora.attach([net])
    layer = net.language.decoder.layers[0]
    torch.manual_seed(3)
    for parent, child, sizes in (
        (layer.self_attention, "linear_qkv", [32, 16, 16] * 2),
        (layer.mlp, "linear_fc1", [96, 96]),
        (layer.mlp, "linear_fc2", [64]),
    ):
        linear, adapter = getattr(parent, child), getattr(parent, f"{child}_lora")
        inputs = torch.randn(7, 2, linear.weight.shape[1])
        torch.nn.init.normal_(linear.weight)
        before = linear(inputs)[0]
        torch.nn.init.normal_(adapter.a)
        torch.nn.init.normal_(adapter.b)
        parts = []
        for number, rows in enumerate(adapter.b.split(sizes)):
            member = number % len(adapter.runs)
            a = adapter.a[3 * member : 3 * member + 3]
            parts.append(inputs @ a.T @ rows.T * 2.0)
        torch.testing.assert_close(linear(inputs)[0], before + torch.cat(parts, -1))


@pytest.mark.usefixtures("world")
def test_names_initial_values_and_what_trains() -> None:
    plain, net = model(), model()
    names = {p.name for p in sharded_parameters(plain)}
    lora = Lora(TARGETS, rank=4, train=["connector.*"])
    lora.attach([net])
    initialize(net, seed=5)
    initialize(plain, seed=5)
    lora.freeze([net])
    found = {p.name: p for p in sharded_parameters(net)}
    adapters = found.keys() - names
    assert found.keys() > names and len(adapters) == 2 * (4 * 4 + 2)
    first = "language.decoder.layers.3.self_attention.linear_qkv.lora_"
    assert found[f"{first}a"].global_shape == (12, 64)
    assert found[f"{first}b"].global_shape == (128, 4)
    for p in sharded_parameters(plain):
        assert torch.equal(p.parameter, found[p.name].parameter)
    for name in adapters:
        a = found[name].parameter
        assert a.requires_grad
        if name.endswith("_a"):
            assert a.std().item() == pytest.approx((3 * a.shape[1]) ** -0.5, rel=0.3)
        else:
            assert not a.any()
    trained = {n for n, p in found.items() if p.parameter.requires_grad}
    assert trained - adapters == {n for n in names if n.startswith("connector.")}
    assert only_adapters_train(net.language) and only_adapters_train(net.vision)
    assert not only_adapters_train(net.connector) and not only_adapters_train(plain.language)


@pytest.mark.usefixtures("world")
def test_optim_freeze_does_not_reach_adapters() -> None:
    net = model()
    lora = Lora(TARGETS, train=["connector.linear_fc1.*"])
    lora.attach([net])
    freeze([net], ["vision.*", "*norm*"])
    lora.freeze([net])
    trained = {p.name for p in sharded_parameters(net) if p.parameter.requires_grad}
    whole = {name for name in trained if not name.endswith(FACTORS)}
    assert whole == {"connector.linear_fc1.weight"}  # not its norm, which is frozen
    assert len(trained - whole) == 2 * (4 * 4 + 2)
    # A pattern of adapters alone would not be heard.
    for pattern in ("*lora*", "*.lora_a"):
        with pytest.raises(ValueError, match=r"optim.freeze: .* matches no parameter that it can"):
            freeze([net], ["vision.*", pattern])


@pytest.mark.usefixtures("world")
def test_flops_of_a_part_with_adapters_leave_out_its_weights_gradients() -> None:
    counts = {}
    [[batch]] = synthetic_steps(tiny.config(tiny.multimodal()), 1, 1)
    assert batch.media
    for name in ("plain", "lora"):
        net = model()
        if name == "lora":
            lora = Lora(["language.*"])
            lora.attach([net])
            lora.freeze([net])
        counts[name] = net.flops(batch)["language"]
    assert 2 / 3 < counts["lora"] / counts["plain"] < 0.75


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must be in \[0, 1\)"),
        (
            {"targets": ["*.linear_fc1", "language.*.linear_qvk"]},
            r"lora.targets: \['language.\*.linear_qvk'\] matches no linear; there are"
            r" language.decoder.layers.\*.self_attention.linear_qkv",
        ),
        ({"train": ["projector.*"]}, r"lora.train: \['projector.\*'\] matches no parameter"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message):
        lora = Lora(**{"targets": ["*.linear_fc1"]} | options)
        lora.attach([net])
        lora.freeze([net])


@pytest.mark.usefixtures("world")
def test_dropout_is_of_the_adapters_input_in_training_alone() -> None:
    net = model()
    Lora(["*.linear_proj"], dropout=0.5).attach([net])
    attention = net.language.decoder.layers[0].self_attention
    linear, adapter = attention.linear_proj, attention.linear_proj_lora
    torch.nn.init.normal_(adapter.a)
    torch.nn.init.normal_(adapter.b)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(5, 1, 64)
    first, second = linear(x)[0], linear(x)[0]
    assert not torch.equal(first, second)
    net.eval()
    assert torch.equal(linear(x)[0], linear(x)[0])


def fit(
    rank: int,
    world: int,
    init: str,
    run_dir: Path,
    until: int,
    layout: dict[str, Any],
    lora: dict[str, Any] | None,
    init_from: Path | None = None,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Train to a step; what is held in memory for what is trained."""
    config = tiny.config(tiny.multimodal(), decay_steps=STEPS)
    config |= {"parallel": layout, "lora": lora, "precision": {"dtype": dtype}}
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world, init_method=init)
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
        init_from=str(init_from) if init_from is not None else None,
    )
    trainer.fit()
    adam = trainer.optimizer.adam
    return {
        "trained": sum(p.numel() for p in trainer.chunks[0].parameters() if p.requires_grad),
        "gradients": sum(b.grad_data.nbytes for m in trainer.models for b in m.buffers),
        "weights": sum(b.param_data.nbytes for m in trainer.models for b in m.buffers),
        "masters": sum(p.nbytes for g in adam.param_groups for p in g["params"]),
        "means": sum(t.nbytes for s in adam.state.values() for t in s.values()),
    }


def losses(run_dir: Path) -> list[tuple[float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


LORA = tiny.lora(TARGETS, dropout=0.1)


def test_the_base_holds_no_gradient_master_or_optimizer_state(tmp_path: Path) -> None:
    """In bytes: 4 of gradient, 4 of master, 8 of means per trained parameter, and no more."""
    held = run_ranks(fit, 1, tmp_path, 1, {}, LORA, None, "bf16")[0]
    padded = held["gradients"] // 4  # mcore rounds a buffer up
    assert 0 < held["trained"] < 20_000
    assert held["trained"] <= padded < held["trained"] + 1024
    assert held["weights"] == 2 * padded
    assert held["masters"] == 4 * held["trained"]
    assert held["means"] == 8 * held["trained"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose weights LoRA runs start from."""
    path = tmp_path_factory.mktemp("base") / "run"
    run_ranks(fit, 1, path, 1, {}, None)
    return path


def test_a_checkpoint_holds_what_is_trained_and_resumes_exactly(tmp_path: Path, base: Path) -> None:
    """Six steps, and three and three; the base moves in between."""
    lora = LORA | {"train": ["connector.*"]}
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved"
    own = Path(shutil.copytree(base, tmp_path / "base"))
    run_ranks(fit, 1, whole, STEPS, {}, lora, own)
    run_ranks(fit, 1, parts, 3, {}, lora, own)
    names = set(read_metadata(find(parts)).state_dict_metadata)
    weights = {n for n in names if n != "rng" and not n.startswith("optimizer.")}
    assert {n.rpartition(".")[2] for n in weights if not n.startswith("connector.")} == {
        "lora_a",
        "lora_b",
    }
    assert json.loads((find(parts) / "weights.json").read_text()).keys() == weights
    assert read_state(find(parts))["base"]["path"] == str(find(own))
    own.rename(moved)
    with pytest.raises(RuntimeError, match=r"the base of this LoRA checkpoint.* is not at"):
        run_ranks(fit, 1, parts, STEPS, {}, lora, own)
    run_ranks(fit, 1, parts, STEPS, {}, lora, moved)
    assert losses(parts) == losses(whole)
    assert read_state(find(parts))["base"]["path"] == str(find(moved))


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    run_ranks(fit, 1, tmp_path / "run", 1, {}, LORA, own)
    shutil.rmtree(own)
    run_ranks(fit, 1, own, 2, {}, None)  # other weights, another step
    with pytest.raises(RuntimeError, match=r"weights of digest .* is not at"):
        run_ranks(fit, 1, tmp_path / "run", 2, {}, LORA, own)


@pytest.mark.slow
def test_resume_at_other_layouts_equals_one_rank(tmp_path: Path, base: Path) -> None:
    lora = tiny.lora(TARGETS)
    run_ranks(fit, 1, tmp_path / "whole", STEPS, {}, lora, base)
    stages = [(2, TP2 | {"sequence_parallel": True}, 2), (2, PP2, 4), (1, {}, STEPS)]
    for size, layout, until in stages:
        run_ranks(fit, size, tmp_path / "parts", until, layout, lora, base)
    for expected, found in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_lora_run_starts_from_a_lora_run(tmp_path: Path, base: Path) -> None:
    """Its adapters are loaded, over its base; without adapters in the model they are refused."""
    run_ranks(fit, 1, tmp_path / "first", 3, {}, LORA, base)
    run_ranks(fit, 1, tmp_path / "second", 1, {}, LORA, tmp_path / "first")
    assert read_state(find(tmp_path / "second"))["base"]["path"] == str(find(tmp_path / "first"))
    first = losses(tmp_path / "first")
    assert losses(tmp_path / "second")[0][0] != first[0][0]
    with pytest.raises(RuntimeError, match="has LoRA adapters where this model has none"):
        run_ranks(fit, 1, tmp_path / "third", 1, {}, None, tmp_path / "first")
    with pytest.raises(RuntimeError, match=r"does not fit this model.*lora_a is"):
        run_ranks(fit, 1, tmp_path / "fourth", 1, {}, LORA | {"rank": 2}, tmp_path / "first")
