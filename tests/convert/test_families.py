"""Transformers -> ours -> Transformers: bit-equal; logits and features close at every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from nvmm.batch import Media
from nvmm.checkpoint.load import load_weights
from nvmm.convert import exporting, importing, models
from nvmm.convert.formats.all import FORMATS
from nvmm.parallel.setup import Parallel, Precision
from tests.convert import families
from tests.models.test_language import batch_of
from tests.ranks import run_ranks

TOKENS = torch.arange(24).view(2, 12) * 37 % families.VOCABULARY


def imported(source: Path, to: Path, **options: Any) -> dict[str, Any]:
    """Import one folder as it is; returns our model config."""
    folders = {"": models.open_folder(source)}
    model = importing.derive(folders)
    constructor = instantiate(model, _convert_="all")
    assert importing.import_folders(folders, model, constructor, to, **options) == []
    return model


def as_trained(checkpoint: Path) -> Path:
    """Make an import look as if a run had left it, which says nothing of sources."""
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    del state["sources"]
    models.write_state(checkpoint, state)
    return checkpoint


def exported(source: Path, to: Path, name: str, **options: Any) -> dict[str, Tensor]:
    exporting.export(models.open_checkpoint(source), to, name, **options)
    return load_file(to / "model.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def logits(
    rank: int, world: int, init: str | None, layout: dict[str, int], model: Any, path: Path
) -> Tensor | None:
    """The imported model's logits at a layout; None but on the last stage of rank 0's group."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    parallel = Parallel(**layout)
    if init is not None:
        parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    precision = Precision()
    [chunk] = [
        instantiate(model, _convert_="all")(chunk=c).eval() for c in parallel.chunks(precision)
    ]
    assert load_weights(path, [chunk]) == []
    batch = batch_of(list(TOKENS))
    with torch.no_grad():
        if layout.get("pipeline_model_parallel_size", 1) == 1:
            return chunk(batch, output="logits")
        peers = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), chunk.config)
        shape = (12, 2, chunk.config.hidden_size)
        if parallel_state.is_pipeline_first_stage():
            peers.send_forward(chunk(batch, output="logits"), False)
            return None
        chunk.set_input_tensor(peers.recv_forward(shape, False))
        return chunk(batch, output="logits")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", sorted(families.MODELS))
def test_language_models_come_back_bit_equal(name: str, tmp_path: Path) -> None:
    reference = families.language(name, tmp_path / "theirs")
    original = load_file(tmp_path / "theirs" / "model.safetensors")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    assert model["padded_vocab_size"] == 512
    with torch.no_grad():
        theirs = reference(TOKENS).logits
    ours = logits(0, 1, None, {}, model, tmp_path / "ours")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    kind = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"]
    assert_equal(exported(tmp_path / "ours", tmp_path / "back", kind), original)
    from transformers import AutoConfig

    back = type(reference)(AutoConfig.from_pretrained(tmp_path / "back")).eval()
    rope = getattr(reference.config, "rope_parameters", {})
    assert {name: back.config.rope_parameters[name] for name in rope} == rope
    assert back.config.max_position_embeddings == reference.config.max_position_embeddings
    unmatched = back.load_state_dict(
        load_file(tmp_path / "back" / "model.safetensors"), strict=False
    )
    tied = ["lm_head.weight"] if back.config.tie_word_embeddings else []
    assert (unmatched.missing_keys, unmatched.unexpected_keys) == (tied, [])
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, theirs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral", {"window_size": [3, 0]}),
        ("qwen2_windows", {"window_size": [2, 0], "window_attn_skip_freq": [0, 1]}),
        ("qwen2_layer_types", {"window_size": [4, 0], "window_attn_skip_freq": [1, 0, 1]}),
    ],
)
def test_windows_are_written_back(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """Their logits are compared above; without the window they are others."""
    reference = families.language(name, tmp_path / "theirs")
    hf = json.loads((tmp_path / "theirs" / "config.json").read_text())
    family = FORMATS[hf["model_type"]]
    model = family.to_model(hf)
    assert {k: v for k, v in model["transformer"].items() if "window" in k} == expected
    fields = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"} & {*hf}
    if name == "qwen2_layer_types":
        fields.remove("max_window_layers")  # Transformers reads it only without layer_types
    back = family.from_model(model)
    assert {key: back[key] for key in fields} == {key: hf[key] for key in fields}
    # Every second layer, said as mcore's number, is the same graph.
    if name == "qwen2_layer_types":
        period = model | {"transformer": model["transformer"] | {"window_attn_skip_freq": 2}}
        assert family.from_model(period)["layer_types"] == hf["layer_types"]
    for other in ("llama", "nemotron", *(["mistral"] if "skip" in str(expected) else [])):
        with pytest.raises(ValueError, match=f"--format {other} cannot express"):
            FORMATS[other].from_model(model)
    reference.config.sliding_window = None
    reference.config.layer_types = ["full_attention"] * reference.config.num_hidden_layers
    with torch.no_grad():
        full = type(reference)(reference.config)
        full.load_state_dict(reference.state_dict())
        theirs = type(reference).from_pretrained(tmp_path / "theirs")
        assert (full.eval()(TOKENS).logits - theirs(TOKENS).logits).abs().max() > 0.1


LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2}}
FAMILIES = (
    "qwen2",
    "qwen2_tied",
    "llama2",
    "llama3",
    "mistral",
    "nemotron",
    "qwen2_windows",
    "qwen3",
    "llama3_1",
    "qwen2_yarn",
    "llama_longrope",
    "opt",
)


def imported_logits(
    rank: int, world: int, init: str, layout: dict[str, int], imports: list[tuple[Any, Path]]
) -> list[Tensor | None]:
    """`logits` of several imports in one world."""
    outputs = []
    for number, (model, path) in enumerate(imports):
        outputs.append(logits(rank, world, init if number == 0 else None, layout, model, path))
    return outputs


@pytest.mark.parametrize("layout", ["pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_imports_load_at_other_layouts(layout: str, tmp_path: Path) -> None:
    expected, imports = [], []
    for name in FAMILIES:
        reference = families.language(name, tmp_path / name / "theirs")
        path = tmp_path / name / "ours"
        imports.append((imported(tmp_path / name / "theirs", path, workers=2), path))
        with torch.no_grad():
            expected.append(reference(TOKENS).logits)
    last = run_ranks(imported_logits, 2, LAYOUTS[layout], imports)[-1]
    for name, ours, theirs in zip(FAMILIES, last, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


_GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    print(*out[0, -8:].tolist())
"""


@pytest.mark.usefixtures("world")
def test_exports_generate_as_we_do_in_a_process_without_nvmm(tmp_path: Path) -> None:
    """Greedy tokens of every family: from_pretrained and generate against ours."""
    from nvmm.batch import Sample, Text
    from nvmm.inference.decoding import generate

    prompt = Sample((Text(TOKENS[0], torch.zeros(len(TOKENS[0]))),))
    ours, folders = [], []
    for name in FAMILIES:
        families.language(name, tmp_path / name / "theirs")
        path = tmp_path / name / "ours"
        model = imported(tmp_path / name / "theirs", path)
        [chunk] = Parallel().chunks(Precision())
        module = instantiate(model, _convert_="all")(chunk=chunk).eval()
        assert load_weights(path, [module]) == []
        [tokens] = generate([module], [prompt], max_new_tokens=8, stop_ids=[], pad_id=0)
        ours.append(list(tokens))
        kind = json.loads((tmp_path / name / "theirs" / "config.json").read_text())["model_type"]
        folders.append(tmp_path / name / "back")
        exported(path, folders[-1], kind)
    script = _GENERATE.replace("PROMPT", str(TOKENS[0].tolist()))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert not done.returncode, done.stderr
    theirs = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert dict(zip(FAMILIES, theirs, strict=True)) == dict(zip(FAMILIES, ours, strict=True))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("dummies", [0, 7])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["6B", "300M"])
def test_internvit_comes_back_bit_equal(qk_norm: bool, dummies: int, tmp_path: Path) -> None:
    """Dummy heads are dropped on import and are zeros in the model that has them."""
    reference, tensors = families.internvit(qk_norm, dummies)
    config = families.internvit_config(qk_norm)
    families.save(tmp_path / "theirs", config, tensors)
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    chunk = Parallel().chunks(Precision())[0]
    ours = instantiate(model, _convert_="all")(chunk=chunk).eval()
    assert load_weights(tmp_path / "ours", [ours]) == []
    generator = torch.Generator().manual_seed(3)
    tiles = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (ours.image_mean, ours.image_std))
    with torch.no_grad():
        theirs = reference((tiles.float() / 255 - mean) / std).last_hidden_state[:, 1:]
        torch.testing.assert_close(ours(tiles), theirs, atol=1e-4, rtol=1e-5)
    _, plain = families.internvit(qk_norm)
    assert_equal(exported(tmp_path / "ours", tmp_path / "back", "internvit"), plain)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in config} == config


@pytest.mark.usefixtures("world")
def test_nvlm_d_comes_back_bit_equal(tmp_path: Path) -> None:
    config, tensors = families.nvlm_d(tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours", workers=2)
    assert model["connector"]["hidden_size"] == 92
    assert_equal(exported(tmp_path / "ours", tmp_path / "back", "nvlm_d"), tensors)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in config if "_config" not in key} == {
        key: config[key] for key in config if "_config" not in key
    }
    assert back["llm_config"]["vocab_size"] == families.VOCABULARY
    # One part alone, in its own format.
    language = exported(tmp_path / "ours", tmp_path / "part", "qwen2", part="language")
    prefix = "language_model."
    expected = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert_equal(language, expected)


@pytest.mark.usefixtures("world")
def test_the_builder_of_an_import_has_its_model_s_sizes(tmp_path: Path) -> None:
    """Tokens of a tile are those that encoder and connector give, neither one nor all patches."""
    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    families.nvlm_d(tmp_path / "theirs")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
    train_byte_level_bpe(
        tmp_path / "theirs",
        ["What is it?"],
        vocab_size=300,
        special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    build = models.open_checkpoint(tmp_path / "ours").state["config"]["data"]["train"]["build"]
    chunk = Parallel().chunks(Precision())[0]
    ours = instantiate(model, _convert_="all")(chunk=chunk).eval()
    tiles = torch.zeros(1, 3, build["tile_size"], build["tile_size"], dtype=torch.uint8)
    first = torch.zeros(1, dtype=torch.int64)
    count = build["tokens_per_tile"]
    with torch.no_grad():
        features = ours.encode("image", [Media(tiles, *[first] * 5, 0, count)])
    assert features.shape[1] == build["tokens_per_tile"] == 4


@pytest.mark.usefixtures("world")
def test_parts_compose_a_model(tmp_path: Path) -> None:
    """What no folder gives begins as a run from this seed would begin."""
    from nvmm.parallel.parameters import initialize, sharded_parameters

    families.language("qwen2", tmp_path / "language")
    _, vision = families.internvit(True)
    families.save(tmp_path / "vision", families.internvit_config(True), vision)
    folders = {p: models.open_folder(tmp_path / p) for p in ("language", "vision")}
    model = importing.derive(folders)
    constructor = instantiate(model, _convert_="all")
    initialised = importing.import_folders(folders, model, constructor, tmp_path / "ours", seed=5)
    assert initialised == [
        "connector.linear_fc1.layer_norm_bias",
        "connector.linear_fc1.layer_norm_weight",
        "connector.linear_fc1.weight",
        "connector.linear_fc2.weight",
    ]
    chunk = Parallel().chunks(Precision())[0]
    expected, loaded = constructor(chunk=chunk), constructor(chunk=chunk)
    initialize(expected, seed=5)
    assert load_weights(tmp_path / "ours", [loaded]) == []
    values = {p.name: p.parameter for p in sharded_parameters(expected)}
    for parameter in sharded_parameters(loaded):
        same = torch.equal(parameter.parameter, values[parameter.name])
        assert same == (parameter.name in initialised) or "layer_norm_bias" in parameter.name
    saved = models.open_checkpoint(tmp_path / "ours")
    assert saved.state["initialised"] == initialised
