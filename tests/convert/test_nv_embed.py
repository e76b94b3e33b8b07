"""A checkpoint of an embedder -> a folder for Transformers and sentence-transformers, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import POSITIVE, QUERY
from nvmm.convert import embedders, exporting, importing, models
from nvmm.convert.formats import nv_embed
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from nvmm.evaluation import beir
from nvmm.inference.embedding import TextAndImage, TextEncoder
from tests import tiny
from tests.ranks import run_ranks

TEXTS = ["a small bird sings", "the bird", "sings: Query a small small small bird of it"]
INSTRUCTION = "find the bird"


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    model = tiny.embedder(**changes)
    model |= {"vocab_size": 300, "padded_vocab_size": 320, "max_sequence_length": 128}
    build = {
        "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "_partial_": True,
        "num_negatives": 1,
        "in_batch_negatives": True,
        "instruction": INSTRUCTION,
        "masking": "sentence_transformers",
    }
    return {
        "model": model,
        "seed": 1,
        "backend": "native",
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32"},
        "tokenizer": {
            "_target_": "nvmm.data.samples.tokenizer.Tokenizer",
            "path": str(folder),
            "image_token": "<s>",
            "end_of_turn": "</s>",
        },
        "data": {"sequence_length": 64, "train": {"build": build}},
    }


def save(
    rank: int,
    world: int,
    init: str,
    layout: dict[str, int],
    config: dict[str, Any],
    to: Path,
    items: Sequence[str | TextAndImage] = tuple(TEXTS),
) -> list[Tensor] | None:
    """Write a checkpoint of random weights; the vectors of items as queries and documents."""
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.parallel.parameters import build_chunks, sharded_parameters
    from nvmm.parallel.setup import Parallel, Precision, shutdown
    from nvmm.training.optim import Optim
    from nvmm.training.optimizer import build_optimizer, wrap

    parallel, precision = Parallel(**layout), Precision()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    lora = instantiate(config.get("lora"), _convert_="all")
    adapt = None if lora is None else lora.attach
    constructor = instantiate(config["model"], _convert_="all")
    chunks = build_chunks(constructor, parallel, precision, adapt=adapt)
    for sharded in sharded_parameters(chunks):
        if sharded.name.endswith("lora_b"):  # zeros would hide that an adapter is lost
            torch.nn.init.normal_(
                sharded.parameter, std=0.1, generator=torch.Generator().manual_seed(0)
            )
        if "norm" in sharded.name or "bias" in sharded.name:  # constants would hide a swapped name
            for offset, piece in sharded.pieces(sharded.parameter.data):
                places = torch.arange(offset[-1], offset[-1] + piece.shape[-1])
                piece += 0.2 * torch.sin(places + float(sum(map(ord, sharded.name))))
    optimizer = build_optimizer(wrap(chunks, parallel, precision), Optim(1e-3), precision, 1)
    options = {k: v for k, v in config["tokenizer"].items() if k != "_target_"}
    tokenizer = Tokenizer(**options)
    checkpoint = Checkpoint(save_interval=None, directory=to / "checkpoints")
    state = {"config": config, "tokenizer_digest": tokenizer.digest, "step": 1}
    checkpoint.save(1, chunks, optimizer, state)
    checkpoint.finalize(blocking=True)
    make = instantiate(config["data"]["train"]["build"], _convert_="all")
    builder = make(tokenizer=tokenizer, sequence_length=config["data"]["sequence_length"])
    encoder = TextEncoder([chunk.eval() for chunk in chunks], builder, batch_size=2)
    found = [encoder(items, INSTRUCTION), encoder(items)]
    shutdown()
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_level_bpe(
        tmp_path_factory.mktemp("tokenizer"),
        [f"Instruct: {INSTRUCTION}\nQuery: a small bird sings"] * 20,
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a checkpoint that two tensor-parallel ranks wrote, and our vectors."""
    to = tmp_path_factory.mktemp("run")
    config = config_of(tokenizer)
    results = run_ranks(save, 2, {"tensor_model_parallel_size": 2}, config, to)
    exporting.export(models.open_checkpoint(to), to / "hf", "nv_embed")
    return to / "hf", results[0]


def test_two_layouts_encode_alike(
    exported: tuple[Path, Any], tokenizer: Path, tmp_path: Path
) -> None:
    config = config_of(tokenizer)
    found = run_ranks(save, 2, {"pipeline_model_parallel_size": 2}, config, tmp_path)
    for rank in found:
        for a, b in zip(rank, exported[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_exported_tokenizer_frames_every_text(exported: tuple[Path, Any]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[0])
    for ids in tokenizer(TEXTS).input_ids:
        assert ids[0] == tokenizer.convert_tokens_to_ids("<s>")
        assert ids[-1] == tokenizer.convert_tokens_to_ids("</s>")
    cut = tokenizer(TEXTS[2] * 30, truncation=True, max_length=10).input_ids
    assert len(cut) == 10 and cut[-1] == tokenizer.convert_tokens_to_ids("</s>")
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers_gives_our_vectors(exported: tuple[Path, Any], side: str) -> None:
    import transformers

    folder, (queries, documents) = exported
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    framed = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    prefix = f"Instruct: {INSTRUCTION}\nQuery: "
    for texts, expected, masked in (
        ([prefix + text for text in TEXTS], queries, len(framed(prefix).input_ids) - 1),
        (TEXTS, documents, 0),
    ):
        inputs = framed(texts, padding=True, return_tensors="pt")
        place = inputs.attention_mask.cumsum(1)
        pool_mask = inputs.attention_mask * (place > masked)
        assert bool(inputs.attention_mask[:, 0].all()) is (side == "right"), "texts of one length"
        with torch.no_grad():
            found = model(inputs.input_ids, inputs.attention_mask, pool_mask).pooler_output
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_gives_our_vectors(exported: tuple[Path, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    folder, (queries, documents) = exported
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 64
    for name, expected in (("query", queries), ("document", documents)):
        found = model.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_folder_comes_back_bit_equal(exported: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = {"": models.open_folder(exported[0])}
    model = importing.derive(folders)
    assert model["pooling"]["num_latents"] == 6
    constructor = instantiate(model, _convert_="all")
    assert importing.import_folders(folders, model, constructor, tmp_path / "ours") == []
    exporting.export(models.open_checkpoint(tmp_path / "ours"), tmp_path / "hf", "nv_embed")
    before, after = (load_file(f / "model.safetensors") for f in (exported[0], tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "embedding_model.embed_tokens.weight" in before
    assert not any("lm_head" in name for name in before)


def test_a_lora_run_is_merged_and_exported(tokenizer: Path, tmp_path: Path) -> None:
    """As stage 1 trains it: adapters on the decoder, the pooling whole."""
    import transformers

    from nvmm.convert.adapters import merge

    config = config_of(tokenizer) | {"lora": tiny.lora(["decoder.*linear_*"], train=["pooling.*"])}
    [expected] = run_ranks(save, 1, {}, config, tmp_path / "run")
    saved = models.open_checkpoint(tmp_path / "run")
    constructor = instantiate(config["model"], _convert_="all")
    merge(saved, tmp_path / "merged", constructor)
    exporting.export(models.open_checkpoint(tmp_path / "merged"), tmp_path / "hf", "nv_embed")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    framed = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = framed(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs, pool_mask=inputs.attention_mask).pooler_output
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-5)
    bare = run_ranks(save, 1, {}, config_of(tokenizer), tmp_path / "bare")[0]
    assert (bare[1] - found).abs().max() > 1e-2, "the adapters change what is encoded"


@pytest.mark.parametrize(
    "runner", [[], pytest.param(["benchmark.judge=mteb"], marks=pytest.mark.slow)]
)
def test_a_checkpoint_is_scored(
    exported: tuple[Path, Any], runner: list[str], tmp_path: Path
) -> None:
    """`nvmm.evaluate` on a run directory, against metrics of our vectors."""
    run, (queries, documents) = exported[0].parent, exported[1]
    ids = [str(number) for number in range(len(TEXTS))]
    (tmp_path / "qrels").mkdir()
    for name in ("corpus", "queries"):
        lines = [json.dumps({"_id": i, "text": text}) for i, text in zip(ids, TEXTS, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    known = {"0": {"1": 2, "2": 1}, "1": {"0": 1}, "2": {"2": 1}}
    rows = [f"{q}\t{doc}\t{score}" for q, docs in known.items() for doc, score in docs.items()]
    header = "query-id\tcorpus-id\tscore"
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join([header, *rows]))
    command = [sys.executable, "-W", "ignore", "-m", "nvmm.evaluate", f"checkpoint={run}"]
    command += ["benchmark=beir", f"benchmark.folder={tmp_path}", f"output={tmp_path}", *runner]
    subprocess.run(command, check=True, timeout=300)
    scores = json.loads((tmp_path / "metrics.json").read_text())
    texts = dict(zip(ids, TEXTS, strict=True))

    def encode(_: Any, instruction: str | None, role: int) -> Tensor:
        assert role == (POSITIVE if instruction is None else QUERY)
        return documents if instruction is None else queries

    expected = beir.evaluate(encode, texts, texts, known, instruction=INSTRUCTION, cutoffs=(1, 10))
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=2e-5), name


def test_a_masking_that_sentence_transformers_lacks_is_named(
    exported: tuple[Path, Any], tokenizer: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = config_of(tokenizer)
    config["data"]["train"]["build"]["masking"] = "nv_embed"
    shutil.copytree(exported[0], tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf" / "2_Normalize")
    embedders.write(tmp_path / "hf", config, "nv_embed", {"hidden_size": 64})
    assert "not masking=nv_embed" in caplog.text


def test_other_poolings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot express model.pooling=SelfAttention"):
        nv_embed.from_model(tiny.embedder("SelfAttention"))


def test_sentence_transformers_files(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == f"Instruct: {INSTRUCTION}\nQuery: "
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["include_prompt"] is False
    assert len(json.loads((folder / "modules.json").read_text())) == 3
