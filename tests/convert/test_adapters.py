"""Adapters to and from PEFT, and into the weights; the PEFT library is the oracle."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from nvmm.batch import IMAGE, Batch
from nvmm.checkpoint.files import find, read_state
from nvmm.checkpoint.load import load_weights
from nvmm.checkpoint.record import write_record
from nvmm.commands.convert import main
from nvmm.config.check import config_dir
from nvmm.convert.adapters import MergedLora
from nvmm.convert.models import open_checkpoint
from nvmm.convert.sources import Cast, InMemory, read
from nvmm.convert.verify import compare_tensors
from nvmm.modules.connector import MLPConnector
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Normal, Parallel, Precision
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny
from tests.convert import families
from tests.models.test_language import batch_of
from tests.modules.test_lora import fit, losses
from tests.ranks import run_ranks

TP2_PP2 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers_in_first_pipeline_stage": 1,
    "sequence_parallel": True,
    "recompute_granularity": "full",
}


def restored(path: Path) -> Any:
    """A checkpoint's model with its adapters, in a world of one rank."""
    config = read_state(find(path))["config"]
    lora = instantiate(config.get("lora"), _convert_="all")
    model = instantiate(config["model"], _convert_="all")
    [chunk] = build_chunks(model, Parallel(), Precision(), adapt=lora.attach if lora else None)
    assert load_weights(find(path), [chunk]) == []
    return chunk.eval()


def logits(rank: int, world: int, init: str, paths: list[Path], batch: Batch) -> list[torch.Tensor]:
    """What each checkpoint answers; of a multimodal one also its embeddings [b, s, h]."""
    Parallel().initialize(seed=0, rank=rank, world_size=world, init_method=init)
    with torch.no_grad():
        models = [restored(path) for path in paths]
        found = [model(batch, output="logits") for model in models]
        if hasattr(models[0], "embed") and batch.media:
            found.append(models[0].embed(batch).transpose(0, 1).contiguous())
    return found


def transformers_model(folder: Path) -> Any:
    """As nvmm convert verify builds it: from_pretrained leaves RoPE unset on our CPU layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def peft_model(folder: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(transformers_model(folder), adapter).eval()


def tokens_batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    return batch_of(
        [torch.randint(0, families.VOCABULARY, (n,), generator=generator) for n in (9, 9)]
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 folder."""
    folder = tmp_path_factory.mktemp("hf") / "theirs"
    families.language("qwen2", folder)
    return folder


@pytest.fixture(scope="module")
def base(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ckpt") / "base"
    assert main(["import", "--from", str(theirs), "--to", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.k_proj": 2, "up_proj": 5},
            "alpha_pattern": {"up_proj": 10},
        },
        {"target_modules": ["o_proj", "lm_head"], "use_rslora": True},
    ],
    ids=["some of qkv", "ranks", "rslora"],
)
def test_an_adapter_of_peft_answers_alike_here_and_merged(
    options: dict[str, Any], theirs: Path, base: Path, tmp_path: Path
) -> None:
    import peft

    model = peft.get_peft_model(
        transformers_model(theirs), peft.LoraConfig(r=4, lora_alpha=6, **options)
    )
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    names = ["--format", "qwen2"]
    ours, merged = tmp_path / "ours", tmp_path / "merged"
    arguments = ["--from", str(tmp_path / "peft"), "--base", str(base), "--to", str(ours), *names]
    assert main(["adapter", "import", *arguments]) == 0
    assert main(["merge", "--from", str(ours), "--to", str(merged)]) == 0
    batch = tokens_batch()
    with torch.no_grad():
        expected = model.eval()(batch.tokens).logits
        plain = transformers_model(theirs)(batch.tokens).logits
    assert (expected - plain).abs().max() > 0.1
    found, after = run_ranks(logits, 1, [ours, merged], batch)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)

    back = tmp_path / "back"
    assert main(["adapter", "export", "--from", str(ours), "--to", str(back), *names]) == 0
    with torch.no_grad():
        again = peft_model(theirs, back)(batch.tokens).logits
        found = peft.AutoPeftModelForCausalLM.from_pretrained(back).eval()(batch.tokens).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    first, second = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("peft", "back")
    )
    if "rank_pattern" not in options:
        assert first.keys() <= second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        extra = [second[name] for name in second.keys() - first.keys()]
        assert not any(value.any() for value in extra), "members without an adapter are zero"


def test_the_base_of_an_exported_adapter_can_be_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that is no import has no folder of its own until it is exported."""
    run_ranks(lora_run, 1, tmp_path / "run", ["language.*"])
    run = ["--from", str(tmp_path / "run" / "step_00000001"), "--format", "qwen2"]
    run += ["--part", "language"]
    for name, given in (("none", []), ("given", ["--base", "me/base"])):
        to = tmp_path / name
        assert main(["adapter", "export", *run, "--to", str(to), *given]) == 0
        config = json.loads((to / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == (given[1] if given else None)
        assert ("name its folder with --base" in caplog.text) != bool(given)
        caplog.clear()


class OwnConnector(MLPConnector):
    """A part of the user's own."""


def test_a_model_with_a_part_of_its_own_can_be_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that refuses a config for its constructors takes the option that it names."""
    run_ranks(lora_run, 1, tmp_path / "run", ["language.*"])
    run = tmp_path / "run" / "step_00000001"
    text, known = (run / "state.json").read_text(), "nvmm.modules.connector.MLPConnector"
    assert known in text
    write_record(run, json.loads(text.replace(known, "tests.convert.test_adapters.OwnConnector")))
    names = ["--format", "qwen2", "--part", "language"]
    peft, merged = str(tmp_path / "peft"), str(tmp_path / "merged")
    for arguments in (
        ["adapter", "export", "--from", str(run), "--to", peft, *names],
        ["adapter", "import", "--from", peft, "--base", str(run), "--to", f"{peft}2", *names],
        ["merge", "--from", str(run), "--to", merged],
        ["verify", "--a", merged, "--b", merged],
    ):
        assert main(arguments) == 2
        assert "add trust_config=true (nvmm convert: --trust-config)" in capsys.readouterr().err
        assert main([*arguments, "--trust-config"]) == 0, capsys.readouterr().err


def test_an_update_is_added_in_fp32_and_rounded_once() -> None:
    """A fused weight of two members, many rows, in bf16 and in fp32."""
    torch.manual_seed(2)
    weight = torch.randn(6, 5_000_000 // 6).bfloat16()
    a, b = torch.randn(4, weight.shape[1]).bfloat16(), torch.randn(6, 2).bfloat16()
    mask = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    source = InMemory({"x.weight": weight, "x.lora_a": a, "x.lora_b": b, "y.weight": weight})
    update = torch.cat([b[:3].float() @ a[:2].float(), b[3:].float() @ a[2:].float()])
    exact = weight.float() + 0.5 * update
    for dtype in (None, torch.float32):
        merged = Cast(MergedLora(source, {"x": mask}, 0.5), dtype, like=source.spec)
        assert merged.spec.keys() == {"x.weight", "y.weight"}
        assert len(list(merged.blocks("x.weight"))) > 1
        found = read(merged, "x.weight")
        assert found.dtype == merged.spec["x.weight"].dtype == (dtype or torch.bfloat16)
        if dtype is None:  # a sum in another order may round to the other neighbour
            assert (found != exact.bfloat16()).float().mean() < 1e-3
        else:
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(read(merged, "y.weight").bfloat16(), weight)


def lora_run(rank: int, world: int, init: str, folder: Path, targets: list[str]) -> None:
    """A checkpoint of the tiny NVLM-D with random adapters and no training."""
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.modules.lora import Lora
    from nvmm.parallel.parameters import sharded_parameters
    from tests.test_evaluate import NoOptimizer

    Parallel().initialize(seed=1, rank=rank, world_size=world, init_method=init)
    lora = tiny.lora(targets)
    adapters = Lora(**{k: v for k, v in lora.items() if k != "_target_"})

    def adapt(chunks: Any) -> None:
        adapters.attach(chunks)
        for sharded in sharded_parameters(chunks):
            if sharded.name.endswith(".lora_b"):
                Normal(0.1)(sharded.parameter)

    model = instantiate(tiny.multimodal(), _convert_="all")
    chunks = build_chunks(model, Parallel(), Precision(), seed=3, adapt=adapt)
    config = {"model": tiny.multimodal(), "lora": lora, "tokenizer": None}
    Checkpoint(directory=folder).save(1, chunks, NoOptimizer(), {"config": config})


def test_encoder_connector_and_dummy_heads_come_back(tmp_path: Path) -> None:
    """InternViT's fused qkv has one A in PEFT: three of ours stacked, 9 wide instead of 3."""
    run_ranks(lora_run, 1, tmp_path / "run", ["*linear*"])
    run = tmp_path / "run" / "step_00000001"
    for names in (["--format", "nvlm_d"], ["--format", "internvit", "--part", "vision"]):
        folder, again = tmp_path / names[1], tmp_path / f"again_{names[1]}"
        assert main(["adapter", "export", "--from", str(run), "--to", str(folder), *names]) == 0
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == 3 and set(config["rank_pattern"].values()) == {9}
        base = ["--base", str(run), "--to", str(again), *names]
        assert main(["adapter", "import", "--from", str(folder), *base]) == 0
        ours, back = open_checkpoint(run), open_checkpoint(again)
        assert len(back.source.spec) == 2 * (8 + (18 if names[1] == "nvlm_d" else 0))
        for name in back.source.spec:
            assert torch.equal(read(ours.source, name), read(back.source, name)), name
    assert config["target_modules"] == ["fc1", "fc2", "proj", "qkv"]


def test_one_a_shared_by_fused_members_is_taken_over(tmp_path: Path) -> None:
    """Someone else's adapter of a fused qkv: its update is ours, with the A three times."""
    run_ranks(lora_run, 1, tmp_path / "run", ["*linear*"])
    run = tmp_path / "run" / "step_00000001"
    names = ["--format", "internvit", "--part", "vision"]
    module = "base_model.model.encoder.layers.1.attn.qkv."
    a, b = torch.randn(2, 80), torch.randn(3 * 5 * 16, 2)
    (tmp_path / "peft").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A.weight": a, "lora_B.weight": b}
    save_file(
        {module + name: value for name, value in factors.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    arguments = ["--base", str(run), "--to", str(tmp_path / "ours"), *names]
    assert main(["adapter", "import", "--from", str(tmp_path / "peft"), *arguments]) == 0
    source = open_checkpoint(tmp_path / "ours").source
    name = "vision.decoder.layers.1.self_attention.linear_qkv"
    assert torch.equal(read(source, f"{name}.lora_a"), a.repeat(3, 1))
    by_head = b.view(3, 5, 16, 2).transpose(0, 1).flatten(0, 2)
    assert torch.equal(read(source, f"{name}.lora_b"), by_head)
    lora = read_state(tmp_path / "ours")["config"]["lora"]
    assert (lora["targets"], lora["rank"], lora["alpha"]) == ([name], 2, 3.0)


def test_refusals(
    theirs: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(lora_run, 1, tmp_path / "run", ["language.*"])
    run = str(tmp_path / "run" / "step_00000001")
    to = ["--to", str(tmp_path / "out")]

    def folder(name: str, keys: list[str], **config: Any) -> str:
        path = tmp_path / name
        path.mkdir()
        text = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config)
        (path / "adapter_config.json").write_text(text)
        tensors = {f"base_model.model.{key}.weight": torch.zeros(1, 1) for key in keys}
        save_file(tensors, path / "adapter_model.safetensors")
        return str(path)

    q = "model.layers.0.self_attn.q_proj"
    both = [f"{q}.lora_A", f"{q}.lora_B"]
    into = ["--base", str(base), *to, "--format", "qwen2"]
    for arguments, message in (
        (["export", "--from", run, *to, "--format", "nvlm_d"], "put them into the weights with"),
        (["average", "--from", run, "--from", run, *to], "no mean of updates"),
        (["merge", "--from", str(base), *to], "has no LoRA adapters"),
        (["adapter", "export", "--from", run, *to, "--format", "internvit", "--part", "vision"],
         "no adapters in vision"),
        (["adapter", "import", "--from", run, *to, "--format", "qwen2"], "needs --base"),
        (["adapter", "import", "--from", folder("zero", both, lora_alpha=0), *into],
         "a scale of 0.0 adapts nothing"),
        (["adapter", "import", "--from", str(theirs), *into], "no readable adapter_config.json"),
        (["adapter", "import", "--from", folder("dora", both, use_dora=True), *into],
         "use_dora=True is not supported"),
        (["adapter", "import", "--from", folder("pissa", both, init_lora_weights="pissa"), *into],
         "init_lora_weights=pissa is not supported"),
        (["adapter", "import", "--from", folder("ia3", both, peft_type="IA3"), *into],
         "peft_type must be LORA"),
        (["adapter", "import", "--from", folder("half", both[:1]), *into], "A or B alone"),
        (["adapter", "import", "--from", folder("small", both), *into], "do not fit a weight of"),
        (["adapter", "import", "--from", folder("strange", ["a.lora_A", "a.lora_B"]), *into],
         "has no linear for: a"),
        (["adapter", "import", "--from", folder("more", [*both, "score"]), *into],
         "not the factors of a linear: base_model.model.score.weight"),
    ):  # fmt: skip
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nvlm_d_tiny_from_sft_to_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP2 x PP2 + SP with full recompute, stopped and resumed, exported, merged."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        model: Any = OmegaConf.to_container(compose("model/nvlm_d_tiny")["model"], resolve=True)
    model["language"] |= {"vocab_size": 509, "padded_vocab_size": 512}  # the synthetic batches'
    monkeypatch.setattr(tiny, "multimodal", lambda: model)
    lora = tiny.lora(["language.*linear_*"], rank=8, alpha=16.0)
    start, run, one = tmp_path / "start", tmp_path / "run", tmp_path / "one"
    run_ranks(fit_model, 1, model, start, 2, {}, None)
    run_ranks(fit_model, 1, model, one, 6, {}, lora, start)
    run_ranks(fit_model, 4, model, run, 3, TP2_PP2, lora, start)
    run_ranks(fit_model, 4, model, run, 6, TP2_PP2, lora, start)
    for expected, found in zip(losses(one), losses(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert all(map(math.isfinite, found))

    merged, adapter, hf, hf_merged = (tmp_path / x for x in ("merged", "peft", "hf", "hf_merged"))
    part = ["--format", "qwen2", "--part", "language"]
    for arguments in (
        ["merge", "--from", str(run), "--to", str(merged)],
        ["adapter", "export", "--from", str(run), "--to", str(adapter), *part],
        ["export", "--from", str(start), "--to", str(hf), *part],
        ["export", "--from", str(merged), "--to", str(hf_merged), *part],
    ):
        assert main(arguments) == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == sorted(
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    )
    config = tiny.config(model) | {"parallel": {}}
    batch = synthetic_steps(config, 1, 1)[0][0]
    assert batch.media[IMAGE].values.shape[0] > 0
    ours, after, before, embeddings = run_ranks(logits, 1, [run, merged, start], batch)[0]
    library, exported = (
        elsewhere(tmp_path, embeddings, *folders) for folders in ((hf, adapter), (hf_merged,))
    )
    valid = torch.arange(ours.shape[1]) < batch.lengths[:, None]
    assert (ours - before)[valid].abs().max() > 0.05, "six steps moved the logits"
    for name, found in (("merged", after), ("PEFT", library), ("merged, exported", exported)):
        gap = (found - ours)[valid].abs().max().item()
        print(f"{name}: {gap:.1e}")
        assert gap < 1e-4, name

    again = tmp_path / "again"
    arguments = ["--from", str(adapter), "--base", str(start), "--to", str(again), *part]
    assert main(["adapter", "import", *arguments]) == 0
    report = compare_tensors(open_checkpoint(run), open_checkpoint(again))
    assert report["equal"] == report["tensors"] == len(open_checkpoint(run).source.spec) > 0
    assert not report["only_in_a"] and not report["only_in_b"]


LOAD = """
import sys, peft, torch, transformers
inputs, outputs, folder, *adapter = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
if adapter:
    model = peft.PeftModel.from_pretrained(model, adapter[0])
with torch.no_grad():
    torch.save(model.eval()(inputs_embeds=torch.load(inputs)).logits, outputs)
"""


def elsewhere(folder: Path, embeddings: torch.Tensor, *folders: Path) -> torch.Tensor:
    """Logits of from_pretrained's model, and PEFT's adapter on it, in a process without nvmm."""
    inputs, outputs = folder / "inputs.pt", folder / "outputs.pt"
    torch.save(embeddings, inputs)
    command = [sys.executable, "-c", LOAD, *map(str, (inputs, outputs, *folders))]
    subprocess.run(command, check=True, timeout=300)
    return torch.load(outputs)


def fit_model(rank: int, world: int, init: str, model: Any, *arguments: Any) -> Any:
    """`fit` with another model in the place of the tiny one."""
    tiny.multimodal = lambda: model  # type: ignore[assignment]
    return fit(rank, world, init, *arguments)
