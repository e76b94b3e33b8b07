"""A folder with a SentencePiece model alone: SentencePiece's ids, or a refusal in words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nvmm.config.check import option
from nvmm.data.samples import sentence_pieces
from nvmm.data.samples.chat import ChatTemplate, ImageTags, Turn, render
from nvmm.data.samples.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")

SPECIAL = ["<extra_id_0>", "<extra_id_1>"]
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n  indented\n\tcode(1)\n",
    "12345 and 678.90",
    "日本語, العربية, 😀🏽 and é, e\u0301",
    "\x00\x7f\r\n\u200b\u00a0",
    "▁ and ▁▁",
    "words of the training text, and unlikelyconcatenatedwordsofit" * 3,
]
CORPUS = [
    f"The {a} {b} of line {i} has {i * 37} words,  and   spaces\tand {c}."
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("first", "second", "unlikely", "trailing", "leading")
        for b in ("text", "code", "answer", "training")
        for c in ("words", "digits", "brackets (1)", "concatenated")
    )
]


def train(folder: Path, name: str = "hash_megatron_2.model", **changes: Any) -> Any:
    """A model as Nemotron's: BPE, white space kept, digits apart, bytes; returns its processor."""
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": SPECIAL,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    path = folder / name
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path.with_suffix("")), **options | changes
    )
    path.with_suffix(".vocab").unlink()
    return spm.SentencePieceProcessor(model_file=str(path))


def open_folder(folder: Path) -> Tokenizer:
    return Tokenizer(str(folder), image_token="<unk>", end_of_turn="</s>")


@pytest.mark.parametrize("prefix", [False, True], ids=["Nemotron's", "Llama 2's"])
def test_ids_are_those_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    reference = train(tmp_path, add_dummy_prefix=prefix)
    tokenizer = open_folder(tmp_path)
    for text in [*TEXTS, *CORPUS]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert "▁" in text or tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.pad_id == tokenizer.eos_id, "the model has no padding"
    assert len(tokenizer.encode("4711")) == 4 + prefix, "digits stand alone"


def test_special_pieces_are_one_token_each(tmp_path: Path) -> None:
    reference = train(tmp_path)
    tokenizer = open_folder(tmp_path)
    text = "<extra_id_0>System\n\n<extra_id_1>User\n  Hello  \n<extra_id_1>Assistant\n"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert [tokenizer.token_id(token) for token in SPECIAL] == [3, 4]
    assert [i for i in ids if i in (3, 4)] == [3, 4, 4]
    assert tokenizer.encode("a</s>")[-1] == tokenizer.eos_id
    pieces, places = tokenizer.encode_pieces(["<extra_id_1>", "User\n", "né 12"])
    assert pieces == reference.encode("<extra_id_1>User\nné 12")
    assert places == sorted(places) and places[0] == 0 and places[-5:] == [2] * 5


def test_the_real_vocabulary_of_mistral(tmp_path: Path) -> None:
    from importlib.resources import files

    pytest.importorskip("mistral_common")
    [path] = [
        p for p in files("mistral_common").joinpath("data").iterdir() if ".model.v1" in p.name
    ]
    (tmp_path / "any.model").write_bytes(path.read_bytes())
    reference = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    tokenizer = open_folder(tmp_path)
    for text in [*TEXTS, *CORPUS[:20], Path(__file__).read_text().replace("<", "[")]:
        assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "unigram"}, "is no BPE model"),
        ({"model_type": "char"}, "is no BPE model"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"reads '.*' as \[.*\], and its fast form as"),
        ({"remove_extra_whitespaces": True, "add_dummy_prefix": True}, "and its fast form as"),
    ],
)
def test_what_has_no_fast_form_is_refused(tmp_path: Path, changes: Any, says: str) -> None:
    train(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"hash_megatron_2\.model .*{says}.*tokenizer_config"):
        open_folder(tmp_path)


def test_other_files_that_are_no_model_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(b"\xff\xff\xff nothing")
    with pytest.raises(ValueError, match=r"a\.model is no SentencePiece model"):
        open_folder(tmp_path)
    # A folder of NeMo's has the same model twice, under two hashes.
    train(tmp_path, "a.model")
    shutil.copy(tmp_path / "a.model", tmp_path / "b.model")
    assert sentence_pieces.find(tmp_path) == tmp_path / "a.model"
    train(tmp_path, "b.model", vocab_size=400)
    with pytest.raises(ValueError, match=r"several SentencePiece models: a\.model, b\.model"):
        open_folder(tmp_path)


def test_nemotron_template_to_the_token(tmp_path: Path) -> None:
    """configs/template/nemotron.yaml: answers, their newline and <extra_id_1> are trained."""
    reference = train(tmp_path)
    tokenizer = Tokenizer(str(tmp_path), image_token="<unk>", end_of_turn="<extra_id_1>")
    options = option("template", "nemotron")
    template = ChatTemplate(**{k: v for k, v in options.items() if k != "_target_"})
    template.check(tokenizer)
    turns = [
        Turn("user", "  What is 12?\n"),
        Turn("assistant", "A number. "),
        Turn("user", "é"),
        Turn("assistant", "Yes."),
    ]
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": template,
        "tags": ImageTags(),
        "tile_size": 1,
        "tokens_per_tile": 1,
    }
    parts = [
        ("<extra_id_0>System\n", 0),
        ("Be brief.", 0),
        ("\n<extra_id_1>User\n  What is 12?\n\n<extra_id_1>Assistant\n", 0),
        ("A number. \n<extra_id_1>", 1),
        ("User\né\n<extra_id_1>Assistant\n", 0),
        ("Yes.\n<extra_id_1>", 1),
    ]
    for system in ("Be brief.", None):
        given = [Turn("system", system)] if system else []
        said = [part if part[0] != "Be brief." or system else ("", 0) for part in parts]
        out = render([*given, *turns], [], **arguments)
        assert out.tokens == reference.encode("".join(text for text, _ in said))
        trained = [t for t, w in zip(out.tokens, out.weights, strict=True) if w]
        assert trained == [i for text, weight in said if weight for i in reference.encode(text)]
        prompt = render([*given, *turns[:3]], [], **arguments, generation_prompt=True)
        assert prompt.tokens == reference.encode("".join(text for text, _ in said[:5]))
