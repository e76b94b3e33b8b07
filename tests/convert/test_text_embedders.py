"""Text embedders with plain poolings -> folders that need no foreign code, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvmm.commands.convert import main
from nvmm.config.signatures import completed
from nvmm.convert import embedders, exporting, models
from nvmm.convert.formats import llama, mistral, qwen2, qwen3
from nvmm.convert.formats.all import FORMATS
from tests import tiny
from tests.convert.test_nv_embed import INSTRUCTION, TEXTS, config_of, save
from tests.convert.test_nv_embed import tokenizer as tokenizer
from tests.ranks import run_ranks

PREFIX = f"Instruct: {INSTRUCTION}\nQuery: "
KINDS: list[tuple[str, str, bool, str]] = [
    ("qwen2", "Mean", False, "sentence_transformers"),
    ("llama", "Mean", False, "none"),
    ("mistral", "EOS", True, "mm_embed"),
    ("qwen3", "Mean", True, "sentence_transformers"),
    ("mistral", "EOS", False, "sentence_transformers"),
]
QUICK = [KINDS[0], KINDS[2]]
"""The others are slow together."""


def embedder(kind: str, pooling: str, causal: bool, masking: str, folder: Path) -> dict[str, Any]:
    """A run's config whose decoder is of one family."""
    config = config_of(folder, pooling=pooling, causal=causal)
    changes = {"add_qkv_bias": kind == "qwen2", "qk_layernorm": kind == "qwen3"}
    config["model"]["transformer"] = config["model"]["transformer"] | changes
    config["data"]["train"]["build"]["masking"] = masking
    return config


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            kind,
            id="-".join(map(str, kind)),
            marks=() if kind in QUICK else pytest.mark.slow,
        )
        for kind in KINDS
    ],
)
def exported(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path, list[Tensor]]:
    """Format, pooling, the folder of a checkpoint, and our vectors as queries and documents."""
    kind, pooling, causal, masking = request.param
    to = tmp_path_factory.mktemp("run")
    [vectors] = run_ranks(save, 1, {}, embedder(kind, pooling, causal, masking, tokenizer), to)
    exporting.export(models.open_checkpoint(to), to / "hf", kind)
    config = json.loads((to / "hf" / "config.json").read_text())
    assert config["is_causal"] is causal and "auto_map" not in config
    assert not config["architectures"][0].endswith("ForCausalLM")
    assert not list((to / "hf").glob("*.py"))
    return kind, pooling, to / "hf", vectors


def test_transformers_gives_our_vectors(exported: tuple[str, str, Path, list[Tensor]]) -> None:
    """AutoModel alone, without foreign code, padded or not; documents, of which all is pooled."""
    import transformers

    _, pooling, folder, (_, documents) = exported
    model = transformers.AutoModel.from_pretrained(folder).eval()
    framed = transformers.AutoTokenizer.from_pretrained(folder)
    batches = [(TEXTS, documents), ([TEXTS[0]], documents[:1]), ([TEXTS[1]], documents[1:2])]
    for texts, expected in batches:
        inputs = framed(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(inputs.input_ids, inputs.attention_mask).last_hidden_state
        mask = inputs.attention_mask[..., None].float()
        last = mask.sum(1).long()[:, :, None].expand(-1, 1, hidden.shape[-1]) - 1
        pooled = hidden.gather(1, last)[:, 0] if pooling == "EOS" else (hidden * mask).sum(1)
        found = torch.nn.functional.normalize(pooled, dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_gives_our_vectors(
    exported: tuple[str, str, Path, list[Tensor]],
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = exported[2]
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 64
    for name, expected in zip(("query", "document"), exported[3], strict=True):
        found = model.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (exported[3][0] - exported[3][1]).norm(dim=1).min() > 1e-2


def test_the_folder_comes_back_bit_equal(
    exported: tuple[str, str, Path, list[Tensor]], tmp_path: Path
) -> None:
    """Mask, pooling, masking and instruction are those of the folder's files."""
    kind, pooling, folder, _ = exported
    assert main(["import", "--from", str(folder), "--to", str(tmp_path / "ours")]) == 0
    saved = models.open_checkpoint(tmp_path / "ours")
    assert saved.model["pooling"]["_target_"] == f"nvmm.modules.pooling.{pooling}"
    build = saved.state["config"]["data"]["train"]["build"]
    assert build["instruction"] == INSTRUCTION
    assert saved.state["config"]["data"]["sequence_length"] == 64
    exporting.export(saved, tmp_path / "hf", kind)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys() and "embed_tokens.weight" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file in folder.rglob("*.json"):
        there = json.loads((tmp_path / "hf" / file.relative_to(folder)).read_text())
        assert there == json.loads(file.read_text()), file.name


def test_what_no_plain_folder_can_say_is_refused(tokenizer: Path) -> None:
    plain = embedder("qwen2", "Mean", False, "none", tokenizer)["model"]
    assert qwen2.from_model(completed(plain)) == qwen2.from_model(plain)
    for pooling in ("LatentAttention", "SelfAttention"):
        with pytest.raises(ValueError, match=f"pooling={pooling}; it can Mean, EOS"):
            qwen2.from_model(plain | {"pooling": tiny.embedder(pooling)["pooling"]})
    with pytest.raises(ValueError, match="add_qkv_bias=True in this model"):
        llama.from_model(plain)
    window = plain["transformer"] | {"window_size": [8, 0], "add_qkv_bias": False}
    with pytest.raises(ValueError, match="contradict each other"):
        mistral.from_model(plain | {"transformer": window})
    config = embedder("qwen3", "Mean", False, "mm_embed", tokenizer)
    with pytest.raises(ValueError, match=r"masking=mm_embed is not .* use --format nv_embed"):
        embedders.check(config, "qwen3", config["model"])
    assert qwen3.from_model(config["model"])["is_causal"] is False


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "nemotron"])
def test_a_mask_without_a_pooling_is_refused(kind: str) -> None:
    raw = {"model_type": kind, "is_causal": False}
    with pytest.raises(ValueError, match=r"is_causal=False is an embedder's, .* no modules\.json"):
        FORMATS[kind].to_model(raw | ({"sliding_window": None} if kind == "mistral" else {}))
    FORMATS[kind].to_model(raw | {"is_causal": True})


def test_an_embedder_keeps_a_scaled_rope_and_turns_whole_heads() -> None:
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    raw = {"model_type": "llama", "sentence_pooling": "mean", **scaled}
    model = llama.to_model(raw)
    assert model["_target_"] == "nvmm.models.embedder.EmbeddingModel"
    assert llama.from_model(model)["rope_scaling"] == scaled["rope_scaling"]
    raw = {"model_type": "nemotron", "sentence_pooling": "mean", "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"an embedder has no partial_rotary_factor=0\.5"):
        FORMATS["nemotron"].to_model(raw)


def test_sentence_transformers_files_that_we_lack_are_named(
    exported: tuple[str, str, Path, list[Tensor]], tmp_path: Path
) -> None:
    """In the spelling of any version."""

    def changed(name: str, content: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(exported[2], folder)
        (folder / name).write_text(json.dumps(content))
        return folder

    pooling = "1_Pooling/config.json"
    with pytest.raises(ValueError, match="the pooling cls must be one of mean, lasttoken"):
        models.open_folder(changed(pooling, {"pooling_mode": "cls"}))
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    with pytest.raises(ValueError, match="the pooling max, mean must be one of"):
        models.open_folder(changed(pooling, both))
    old = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    folder = models.open_folder(changed(pooling, old))
    assert folder.model()["pooling"]["_target_"].endswith(".Mean")
    modules = json.loads((exported[2] / "modules.json").read_text())
    with pytest.raises(ValueError, match="Transformer, Pooling must be Transformer, Pooling, Norm"):
        models.open_folder(changed("modules.json", modules[:2]))
    with pytest.raises(ValueError, match="do_lower_case=true is not read"):
        models.open_folder(changed("sentence_bert_config.json", {"do_lower_case": True}))
    strange = changed("config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    assert main(["import", "--from", str(strange), "--to", str(tmp_path / "none")]) == 2
