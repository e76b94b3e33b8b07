"""Folders as they are published: files, names, spellings and dtypes that Transformers reads too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from nvmm.commands.convert import WRITTEN, main
from nvmm.convert import importing, models
from nvmm.convert.formats.all import FORMATS
from nvmm.convert.formats.standard import standard
from nvmm.convert.safetensors import INDEX, SafetensorsSource
from nvmm.convert.sources import InMemory, read
from nvmm.convert.verify import compare_tensors
from nvmm.inference.trust import require_trusted
from nvmm.parallel.parameters import initialize, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision
from tests.convert import families
from tests.convert.test_families import TOKENS, imported, logits

LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {k: v for k, v in families.LONG.items() if k != "original_max_position_embeddings"}
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
SCALED: list[dict[str, Any]] = [
    {"rope_parameters": families.YARN | {"rope_theta": 500.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 2}, "rope_theta": 70.0},
    # Phi-3's spelling: the original length beside the scaling.
    {"rope_scaling": LONG, "original_max_position_embeddings": 8},
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
    return ours.rotary.frequencies(torch.tensor(1)), theirs


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "nemotron"])
def test_rope_is_read_in_every_spelling(kind: str) -> None:
    scaled = [rope | {"head_dim": 10} for rope in SCALED]
    for rope in [*ROPES, *(PARTIAL if kind == "nemotron" else scaled)]:
        ours, theirs = frequencies(kind, {"num_hidden_layers": 1, **rope})
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6, msg=f"{kind} {rope}")


def test_a_partial_factor_that_transformers_cannot_scale_is_refused() -> None:
    raw = {"model_type": "llama", **families._SHAPE, "rope_scaling": LINEAR}
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 is not supported"):
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


def contradicted(folder: Path) -> None:
    """A head of its own in a model whose config says that it is tied."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
    "contradicted": (contradicted, set()),
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
    assert report["equal"] == report["tensors"], report
    assert report["tensors"] == (17 if name == "contradicted" else 16)
    assert not report["only_in_a"] + report["only_in_b"]


def test_a_model_with_an_adapter_over_it_is_refused(tmp_path: Path) -> None:
    """Transformers would load both: the model alone is another one."""
    families.language("qwen2", tmp_path / "theirs")
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="`adapter import`"):
        models.open_folder(tmp_path / "theirs")


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


CONFIGS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [{"model_type": "qwen2"}],
    "qwen3": [{"model_type": "qwen3"}],
    "llama": [{"model_type": "llama"}],
    "yi": [{"model_type": "llama"}],
    "mistral": [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": None, "sentence_pooling": "lasttoken"},
    ],
    "nemotron": [{"model_type": "nemotron"}],
    "opt": [{"model_type": "opt"}],
    "internvit": [{"model_type": "intern_vit_6b"}],
    "internvl": [
        {
            "model_type": "internvl",
            "text_config": {"model_type": kind},
            "vision_config": {"use_qk_norm": norm},
        }
        for kind, norm in (("qwen2", False), ("qwen3", False), ("llama", True))
    ],
    "internvl_vision": [{"model_type": "internvl_vision"}],
    "clap": [{"model_type": "clap"}, {"model_type": "clap_audio_model"}],
    "clip": [
        {"model_type": "clip", "vision_config": {"hidden_act": act}}
        for act in ("quick_gelu", "gelu", "gelu_pytorch_tanh")
    ],
    "siglip": [{"model_type": "siglip"}, {"model_type": "siglip_vision_model"}],
    "whisper": [{"model_type": "whisper"}],
    "nvlm_d": [
        {"llm_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "intern_vit_6b"}}
    ],
    "audio_flamingo3": [{"model_type": "audioflamingo3"}],
    "llava": [
        {"model_type": "llava"},
        {
            "model_type": "llava",
            "vision_config": {"model_type": "siglip_vision_model"},
            "vision_feature_select_strategy": "full",
        },
    ],
    "llava_next": [{"model_type": "llava_next"}],
    "vila": [
        {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": kind}
        for kind in ("linear", "mlp2x_gelu")
    ],
    "vila15": [
        {
            "llm_cfg": {"model_type": "llama"},
            "vision_tower_cfg": {"model_type": "siglip_vision_model", "hidden_size": 768},
            "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
        }
    ],
    "nv_embed": [{"text_config": {"model_type": "bidir_mistral", "sliding_window": None}}],
    "bert": [{"model_type": "bert"}],
    "mm_embed": [
        {
            "text_config": {"model_type": "mistral", "sliding_window": None},
            "vision_config": {"model_type": "clip_vision_model"},
            "latent_attention_config": latent,
        }
        for latent in ({}, None)
    ],
    "projector": [{"text_config": {"model_type": "llama"}}],
    "llama_reward": [{"model_type": "llama"}],
    "mistral_reward": [{"model_type": "mistral", "sliding_window": None}],
    "nemotron_reward": [{"model_type": "nemotron"}],
    "qwen2_reward": [{"model_type": "qwen2"}],
}


def test_every_config_of_the_importer_is_trusted() -> None:
    """Ours are opened without trust_config=true, or whoever imported could not go on."""
    ours = {name for name in FORMATS if not name.startswith("megatron")}
    assert ours == CONFIGS.keys()
    assert {name for name in ours if hasattr(FORMATS[name], "from_model")} == {
        *WRITTEN,
        *("projector", "llava_next"),
    }
    for name, configs in CONFIGS.items():
        for config in configs:
            require_trusted(FORMATS[name].to_model(config), Path(name))
    gelu = {"_target_": "torch.nn.functional.gelu", "approximate": "tanh"}
    require_trusted({**gelu, "_partial_": True}, Path("x"))
    for strange in (
        gelu,
        {"_target_": "torch.nn.functional.torch.os.system", "_partial_": True},
        {"_target_": "torch.load", "_partial_": True},
        {"_target_": "torch.nn.functional.torch.from_file", "_partial_": True},
    ):
        with pytest.raises(ValueError, match="--trust-config"):
            require_trusted(strange, Path("x"))


def test_fp16_refuses_an_overflow_and_counts_an_underflow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """By import, reshard and export; 65504 and 65519 still fit, 65520 is infinite."""
    families.language("qwen2", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    values = tensors["model.layers.1.mlp.up_proj.weight"]
    values.zero_()[:, 0] = 1.0
    values[0, :6] = torch.tensor([65519.0, -65504.0, 1e-9, 6.2e-5, 3e-6, 2.0**-24])
    tensors = {k: v.half().float() if v is not values else v for k, v in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    ours, half = ["--from", str(tmp_path / "ours")], ["--dtype", "fp16"]
    assert main(["import", "--from", str(file.parent), "--to", ours[1]]) == 0
    commands = {
        "import": ["import", "--from", str(file.parent)],
        "reshard": ["reshard", *ours],
        "export": ["export", *ours, "--format", "qwen2"],
    }
    for name, arguments in commands.items():
        caplog.clear()
        assert main([*arguments, *half, "--to", str(tmp_path / name)]) == 0
        [line] = [r.getMessage() for r in caplog.records if "too small" in r.getMessage()]
        assert line.startswith(f"{name}: of ")
        assert "values 1 were too small" in line and "zero, 1 more lost digits" in line
    caplog.clear()
    assert main([*commands["reshard"], "--dtype", "bf16", "--to", str(tmp_path / "bf16")]) == 0
    assert "too small" not in caplog.text
    values[0, 0] = 65520.0
    save_file(tensors, file, metadata={"format": "pt"})
    big = tmp_path / "big"
    assert main(["import", "--from", str(file.parent), "--to", str(big)]) == 0
    commands["reshard"][2] = commands["export"][2] = str(big)
    for arguments in commands.values():
        capsys.readouterr()
        assert main([*arguments, *half, "--to", str(tmp_path / "none")]) == 2
        assert (
            "1 values, up to 65520, are beyond torch.float16's largest" in capsys.readouterr().err
        )
        assert not (tmp_path / "none").exists()


def test_a_mean_is_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints that differ in anything the outputs depend on have none."""
    families.language("qwen2", tmp_path / "theirs")
    first = tmp_path / "first"
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", str(first)]) == 0

    def average(name: str, change: Callable[[dict[str, Any]], None]) -> tuple[int, str]:
        second = tmp_path / name
        shutil.copytree(first, second)
        state = json.loads((second / "state.json").read_text())["state"]
        change(state)
        models.write_state(second, state)
        capsys.readouterr()
        both = ["--from", str(first), "--from", str(second)]
        code = main(["average", *both, "--to", str(tmp_path / f"{name}_mean")])
        return code, capsys.readouterr().err

    def model(state: dict[str, Any]) -> dict[str, Any]:
        return state["config"]["model"]

    for name, change, message in (
        ("rope", lambda s: model(s).update(rotary_base=5), "model.rotary_base=10000 in"),
        ("rows", lambda s: model(s).update(vocab_size=500), "model.vocab_size=509 in"),
        ("length", lambda s: model(s).update(max_sequence_length=9), "max_sequence_length=128"),
        ("eps", lambda s: model(s)["transformer"].update(layernorm_epsilon=1.0), "epsilon=1e-06"),
        ("class", lambda s: model(s).update(_target_="nvmm.models.x.X"), "model._target_="),
    ):
        code, text = average(name, change)
        assert code == 2 and "not of one model" in text and message in text, text
        assert str(first) in text and str(tmp_path / name) in text
        assert not (tmp_path / f"{name}_mean").exists()
    # What acts in training alone, and a default that one of them writes out, may differ.
    code, text = average(
        "alike",
        lambda s: (
            model(s)["transformer"].update(hidden_dropout=0.1, init_method_std=0.5),
            model(s).update(rotary_percent=1.0),
        ),
    )
    assert code == 0, text
    state = json.loads((first / "state.json").read_text())["state"]
    models.write_state(first, state | {"tokenizer_digest": "a"})
    code, text = average("words", lambda s: s.update(tokenizer_digest="b"))
    assert code == 2 and "tokenizer (digest)='a' in" in text


def test_verify_takes_a_part_and_rows_of_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part's folder is compared with that part of a checkpoint, either way round."""
    families.nvlm_d(tmp_path / "theirs")
    ours = str(tmp_path / "ours")
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0
    for part, kind in (("language", "qwen2"), ("vision", "internvit")):
        folder = str(tmp_path / part)
        arguments = ["--from", ours, "--to", folder, "--format", kind, "--part", part]
        assert main(["export", *arguments]) == 0
        for a, b in ((folder, ours), (ours, folder)):
            capsys.readouterr()
            assert main(["verify", "--a", a, "--b", b]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["equal"] == report["tensors"] > 0 and report["same"]
            assert isinstance(report["logits"], str) == (part == "vision")
    file = tmp_path / "tokens.json"
    pair = ["verify", "--a", str(tmp_path / "language"), "--b", ours, "--tokens", str(file)]
    for text, message in (
        ("[1, 2, 3]", None),
        ("[[1, 2], [3, 4]]", None),
        ("[[1, 2], [3]]", "all of one length"),
        ("[[1, 2.5]]", "must be a list of rows of ids"),
        ("[]", "must be a list of rows of ids"),
        ('{"a": 1}', "must be rows of ids"),
        ("[1, 509]", "below 509"),
        ("[-1]", "at least 0"),
        ("{", "must be rows of ids"),
    ):
        file.write_text(text)
        assert main(pair) == (2 if message else 0), text
        assert (message or "") in capsys.readouterr().err


def test_a_tower_has_no_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.tower("siglip", tmp_path / "theirs")
    ours = str(tmp_path / "ours")
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0
    capsys.readouterr()
    assert main(["verify", "--a", str(tmp_path / "theirs"), "--b", ours]) == 0
    assert "not compared" in json.loads(capsys.readouterr().out)["logits"]
