"""Checkpoints that many ranks wrote are read whole, whatever the layout cut them into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from nvmm.convert import exporting, importing, models
from nvmm.convert.models import open_checkpoint
from nvmm.convert.verify import compare_tensors
from tests.ranks import run_ranks
from tests.runs import Run

_STEPS = 4


def save(rank: int, world: int, init: str, layout: dict[str, Any], folder: Path) -> None:
    Run(rank, world, init, layout).save(5, folder)


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_what_two_ranks_wrote_is_what_one_wrote(size: str, tmp_path: Path) -> None:
    run_ranks(save, 1, {}, tmp_path / "one")
    run_ranks(save, 2, {size: 2}, tmp_path / "two")
    one, two = (open_checkpoint(tmp_path / x / "step_00000005") for x in ("one", "two"))
    if size.startswith("tensor"):
        pieces = two.source.entries["decoder.layers.0.self_attention.linear_proj.weight"].chunks
        assert sorted(piece.offsets[1] for piece in pieces) == [0, 16]
    report = compare_tensors(one, two)
    assert report["equal"] == report["tensors"] == len(one.source.spec) > 30
    assert not report["only_in_a"] and not report["only_in_b"]


def import_tiny(folder: Path) -> dict[str, Any]:
    """A random Qwen2 of the shape that tests/runs.py trains, imported; our model config."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(3)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "theirs")
    folders = {"": models.open_folder(folder / "theirs")}
    model = importing.derive(folders) | {"padded_vocab_size": 64}
    constructor = instantiate(model, _convert_="all")
    assert importing.import_folders(folders, model, constructor, folder / "ours") == []
    return model


def train(
    rank: int, world: int, init: str, layout: dict[str, Any], model: Any, start: Path, to: Path
) -> int:
    """Train from the import and save with the optimizer; whether this rank holds all its state."""
    from nvmm.checkpoint.load import load_weights

    # A large epsilon: else Adam makes steps of full size of gradients that are rounding alone, as a
    # key bias has.
    run = Run(rank, world, init, layout, {"warmup_steps": 0, "eps": 1e-4})
    assert load_weights(start, run.chunks) == []
    run.optimizer.reload_parameters()
    run.train(0, _STEPS)
    checkpoint = run.checkpoint(to)
    checkpoint.save(_STEPS, run.chunks, run.optimizer, {"config": {"model": model}})
    checkpoint.finalize(blocking=True)
    return run.data_size


def test_a_run_from_an_import_exports_the_same_from_four_ranks(tmp_path: Path) -> None:
    """TP 2 x PP 2 with the distributed optimizer against one rank: exports agree to 1e-5."""
    model = import_tiny(tmp_path)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    for number, sizes in ((1, {}), (4, layout)):
        to = tmp_path / f"run{number}"
        run_ranks(train, number, sizes, model, tmp_path / "ours", to)
        saved = models.open_checkpoint(to / f"step_{_STEPS:08d}")
        exporting.export(saved, tmp_path / f"back{number}", "qwen2")
    one, four = (load_file(tmp_path / f"back{n}" / "model.safetensors") for n in (1, 4))
    start = load_file(tmp_path / "theirs" / "model.safetensors")
    assert one.keys() == four.keys() == start.keys()
    for name, value in one.items():
        assert not torch.equal(value, start[name]), f"{name} was not trained"
        # A bias starts at 0: its size is that of weights drawn with 0.02.
        scale = max(float(value.norm()), 0.02 * value.numel() ** 0.5)
        gap = float((value - four[name]).norm()) / scale
        assert gap < 1e-5, f"{name}: {gap}"
