"""tools/convert.py end to end: what it imports answers like Transformers, and comes back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvmm.checkpoint.record import write_record
from nvmm.commands.convert import main
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from tests.convert import families
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Qwen2 with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "theirs"
    model = families.language("qwen2", folder)
    train_byte_level_bpe(
        folder,
        ["What is it?"],
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    return folder, model


@pytest.fixture(scope="module")
def ours(theirs: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ckpt") / "ours"
    assert main(["import", "--from", str(theirs[0]), "--to", str(path), "--workers", "2"]) == 0
    return path


def answer(rank: int, world: int, init: str, path: Path) -> tuple[list[int], list[int]]:
    """Prompt and greedy answer of what `evaluate` and `generate` restore at TP 2."""
    from nvmm.generate import members
    from nvmm.inference.decoding import generate
    from nvmm.inference.restore import restore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", init, rank=rank, world_size=world)
    restored = restore(path, parallel={"tensor_model_parallel_size": 2}, seed=1)
    prompt = restored.builder.prompt(members("What is it?", None))
    [tokens] = generate(
        restored.model, [prompt], max_new_tokens=8, stop_ids=[], pad_id=restored.tokenizer.pad_id
    )
    return prompt.text.tokens.tolist(), list(tokens)


def test_a_moved_import_answers_like_transformers(
    theirs: tuple[Path, Any], ours: Path, tmp_path: Path
) -> None:
    """Its tokenizer lies in it, whatever path its state has from where it was made."""
    shutil.copytree(ours, tmp_path / "moved")
    text = (ours / "state.json").read_text()
    assert str(ours / "tokenizer") in text
    gone = text.replace(str(ours / "tokenizer"), str(tmp_path / "gone"))
    write_record(tmp_path / "moved", json.loads(gone))
    prompt, tokens = run_ranks(answer, 2, tmp_path / "moved")[0]
    with torch.no_grad():
        out = theirs[1].generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1
        )
    assert out[0, len(prompt) :].tolist() == tokens


def test_verify_finds_them_equal_and_different(
    theirs: tuple[Path, Any], ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--a", str(theirs[0]), "--b", str(ours)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((ours / "verify.json").read_text())
    assert report["same"] and report["equal"] == report["tensors"] == 17
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["logits"]["max_difference"] < 1e-4 and abs(report["logits"]["kl"]) < 1e-6

    back = tmp_path / "back"
    assert main(["export", "--from", str(ours), "--to", str(back), "--format", "qwen2"]) == 0
    files = {"config.json", "generation_config.json", "README.md", "tokenizer.json"}
    assert files <= {path.name for path in back.iterdir()}
    tensors = load_file(back / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, back / "model.safetensors")
    capsys.readouterr()
    assert main(["verify", "--a", str(ours), "--b", str(back)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["different"] == {"decoder.layers.1.mlp.linear_fc1.weight": 0.5}
    assert report["logits"]["max_difference"] > 1e-3 and report["logits"]["kl"] > 0


def test_verify_shows_a_composite_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVLM-D: the export sees pictures as the checkpoint does, until its projector differs."""
    families.nvlm_d(tmp_path / "theirs")
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0
    assert main(["export", "--from", ours, "--to", str(back), "--format", "nvlm_d"]) == 0
    capsys.readouterr()
    assert main(["verify", "--a", ours, "--b", str(back)]) == 0
    assert json.loads(capsys.readouterr().out)["logits"]["max_difference"] == 0.0
    tensors = load_file(back / "model.safetensors")
    tensors["mlp1.3.weight"] *= 1.5
    save_file(tensors, back / "model.safetensors")
    assert main(["verify", "--a", ours, "--b", str(back)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report["different"]) == ["connector.linear_fc2.weight"]
    assert report["logits"]["max_difference"] > 1e-3
    assert report == json.loads((back / "verify.json").read_text())


def test_inspect_reads_no_tensor(
    theirs: tuple[Path, Any], ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (theirs[0], ours):
        assert main(["inspect", str(path), "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["bytes"] == 4 * about["parameters"]
    assert about["tensors"]["embedding.word_embeddings.weight"] == ["float32", [512, 60]]
    assert about["optimizer"] is None and about["config"]["transformer"]["num_layers"] == 2
    assert main(["inspect", str(ours)]) == 0
    assert "digest: " + about["digest"] in capsys.readouterr().out


def test_reshard_and_average(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, mean = tmp_path / "half", tmp_path / "mean"
    assert main(["reshard", "--from", str(ours), "--to", str(half), "--dtype", "bf16"]) == 0
    both = ["--from", str(ours), "--from", str(ours)]
    assert main(["average", *both, "--to", str(mean)]) == 0
    capsys.readouterr()
    assert main(["verify", "--a", str(ours), "--b", str(mean), "--no-logits"]) == 0
    assert main(["verify", "--a", str(ours), "--b", str(half), "--no-logits"]) == 1
    saved = json.loads((half / "state.json").read_text())["state"]
    assert saved["config"]["tokenizer"]["path"] == str(half / "tokenizer")
    assert (half / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("given", ["model=language_tiny", "experiment=language/tiny"])
def test_a_given_config_is_kept(given: str, tmp_path: Path) -> None:
    families.language("language_tiny", tmp_path / "theirs")
    to = ["--to", str(tmp_path / "ours"), "--dtype", "bf16"]
    folder = ["--from", str(tmp_path / "theirs")]
    assert main(["import", *folder, *to, given, "model.transformer.num_layers=5"]) == 2
    assert main(["import", *folder, *to, given]) == 0
    config = json.loads((tmp_path / "ours" / "state.json").read_text())["state"]["config"]
    assert config["precision"]["dtype"] == "bf16"
    assert config["model"]["transformer"]["init_method_std"] == 0.02


def test_refusals(
    theirs: tuple[Path, Any], ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ["--to", str(tmp_path / "out")]
    folder = str(theirs[0])
    for arguments, message in (
        (["import", "--from", folder, *to, "model=language_tiny"], "hidden_size=60 in"),
        (["import", "--from", f"language={folder}", *to], "it must give language and vision"),
        (["import", "--from", folder, "--to", str(ours)], "exists already"),
        (["export", "--from", str(ours), *to, "--format", "llama"], "cannot express this model"),
        (["export", "--from", str(ours), *to, "--format", "nemotron"], "cannot express"),
        (["export", "--from", str(ours), *to, "--format", "nvlm_d"], "needs a model of language"),
        (["export", "--from", folder, *to, "--format", "qwen2"], "neither a complete checkpoint"),
        (["average", "--from", str(ours), *to], "average several"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "without a sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional' is not"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "hf: config.json: Transformers refuses it"),
        ({"rope_theta": None, "rope_parameters": None}, "has no rope_theta"),
        ({"rope_scaling": {"full_attention": {"rope_theta": 2.0}}}, "each kind of layer"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"model_type": "gpt2"}, "model_type='gpt2' has no table"),
        ({"num_hidden_layers": None}, "field 'num_hidden_layers'"),
    ],
)
def test_configs_we_cannot_run(
    theirs: tuple[Path, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((theirs[0] / "config.json").read_text()) | changes
    families.save(tmp_path / "hf", config, {"w": torch.zeros(1)})
    assert main(["import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "to")]) == 2
    assert message in capsys.readouterr().err
