"""Which linears multiply in FP8, padding to what it needs, and scales in checkpoints."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.checkpoint.files import find
from nvmm.checkpoint.index import read_metadata, weight_names
from nvmm.config.rules.precision import FIELDS
from nvmm.modules.fp8_scales import Scaling, _EngineScales, _in_high_precision, align_tokens
from nvmm.modules.linear import WEIGHT, Quantizer, RowParallelLinear
from nvmm.modules.lora import Lora
from nvmm.parallel.fp8_recipe import RECIPES, Fp8
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from nvmm.training.optimizer import freeze
from tests import tiny
from tests.ranks import run_ranks
from tests.training.test_trainer import STEPS, _fit, _losses

DECODER = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = TP2 | {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


def scaling(model: dict[str, Any], fp8: Fp8 | None, freezing: list[str] | None = None) -> Any:
    constructor = instantiate(model, _convert_="all")
    lora = Lora(["*linear_*"])
    chunks = build_chunks(
        constructor, Parallel(), Precision(fp8=fp8), adapt=lora.attach if freezing == [] else None
    )
    freeze(chunks, freezing or [])
    return Scaling(chunks, fp8), chunks


def linears(part: str, layers: int) -> set[str]:
    return {f"{part}decoder.layers.{i}.{name}" for i in range(layers) for name in DECODER}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("freezing", [None, []], ids=["plain", "lora"])
def test_the_linears_of_transformer_blocks_and_nothing_else(freezing: list[str] | None) -> None:
    """Not the output layer, the connector, the patch embedding, nor adapters."""
    found, chunks = scaling(tiny.multimodal(), Fp8(), freezing)
    assert found.linears.keys() == linears("language.", 4) | linears("vision.", 2)
    for module in chunks[0].modules():
        quantizer = getattr(module, "quantizer", None)
        assert quantizer is None or quantizer in found.linears.values()


@pytest.mark.usefixtures("world")
def test_without_fp8_nothing_changes() -> None:
    found, chunks = scaling(tiny.language(), None)
    assert not found.linears and not found.sharded_state_dict()
    found.update()
    found.discard()
    assert not any(getattr(module, "quantizer", None) for module in chunks[0].modules())


@pytest.mark.usefixtures("world")
def test_exclusions() -> None:
    fp8 = Fp8(exclude=["*.linear_proj", "vision.*"], num_layers_at_start_in_bf16=1)
    found, _ = scaling(tiny.multimodal(), fp8)
    kept = {name for name in linears("language.", 4) if "linear_proj" not in name}
    assert found.linears.keys() == {name for name in kept if ".layers.0." not in name}
    last, _ = scaling(tiny.language(), Fp8(num_layers_at_end_in_bf16=2))
    assert last.linears.keys() == linears("", 2)
    with pytest.raises(
        ValueError, match=r"exclude: \['language.*'\] matches no linear; there are dec"
    ):
        scaling(tiny.language(), Fp8(exclude=["language.*"]))


@pytest.mark.usefixtures("world")
def test_features_that_do_not_divide_are_refused() -> None:
    model = tiny.multimodal()
    with pytest.raises(ValueError, match=r"vision.* has 80 .* features on a rank, .* by 32"):
        scaling(model, Fp8(recipe="mxfp8"))
    scaling(model, Fp8(recipe="mxfp8", exclude=["vision.*"]))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_engine_gathers_whole_blocks_of_features(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's linears of the blockwise recipe, with sequence parallelism: 128."""
    fp8 = Fp8(recipe=recipe)
    model = tiny.language()
    model["transformer"] |= {"hidden_size": 64, "ffn_hidden_size": 96}
    constructor = instantiate(model, _convert_="all")
    [chunk] = build_chunks(constructor, Parallel(), Precision(fp8=fp8))
    for layer in chunk.decoder.layers:
        layer.self_attention.linear_qkv.parallel_mode = "column"
        layer.mlp.linear_fc1.parallel_mode = "column"
        layer.self_attention.linear_proj.parallel_mode = "row"
        layer.mlp.linear_fc2.parallel_mode = "row"
    for native in ("ColumnParallelLinear", "RowParallelLinear"):
        monkeypatch.setattr(f"nvmm.modules.fp8_scales.{native}", Engine)
    monkeypatch.setattr("nvmm.modules.fp8_scales._in_high_precision", lambda forward: forward)
    Scaling([chunk], fp8)
    chunk.decoder.config.sequence_parallel = True
    if recipe == "blockwise":
        with pytest.raises(ValueError, match=r"linear_qkv has 64 input features .* by 128"):
            Scaling([chunk], fp8)
        Scaling([chunk], Fp8(recipe=recipe, exclude=["*.linear_qkv", "*.linear_fc1"]))
    else:
        Scaling([chunk], fp8)


@pytest.mark.usefixtures("world")
def test_a_frozen_encoder_keeps_nothing_for_gradients() -> None:
    found, _ = scaling(tiny.multimodal(), Fp8(amax_history_len=5), ["vision.*"])
    sizes = {name: tuple(q.history.shape) for name, q in found.linears.items()}
    assert {s for name, s in sizes.items() if name.startswith("vision.")} == {(2, 5)}
    # A frozen decoder still sends gradients to what is before it.
    found, _ = scaling(tiny.multimodal(), Fp8(amax_history_len=5), ["language.*"])
    assert {tuple(q.history.shape) for q in found.linears.values()} == {(3, 5)}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(1025, 1), (5, 3), (32, 2)])
def test_padding_changes_nothing(recipe: str, shape: tuple[int, int]) -> None:
    """A tile's 1025 tokens or any other number give equal results and gradients.

    In fp64, since a matrix product of more rows may add up in another order on some CPUs.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=1, params_dtype=torch.float64
    )
    options: Any = {"config": config, "init_method": torch.nn.init.normal_, "bias": True}
    options |= {"input_is_parallel": True, "skip_bias_add": True}
    x = torch.randn(*shape, 32, dtype=torch.float64)
    seen: list[torch.Size] = []
    results = []
    for aligned in (False, True):
        layer = RowParallelLinear(32, 64, **options)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        fp8, group = Fp8(recipe=recipe), torch.distributed.group.WORLD
        layer.quantizer = Quantizer(fp8, group, group, x.device)
        if aligned:
            align_tokens(layer, fp8.row_multiple(gathered=False))
            layer.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape))
        leaf = x.clone().requires_grad_()
        y, bias = layer(leaf)
        assert y.shape == (*shape, 64) and bias is layer.bias
        (y * torch.arange(64.0)).sum().backward()
        results.append((y, leaf.grad, layer.weight.grad))
    assert seen[0][:-1].numel() % fp8.row_multiple(gathered=False) == 0
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-11, atol=1e-9)


def seen_rows(monkeypatch: pytest.MonkeyPatch, tokens: int, sequence_parallel: bool) -> Any:
    """A function of a recipe: rows of what each linear of a wired model quantises."""
    rows: list[int] = []
    right = Quantizer.__call__

    def look(self: Quantizer, x: Tensor, tensor: int, **options: Any) -> Any:
        rows.extend([len(x)] * (tensor != WEIGHT))
        return right(self, x, tensor, **options)

    monkeypatch.setattr(Quantizer, "__call__", look)

    def run(recipe: str) -> list[int]:
        rows.clear()
        fp8 = Fp8(recipe=recipe)
        constructor = instantiate(tiny.language(), _convert_="all")
        [chunk] = build_chunks(constructor, Parallel(), Precision(fp8=fp8))
        chunk.decoder.config.sequence_parallel = sequence_parallel
        Scaling([chunk], fp8)
        for module in chunk.modules():
            if isinstance(getattr(module, "quantizer", None), Quantizer):
                x = torch.randn(tokens, 1, module.weight.shape[1], requires_grad=True)
                y = module(x)[0]
                assert y.shape[:-1] == (tokens, 1)
                y.sum().backward()
        return rows

    return run


@pytest.mark.usefixtures("world")
def test_models_pad_what_their_linears_quantise(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 tokens, forward and backward; not under sequence parallelism, whose rows divide."""
    run = seen_rows(monkeypatch, 5, sequence_parallel=False)
    for recipe in RECIPES:
        assert run(recipe) == [32 if recipe == "mxfp8" else 16] * (2 * 4 * len(DECODER))
    run = seen_rows(monkeypatch, 5, sequence_parallel=True)
    assert set(run("current")) == {5}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_beside_a_padded_linear(recipe: str) -> None:
    """Odd rows: the FP8 product of the base as it is, plus the adapter's in its own precision."""
    fp8 = Fp8(recipe=recipe)
    constructor = instantiate(tiny.language(), _convert_="all")
    [chunk] = build_chunks(constructor, Parallel(), Precision(dtype="fp64", fp8=fp8))
    layer = chunk.decoder.layers[0]
    torch.manual_seed(5)
    bases, options = {}, {"dtype": torch.float64, "requires_grad": True}
    for parent, child in ((layer.self_attention, "linear_qkv"), (layer.mlp, "linear_fc2")):
        linear = getattr(parent, child)
        x = torch.randn(5, 3, linear.weight.shape[1], **options)
        group = torch.distributed.group.WORLD
        linear.quantizer = Quantizer(fp8, group, group, x.device)
        bases[parent, child] = x, linear(x)[0].detach()
        linear.quantizer = None
    Lora(["*linear_*"], rank=3, alpha=6.0).attach([chunk])
    Scaling([chunk], fp8)
    for (parent, child), (x, base) in bases.items():
        linear, adapter = getattr(parent, child), getattr(parent, f"{child}_lora")
        assert linear.quantizer is not None
        for factor in (adapter.a, adapter.b):
            torch.nn.init.normal_(factor)
        expected = base + adapter(x)
        dy = torch.randn_like(expected)
        factors = [adapter.a, adapter.b]
        wanted = torch.autograd.grad(expected, factors, dy)
        found = linear(x)[0]
        torch.testing.assert_close(found, expected)
        for value, other in zip(torch.autograd.grad(found, factors, dy), wanted, strict=True):
            torch.testing.assert_close(value, other)


def _one_step(rank: int, size: int, init: str, images: bool) -> dict[str, Tensor]:
    """Scales after a step at DP 2 in which one rank, or neither, has images."""
    from nvmm.proof.equivalence import build_trainer
    from nvmm.proof.synthetic import SyntheticData, synthetic_steps

    Parallel().initialize(seed=1, rank=rank, world_size=size, init_method=init)
    config = tiny.config(tiny.multimodal()) | {
        "precision": {"fp8": {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "amax_history_len": 2}}
    }
    steps = synthetic_steps(config, 1, 2)
    if not images:
        text = synthetic_steps(config | {"model": tiny.language()}, 1, 2)
        steps = text
    trainer = build_trainer(config, SyntheticData(steps), Path("/nowhere"), global_batch_size=4)
    trainer.train_step(0, next(trainer.batches("train", 0)))
    return {k: v.data.clone() for k, v in trainer.scaling.sharded_state_dict().items()}


def test_a_rank_without_images_gets_the_others_scales() -> None:
    one, other = run_ranks(_one_step, 2, True)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    key = "fp8.vision.decoder.layers.0.mlp.linear_fc1.input"
    assert one[key][-1] > 0
    bare, _ = run_ranks(_one_step, 2, False)
    assert bare[key].tolist() == [1.0, 0.0, 0.0], "no rank has seen it: nothing moves"
    assert bare["fp8.language.decoder.layers.0.mlp.linear_fc1.input"][-1] > 0


def fp8_options(**changes: Any) -> dict[str, Any]:
    fp8 = {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "amax_history_len": 4} | changes
    return {"precision": {"fp8": fp8}}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(n, layout, marks=pytest.mark.slow)
        for n, layout in ((1, {}), (2, {}), (2, TP2_SP))
    ],
)
def test_five_and_five_steps_are_bit_equal_to_ten(
    tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    options = fp8_options()
    run_ranks(_fit, world_size, tmp_path / "whole", STEPS, layout, options)
    for until in (5, STEPS):
        run_ranks(_fit, world_size, tmp_path / "parts", until, layout, options)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    plain = run_ranks(_fit, world_size, tmp_path / "plain", 2, layout, {})
    assert plain and _losses(tmp_path / "plain")[1] != _losses(tmp_path / "whole")[1]


@pytest.mark.slow
def test_scales_reshard(tmp_path: Path) -> None:
    """One rank, then TP 2, PP 2 and DP 2: the losses of one rank, in double precision."""
    options = fp8_options() | {"optim": {"clip_grad": 0.0}}
    options["precision"] |= {"dtype": "fp64", "grad_reduce_in_fp32": False}
    run_ranks(_fit, 1, tmp_path / "whole", 8, {}, options)
    for world_size, layout, until in ((1, {}, 2), (2, TP2, 4), (2, PP2, 6), (2, {}, 8)):
        run_ranks(_fit, world_size, tmp_path / "parts", until, layout, options)
    expected, found = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-9)
        assert other_norm == pytest.approx(norm, rel=1e-5)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """Tensors under names of their own; weights and their checksums are those of any run."""
    run_ranks(_fit, 1, tmp_path, 2, {}, fp8_options())
    path = find(tmp_path)
    entries = read_metadata(path).state_dict_metadata
    scales = {name: tuple(entry.size) for name, entry in entries.items() if name[:4] == "fp8."}
    assert set(scales.values()) == {(1 + 4,)}
    assert {name[4:].rpartition(".")[0] for name in scales} == linears("", 4)
    weights = weight_names(read_metadata(path))
    assert not any(name.startswith("fp8.") for name in weights)
    assert set(weights) == json.loads((path / "weights.json").read_text()).keys()


def test_resuming_with_other_scales(tmp_path: Path) -> None:
    """None in the checkpoint: they start anew, and it is said. Another length: refused."""
    run_ranks(_fit, 1, tmp_path, 2, {})
    [result] = run_ranks(_fit, 1, tmp_path, 3, {}, fp8_options())
    assert any("lacks 48 FP8 scales, which start anew" in m for m in result["messages"])
    with pytest.raises(RuntimeError, match="amax_history_len=5 must be 4, as it was saved"):
        run_ranks(_fit, 1, tmp_path, 4, {}, fp8_options(amax_history_len=5))
    [result] = run_ranks(_fit, 1, tmp_path, 4, {}, {})
    assert any("changed since" in m and "precision" in m for m in result["messages"])


def test_a_skipped_step_leaves_the_scales_alone(tmp_path: Path) -> None:
    options = fp8_options() | {"poison": 1, "on_nonfinite": "skip"}
    run_ranks(_fit, 1, tmp_path / "skipped", 2, {}, options)
    run_ranks(_fit, 1, tmp_path / "one", 1, {}, fp8_options())
    kept = [_scales(tmp_path / name) for name in ("skipped", "one")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def _without_the_first_batch(trainer: Any, rank: int) -> None:
    trainer.data.steps = trainer.data.steps[1:]


def test_a_step_after_a_skipped_one_is_as_the_first(tmp_path: Path) -> None:
    """The weights' largest numbers too, which were quantised in the skipped one."""
    options = fp8_options() | {"poison": 0, "on_nonfinite": "skip"}
    run_ranks(_fit, 1, tmp_path / "skipped", 2, {}, options)
    shifted = fp8_options() | {"hook": _without_the_first_batch}
    run_ranks(_fit, 1, tmp_path / "first", 1, {}, shifted)
    skipped, first = (_scales(tmp_path / name) for name in ("skipped", "first"))
    assert all(torch.equal(value, first[name]) for name, value in skipped.items())
    assert all(value[-1] > 0 for value in first.values())


def test_resuming_after_a_skipped_step_is_bit_equal(tmp_path: Path) -> None:
    options = fp8_options() | {"poison": 1, "on_nonfinite": "skip"}
    run_ranks(_fit, 1, tmp_path / "whole", 4, {}, options)
    for until in (2, 4):  # both go on from the second step, which is skipped
        run_ranks(_fit, 1, tmp_path / "parts", until, {}, options)
    assert _losses(tmp_path / "parts")[2:] == _losses(tmp_path / "whole")[2:]
    whole, parts = (_scales(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_bfloat16_trains_at_tp2_with_sequence_parallelism(tmp_path: Path) -> None:
    """precision=fp8 as it is by default; losses near bf16's, which are others."""
    precision = {"dtype": "bf16"}
    losses = {}
    for name, options in (
        ("bf16", {"precision": precision}),
        ("fp8", {"precision": precision | fp8_options()["precision"]}),
    ):
        run_ranks(_fit, 2, tmp_path / name, 2, TP2_SP, options)
        losses[name] = [loss for _, loss, _ in _losses(tmp_path / name)]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03)
    assert losses["fp8"] != losses["bf16"]


def _scales(run_dir: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    path = find(run_dir)
    sizes = {
        name: entry.size
        for name, entry in read_metadata(path).state_dict_metadata.items()
        if name.startswith("fp8.")
    }
    state = {name: torch.zeros(size) for name, size in sizes.items()}
    load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state


class Engine(torch.nn.Module):
    """Stands for a Transformer Engine module: the tensors of its FP8 state, made at first use.

    Only a forward pass sets `num_gemms`, which making them reads.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.fp8_meta = length, {}

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        gemms = self.fp8_meta["num_gemms"]
        for way, count in (("fwd", 3 * gemms), ("bwd", 2 * gemms)):
            self.fp8_meta[f"scaling_{way}"] = SimpleNamespace(
                amax_history=torch.zeros(self.length, count), scale=torch.ones(count)
            )


def test_transformer_engine_s_scales_are_tensors_of_the_same_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its source: columns are input, weight and output, and the output's gradient."""
    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: "recipe")
    module = Engine(4)
    scales = _EngineScales(module, config=None)
    assert {name: tuple(t.shape) for name, t in scales.state().items()} == {
        "input": (5,),
        "weight": (5,),
        "gradient": (5,),
    }
    kept = {name: torch.arange(5.0) + 10 * i for i, name in enumerate(scales.state())}
    scales.load(kept)
    assert all(torch.equal(scales.state()[name], value) for name, value in kept.items())
    forward, backward = module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]
    assert forward.scale.tolist() == [0.0, 10.0, 1.0] and backward.scale.tolist() == [20.0, 1.0]
    assert forward.amax_history[:, 1].tolist() == [11.0, 12.0, 13.0, 14.0]
    emulated = Quantizer(Fp8(amax_history_len=4), None, None, torch.device("cpu"))
    emulated.load(kept)
    assert emulated.state().keys() == kept.keys()
    assert torch.equal(emulated.scale, forward.scale.new_tensor([0.0, 10.0, 20.0]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_mcore_takes_the_fields(recipe: str) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    fp8 = Fp8(recipe=recipe, num_layers_at_end_in_bf16=int(recipe != "delayed"))
    kwargs = fp8.transformer_kwargs()
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=1, **kwargs)
    assert config.fp8 == ("e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid")
    assert set(kwargs) == set(FIELDS)


@pytest.mark.usefixtures("world")
def test_mcore_s_own_field_is_refused_without_its_engine() -> None:
    model = tiny.language()
    model["transformer"]["fp8"] = "hybrid"
    with pytest.raises(
        ValueError, match=r"fp8=hybrid .* needs backend=transformer_engine; set prec"
    ):
        instantiate(model, _convert_="all")(chunk=Parallel().chunks(Precision())[0])


def test_an_engine_s_linear_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward runs with FP8 turned off."""
    state = {"enabled": True}

    @contextlib.contextmanager
    def fp8_autocast(enabled: bool) -> Iterator[None]:
        before, state["enabled"] = state["enabled"], enabled
        yield
        state["enabled"] = before

    engine = types.ModuleType("transformer_engine.pytorch")
    engine.fp8_autocast = fp8_autocast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    assert _in_high_precision(lambda x: (x, state["enabled"]))(3) == (3, False)
    assert state["enabled"]
