"""Megatron-LM's checkpoints, written here in its layout: merged, renumbered, read without trust."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from nvmm.convert import models
from nvmm.convert.formats import megatron
from nvmm.convert.importing import derive
from nvmm.convert.verify import compare_tensors, open_side
from tests.convert import families
from tests.convert.test_families import imported, logits
from tests.convert.test_hostile import Payload
from tests.ranks import run_ranks

_ROWS = 640  # what Megatron-LM pads 509 to with TP 2 and a multiple of 320


def args(**changes: Any) -> argparse.Namespace:
    """What Megatron-LM would have been given to train the tiny Qwen2."""
    values = {
        "num_layers": 2,
        "hidden_size": 60,
        "num_attention_heads": 6,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 10,
        "ffn_hidden_size": 92,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "max_position_embeddings": 128,
        "padded_vocab_size": _ROWS,
        "vocab_size": families.VOCABULARY,
        "untie_embeddings_and_output_weights": True,
        "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM,
    }
    return argparse.Namespace(**values | changes)


def sliced(name: str, value: Tensor, tensor: int) -> list[Tensor]:
    """What each tensor-parallel rank of Megatron-LM holds of a whole tensor."""
    if "word_embeddings" in name or name == "output_layer.weight":
        padding = value.new_full((_ROWS - families.VOCABULARY, value.shape[1]), 9.0)
        return list(torch.cat([value[: families.VOCABULARY], padding]).chunk(tensor))
    if "linear_fc1.weight" in name:
        gate, up = (half.chunk(tensor) for half in value.chunk(2))
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return list(value.chunk(tensor))
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return list(value.chunk(tensor, dim=1))
    return [value] * tensor


def write_legacy(
    folder: Path, weights: dict[str, Tensor], tensor: int, pipeline: int, fused: bool
) -> Path:
    """weights under our names -> <folder>/iter_0000007/mp_rank_XX_YYY/model_optim_rng.pt."""
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    per_stage = 2 // pipeline
    for p in range(pipeline):
        states: list[dict[str, Any]] = [{} for _ in range(tensor)]
        for name, value in weights.items():
            stage = pipeline - 1 if name.startswith(("output", "decoder.final")) else 0
            if name.startswith("decoder.layers."):
                layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
                stage = int(layer) // per_stage
                if not fused:
                    rest = rest.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                    rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                local = f"decoder.layers.{int(layer) % per_stage}.{rest}"
            else:
                local = name
            if stage == p:
                for state, part in zip(states, sliced(name, value, tensor), strict=True):
                    state[local] = part.clone()
        for t, state in enumerate(states):
            rank = f"mp_rank_{t:02d}_{p:03d}" if pipeline > 1 else f"mp_rank_{t:02d}"
            path = folder / "iter_0000007" / rank / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            state["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            generator = {"np_rng_state": ("MT19937", numpy.arange(3, dtype=numpy.uint32), 3)}
            content = {"args": args(), "iteration": 7, "model": state, "rng_state": [generator]}
            torch.save(content, path)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The tiny Qwen2 as a checkpoint of ours, and its weights."""
    from nvmm.convert.sources import read
    from nvmm.parallel.setup import Parallel, shutdown

    folder = tmp_path_factory.mktemp("qwen2")
    families.language("qwen2", folder / "theirs")
    Parallel().initialize(seed=1, rank=0, world_size=1)
    imported(folder / "theirs", folder / "ours")
    shutdown()
    source = models.open_checkpoint(folder / "ours").source
    return folder / "ours", {name: read(source, name) for name in source.spec}


@pytest.mark.parametrize(
    ("tensor", "pipeline", "fused"), [(1, 1, True), (2, 1, False), (2, 2, True)], ids=str
)
def test_legacy_ranks_are_put_together(
    ours: tuple[Path, dict[str, Tensor]], tmp_path: Path, tensor: int, pipeline: int, fused: bool
) -> None:
    path = write_legacy(tmp_path / "legacy", ours[1], tensor, pipeline, fused)
    report = compare_tensors(models.open_checkpoint(ours[0]), open_side(path))
    assert report["equal"] == report["tensors"] == len(ours[1]) == 17
    assert not report["only_in_a"] + report["only_in_b"]


@pytest.mark.parametrize(("pipeline", "virtual", "per_chunk"), [(2, 2, 1), (2, 3, 2), (3, 11, 1)])
def test_virtual_stages_are_put_in_order(
    tmp_path: Path, pipeline: int, virtual: int, per_chunk: int
) -> None:
    """Megatron-LM deals chunks of layers over the stages in turn: 0, 2, 4 are the first's of two.

    A stage's file has its chunks as model0, model1 ..., with layers that count from 0.
    """
    norm = "self_attention.linear_qkv.layer_norm_weight"
    count = pipeline * virtual * per_chunk
    for stage in range(pipeline):
        content: dict[str, Any] = {"args": args(num_layers=count)}
        # In what order the file has them does not matter.
        for chunk in reversed(range(virtual)):
            first = (chunk * pipeline + stage) * per_chunk
            content[f"model{chunk}"] = {
                f"decoder.layers.{i}.{norm}": torch.full((3,), first + i) for i in range(per_chunk)
            }
        content["model0"] |= (
            {"embedding.word_embeddings.weight": torch.ones(2)} if not stage else {}
        )
        if stage == pipeline - 1:
            content[f"model{virtual - 1}"]["decoder.final_layernorm.weight"] = torch.ones(3)
        path = tmp_path / "iter_0000007" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(content, path)
    source = megatron.LegacySource(tmp_path / "iter_0000007")
    found = {name: next(source.blocks(name)) for name in source.spec}
    assert len(found) == count + 2
    for layer in range(count):
        assert found[f"decoder.layers.{layer}.{norm}"].tolist() == [layer] * 3


@pytest.mark.usefixtures("world")
def test_an_imported_legacy_model_answers_like_the_original(
    ours: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = write_legacy(tmp_path / "legacy", ours[1], 2, 2, True)
    model = imported(path, tmp_path / "again")
    assert model == derive({"": models.open_folder(path)})
    assert (model["vocab_size"], model["padded_vocab_size"]) == (509, 512)
    first = logits(0, 1, None, {}, models.open_checkpoint(ours[0]).model, ours[0])
    assert torch.equal(first, logits(0, 1, None, {}, model, tmp_path / "again"))


def write_distributed(
    rank: int, world: int, init: str, layout: dict[str, Any], path: Path, stacked: bool
) -> dict[str, Tensor]:
    """Save a GPT model as Megatron-LM does; this rank's parameters by local name."""
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision
    from tests.runs import language_model, save_as_mcore

    parallel = Parallel(**layout)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    [chunk] = build_chunks(language_model(qk_layernorm=True), parallel, Precision(), seed=3)
    metadata = None if stacked else {"non_homogeneous_layers": True}
    state = {
        "args": args(
            num_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            kv_channels=8,
            ffn_hidden_size=48,
            padded_vocab_size=64,
            vocab_size=61,
            norm_epsilon=1e-5,
            qk_layernorm=True,
        ),
        "iteration": 3,
        "model": chunk.sharded_state_dict(metadata=metadata),
    }
    if rank == 0:
        path.mkdir()
    torch.distributed.barrier()
    save_as_mcore(state, path)
    return {name: value.detach().clone() for name, value in chunk.named_parameters()}


@pytest.mark.parametrize("stacked", [True, False])
def test_mcores_own_gpt_checkpoints_are_read(stacked: bool, tmp_path: Path) -> None:
    run_ranks(write_distributed, 2, {"tensor_model_parallel_size": 2}, tmp_path / "dist", stacked)
    [whole] = run_ranks(write_distributed, 1, {}, tmp_path / "one", stacked)
    from nvmm.convert.sources import read

    folder = models.open_folder(tmp_path / "dist")
    found = folder.to_ours(folder.model())
    renamed = {
        name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
            "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
        ): value
        for name, value in whole.items()
    }
    assert found.spec.keys() == renamed.keys()
    for name, value in renamed.items():
        tensor = read(found, name)
        if "word_embeddings" in name or name == "output_layer.weight":
            # Rows that pad the vocabulary of 61 are zeros in ours.
            assert tensor.shape == (128, 32) and not tensor[61:].any()
            tensor, value = tensor[:61], value[:61]
        assert torch.equal(tensor, value), name


class Member:
    """Pickles as getattr of something that is no enum."""

    def __reduce__(self) -> Any:
        return getattr, (argparse.Namespace, "__init__")


def test_interleaved_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="rotary_interleaved=True is not supported"):
        megatron.to_model(vars(args(rotary_interleaved=True)))


def test_an_argument_that_makes_another_model_is_read_or_refused() -> None:
    """What Megatron-LM saves beside the model, its defaults here, refuses nothing."""
    usual = {
        "tensor_model_parallel_size": 8,
        "sequence_parallel": True,
        "bf16": True,
        "masked_softmax_fusion": True,
        "persist_layer_norm": True,
        "bias_dropout_fusion": True,
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
        "bias_gelu_fusion": False,
        "recompute_granularity": "selective",
        "moe_router_topk": 4,
        "num_experts": None,
        "softmax_type": "vanilla",
        "multi_latent_attention": False,
        "hidden_dropout": 0.0,
        "spec": None,
    }
    plain = megatron.to_model(vars(args(**usual)))
    assert plain == megatron.to_model(vars(args()))
    for name, value in {
        "num_experts": 8,
        "softmax_type": "learnable",
        "attention_output_gate": True,
        "qk_l2_norm": True,
        "mtp_num_layers": 1,
        "multi_latent_attention": True,
        "apply_residual_connection_post_layernorm": True,
        "quick_geglu": True,
        "openai_gelu": True,
        "experimental_attention_variant": "dsa",
        "is_hybrid_model": True,
        "position_embedding_type": "yarn",
        "spec": ["a", "b"],
    }.items():
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            megatron.to_model(vars(args(**{name: value})))
    for name, value in {
        "window_size": (3, 0),
        "no_rope_freq": [0, 1],
        "qk_layernorm": True,
        "softmax_scale": 0.5,
    }.items():
        given = megatron.arguments({"args": args(**{name: value})}, Path("x"))
        expected = list(value) if isinstance(value, tuple) else value
        assert megatron.to_model(given)["transformer"][name] == expected


def test_fields_of_mcore_that_no_argument_of_ours_decides() -> None:
    """A new mcore's field is in none of the lists, and is refused where it is not its default."""
    from nvmm.config.rules.transformer import LANGUAGE_FIELDS, TARGET
    from nvmm.config.signatures import signature

    fields = signature(TARGET).parameters.keys()
    assert fields >= megatron._SAME_MODEL
    lists = LANGUAGE_FIELDS | megatron._SAME_MODEL
    left = {
        name
        for name in fields
        if name not in lists and not name.startswith(megatron._SAME_MODEL_PREFIXES)
    }
    assert "rotary_interleaved" in left and "softmax_type" in left
    for name in left - {"_cpu_offloading_context"}:
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            megatron.to_model(vars(args(**{name: "another"})))


def test_the_fused_gelu_is_the_approximate_one() -> None:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    x = torch.linspace(-4, 4, 33)
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    plain = getattr(bias_gelu, "_torchdynamo_orig_callable", bias_gelu)  # not compiled
    torch.testing.assert_close(plain(torch.zeros(33), x), tanh)
    model = megatron.to_model(vars(args(swiglu=False, bias_gelu_fusion=True)))
    assert model["transformer"]["activation_func"]["approximate"] == "tanh"
    exact = megatron.to_model(vars(args(swiglu=False)))["transformer"]["activation_func"]
    assert exact["path"] == "torch.nn.functional.gelu"


@pytest.mark.parametrize("planted", [Payload, Member])
def test_a_hostile_rank_file_is_refused(tmp_path: Path, planted: Any) -> None:
    path = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"args": args(), "model": {}, "extra": planted()}, path)
    with pytest.raises(ValueError, match=r"model_optim_rng\.pt: refused, nothing of it was run"):
        models.open_folder(tmp_path / "iter_0000001")
    assert not Path("/tmp/nvmm_convert_payload").exists()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model_optim_rng\.pt: refused"):
        models.open_folder(tmp_path / "iter_0000001")


def test_legacy_checkpoints_we_cannot_read(
    ours: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = write_legacy(tmp_path / "legacy", ours[1], 2, 1, True)
    second = path / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(second, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(content, second)
    with pytest.raises(ValueError, match=r"ranks hold different decoder\.final_layernorm\.weight"):
        compare_tensors(models.open_checkpoint(ours[0]), open_side(path))
    second.parent.rename(second.parent.with_name("mp_rank_02"))
    with pytest.raises(ValueError, match="lacks the files of pipeline rank 0, tensor rank 1"):
        open_side(path)
    (path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ValueError, match="no iteration"):
        open_side(path)
