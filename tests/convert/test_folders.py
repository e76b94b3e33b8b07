"""Folders as they are published: files, names, spellings and dtypes that Transformers reads too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from nvmm.convert import importing, models
from nvmm.convert.formats.all import FORMATS
from nvmm.convert.formats.standard import standard
from nvmm.convert.safetensors import INDEX, SafetensorsSource
from nvmm.convert.sources import InMemory, read
from nvmm.convert.verify import compare_tensors
from nvmm.parallel.parameters import initialize, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision
from tests.convert import families
from tests.convert.test_families import TOKENS, imported, logits
from tools.convert import main

LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {"rope_scaling": {"rope_theta": 500.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 70.0},
    {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 70.0},
    {"rope_parameters": {"rope_theta": 500.0, "type": "linear", "factor": 2.0}},
    {"rope_parameters": LINEAR, "rope_theta": 70.0},
    {"rope_theta": 70.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default"}},
    {},
]
PARTIAL: list[dict[str, Any]] = [
    {"partial_rotary_factor": 0.4},
    {"partial_rotary_factor": 0.4, "rope_parameters": {"partial_rotary_factor": 0.8}},
    {"rope_scaling": {"partial_rotary_factor": 0.8}, "rope_parameters": {"rope_theta": 5.0}},
    {"rope_scaling": LINEAR, "partial_rotary_factor": 0.8},
]


def frequencies(kind: str, raw: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The inverse frequencies of our model of a config.json, and of Transformers'."""
    import transformers

    raw = {k: v for k, v in families._SHAPE.items() if k != "rope_theta"} | raw
    title = kind.capitalize()
    config = getattr(transformers, f"{title}Config").from_dict(json.loads(json.dumps(raw)))
    theirs = getattr(transformers, f"{title}Model")(config).rotary_emb.inv_freq
    model = FORMATS[kind].to_model({"model_type": kind, **raw})
    ours = instantiate(model, _convert_="all")(chunk=Parallel().chunks(Precision())[0])
    scale = model.get("seq_len_interpolation_factor") or 1.0
    return ours.rotary_pos_emb.inv_freq / scale, theirs


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "nemotron"])
def test_rope_is_read_in_every_spelling(kind: str) -> None:
    for rope in [*ROPES, *(PARTIAL if kind == "nemotron" else [])]:
        ours, theirs = frequencies(kind, {"num_hidden_layers": 1, **rope})
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6, msg=f"{kind} {rope}")


def test_a_partial_factor_that_transformers_cannot_scale_is_refused() -> None:
    raw = {"model_type": "llama", **families._SHAPE, "rope_scaling": LINEAR}
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 is not supported with"):
        FORMATS["llama"].to_model({**raw, "partial_rotary_factor": 0.5})


def test_fields_that_are_left_out_are_those_of_the_class() -> None:
    """Mistral's class has 8 groups, SigLIP's and CLIP's their base models, OpenGVLab's the 6B."""
    mistral = FORMATS["mistral"].to_model({"model_type": "mistral"})
    assert mistral["transformer"]["num_query_groups"] == 8
    assert mistral["transformer"]["ffn_hidden_size"] == 14336
    for kind, patch in (("siglip", 16), ("clip", 32)):
        sizes = {"hidden_size": 96, "num_attention_heads": 6}
        for raw in (
            {"model_type": kind, "vision_config": sizes},
            {"model_type": f"{kind}_vision_model", **sizes},
        ):
            model = FORMATS[kind].to_model(raw)
            assert (model["image_size"], model["patch_size"]) == (224, patch)
            assert model["transformer"]["ffn_hidden_size"] == 3072
            assert model["transformer"]["kv_channels"] == 16
    old = {"model_type": "clip", "vision_config_dict": {"patch_size": 8}}
    assert FORMATS["clip"].to_model(old)["patch_size"] == 8
    internvit = FORMATS["internvit"].to_model({"model_type": "intern_vit_6b"})
    assert internvit["transformer"]["num_attention_heads"] == 25
    assert FORMATS["whisper"].to_model({"model_type": "whisper"})["max_source_positions"] == 1500


def test_reading_a_config_twice_changes_nothing() -> None:
    for raw in (
        {"model_type": "nemotron", "rope_scaling": LINEAR, "partial_rotary_factor": 0.4},
        {"model_type": "clip", "vision_config_dict": {"patch_size": 8}, "projection_dim": 32},
    ):
        assert standard(standard(raw)) == standard(raw)
    with pytest.raises(ValueError, match="no class of model_type='none'"):
        standard({"model_type": "none"})


def variant(folder: Path) -> None:
    """Another precision in shards, as openai/whisper has it."""
    tensors = {name: value * 2 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.fp32-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.fp32-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.fp32.json").write_text(json.dumps(index))


def consolidated(folder: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")


def adapter(folder: Path) -> None:
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors"
    )


def pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def both(folder: Path) -> None:
    """An index of other values beside the single file, which Transformers takes first."""
    tensors = {name: value * 2 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def unlisted(folder: Path) -> None:
    """Shards and an index that forgets one tensor and lists one that is not there."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    del weight_map["model.norm.weight"]
    weight_map["lm_head.weight"] = "model-00001-of-00001.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def named(folder: Path) -> None:
    """config.json names the file, which is not the usual one."""
    variant(folder)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "mine.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


def alone(folder: Path) -> None:
    """A tied model whose one stored name is the alias."""
    import transformers

    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))
    assert "model.embed_tokens.weight" not in load_file(folder / "model.safetensors")


def unprefixed(folder: Path) -> None:
    """A base model's names."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KINDS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "variant": (variant, {"model.fp32-00001-of-00001.safetensors"}),
    "consolidated": (consolidated, {"consolidated.safetensors"}),
    "adapter": (adapter, {"adapter_model.safetensors"}),
    "pickles": (pickles, {"pytorch_model.bin"}),
    "both": (both, {"model-00001-of-00001.safetensors"}),
    "unlisted": (unlisted, set()),
    "named": (named, {"model.safetensors", "model.fp32-00001-of-00001.safetensors"}),
    "alone": (alone, set()),
    "unprefixed": (unprefixed, set()),
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_folder_is_read_as_transformers_reads_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensor for tensor, and every file that was not read is named."""
    import transformers

    families.language("qwen2_tied", tmp_path / "theirs")
    change, unread = KINDS[name]
    change(tmp_path / "theirs")
    loaded, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not info["missing_keys"]
    loaded.save_pretrained(tmp_path / "loaded")
    arguments = ["import", "--from", str(tmp_path / "theirs"), "--to", str(tmp_path / "ours")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert unread == {Path(x).name for x in out.splitlines() if x.startswith("not read: ")}
    folder, ours = (
        models.open_folder(tmp_path / "loaded"),
        models.open_checkpoint(tmp_path / "ours"),
    )
    report = compare_tensors(folder, ours)
    assert report["equal"] == report["tensors"] == 16, report


def test_a_folder_of_variants(tmp_path: Path) -> None:
    """One alone is read; two are refused with both names."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    assert list(SafetensorsSource(tmp_path).spec) == ["w"]
    save_file({"w": torch.ones(2)}, tmp_path / "model.fp32.safetensors")
    with pytest.raises(ValueError, match=r"model\.fp16\.safetensors, model\.fp32\.safetensors"):
        SafetensorsSource(tmp_path)
    for name, message in (("../model.safetensors", "outside"), ("model.bin", "no safetensors")):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(ValueError, match=message):
            SafetensorsSource(tmp_path)


@pytest.mark.usefixtures("world")
def test_a_base_model_gets_an_output_layer_from_the_seed(tmp_path: Path) -> None:
    reference = families.language("mistral", tmp_path / "causal")
    reference.model.save_pretrained(tmp_path / "theirs")
    assert "embed_tokens.weight" in load_file(tmp_path / "theirs" / "model.safetensors")
    folders = {"": models.open_folder(tmp_path / "theirs")}
    model = importing.derive(folders)
    constructor = instantiate(model, _convert_="all")
    initialised = importing.import_folders(folders, model, constructor, tmp_path / "ours", seed=5)
    assert initialised == ["output_layer.weight"]
    expected = constructor(chunk=Parallel().chunks(Precision())[0])
    initialize(expected, seed=5)
    [head] = [p for p in sharded_parameters(expected) if p.name == "output_layer.weight"]
    saved = models.open_checkpoint(tmp_path / "ours")
    assert torch.equal(read(saved.source, "output_layer.weight"), head.parameter)
    # All other weights are the base model's: with its own head it answers as before.
    with torch.no_grad():
        reference.lm_head.weight.copy_(head.parameter[: families.VOCABULARY])
        theirs = reference(TOKENS).logits
    ours = logits(0, 1, None, {}, model, tmp_path / "ours")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # A whole model that lacks its head is damaged.
    tensors = load_file(tmp_path / "causal" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "causal" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        imported(tmp_path / "causal", tmp_path / "none")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "bias"])
def test_parts_of_several_dtypes_are_imported(part: str, tmp_path: Path) -> None:
    """A fused tensor has the dtype that holds all of its parts, and each part's values."""
    families.language("qwen2", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {
        name: value.to(torch.float32 if part in name else torch.bfloat16)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["import", "--from", str(file.parent), "--to", str(tmp_path / "ours")]) == 0
    back = tmp_path / "back"
    arguments = ["--from", str(tmp_path / "ours"), "--to", str(back), "--format", "qwen2"]
    assert main(["export", *arguments]) == 0
    for name, value in load_file(back / "model.safetensors").items():
        assert torch.equal(value.double(), tensors[name].double()), name


class Lying(InMemory):
    """A source whose blocks are not of the dtype that it announces."""

    def __init__(self, tensors: dict[str, Tensor], announced: torch.dtype) -> None:
        super().__init__(tensors)
        self.spec = {name: spec.to(announced) for name, spec in self.spec.items()}


def test_what_does_not_verify_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a block of another dtype nor bytes that do not read back become a checkpoint."""
    source = Lying({"w": torch.ones(4, dtype=torch.bfloat16)}, torch.float32)
    with pytest.raises(ValueError, match=r"w: a block of torch\.bfloat16"):
        models.write_weights(tmp_path, source, "import", 1)
    (tmp_path / "__0_0.distcp").unlink()
    families.language("qwen2", tmp_path / "theirs")
    ours = str(tmp_path / "ours")
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0

    def damaged(name: str, real: Callable[..., Any], pattern: str) -> None:
        def write(folder: Path, *arguments: Any, **options: Any) -> Any:
            out = real(folder, *arguments, **options)
            [file] = folder.glob(pattern)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            return out

        monkeypatch.setattr(name, write)

    from nvmm.convert import distributed, safetensors

    damaged("nvmm.convert.models.write_distributed", distributed.write_distributed, "*.distcp")
    damaged("nvmm.convert.exporting.write_safetensors", safetensors.write_safetensors, "model.*")
    for arguments in (
        ["import", "--from", str(tmp_path / "theirs")],
        ["reshard", "--from", ours],
        ["export", "--from", ours, "--format", "qwen2"],
    ):
        assert main([*arguments, "--to", str(tmp_path / "bad")]) == 2
        assert "does not read back as it was written" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours"}
