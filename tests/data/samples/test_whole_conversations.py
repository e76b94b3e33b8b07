"""Ids of conversations beside Transformers' `apply_chat_template`, over kinds of tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from nvmm.data.samples.chat import ChatTemplate, ImageTags, Rendered, Turn, render
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
WORDS = "what is the number in this picture ? a cat sits on user assistant USER INST : [ ] / 7 12 3"
SMALL: dict[str, Any] = {"vocab_size": 500, "show_progress": False}
DIALECTS: dict[str, dict[str, Any]] = {
    "chatml": {
        "roles": {
            "system": {"prefix": "<|im_start|>system\n", "suffix": "{end}\n"},
            "user": {"prefix": "<|im_start|>user\n", "suffix": "{end}\n"},
            "assistant": {"prefix": "<|im_start|>assistant\n", "suffix": "\n"},
        },
    },
    "llama 2": {
        "roles": {
            "user": {"prefix": "[INST] ", "suffix": " [/INST]"},
            "assistant": {"prefix": " "},
        },
        "bos": True,
        "end": "</s>",
    },
    "vicuna": {
        "roles": {
            "user": {"prefix": "USER: ", "suffix": " "},
            "assistant": {"prefix": "ASSISTANT: "},
        },
        "end": "</s>",
    },
    "no roles": {"roles": {"user": {}, "assistant": {}}, "separator": "\n", "end": "</s>"},
}
CONVERSATIONS = [
    ["what is the number?", "7"],
    ["  two  spaces ", " a cat\n", "12?\n", "\n\nthe number is 12 "],
    ["Ünïcode ▁ 你好", "a picture: <s> 7", "[/INST]", "é"],
]


def jinja(dialect: dict[str, Any]) -> str:
    """The same dialect as a chat template of Transformers."""
    end = dialect.get("end", "<|im_end|>")
    text = "{{ bos_token }}" if dialect.get("bos") else ""
    text += "{% for m in messages %}"
    separator = dialect.get("separator", "")
    text += f"{{% if not loop.first %}}{{{{ {json.dumps(separator)} }}}}{{% endif %}}"
    for role, affixes in dialect["roles"].items():
        prefix, suffix = (
            json.dumps(affixes.get(k, "").replace("{end}", end)) for k in ("prefix", "suffix")
        )
        ending = f" + {json.dumps(end)}" if role == "assistant" else ""
        text += f"{{% if m.role == '{role}' %}}"
        text += f"{{{{ {prefix} + m.content{ending} + {suffix} }}}}{{% endif %}}"
    return text + "{% endfor %}"


def bpe(prefix: Any) -> Backend:
    """Llama's kind: BPE whose spaces are `▁`, bytes for what it does not know."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return trained(backend, prefix, trainers.BpeTrainer(special_tokens=SPECIAL + bytes_, **SMALL))


def unigram(prefix: Any) -> Backend:
    trainer = trainers.UnigramTrainer(special_tokens=SPECIAL, unk_token="<unk>", **SMALL)
    return trained(Backend(models.Unigram()), prefix, trainer)


def trained(backend: Backend, prefix: Any, trainer: Any) -> Backend:
    """Learn the pieces of words; `prefix` is a scheme of Metaspace, or a normaliser instead."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([WORDS] * 3, trainer=trainer)
    if isinstance(prefix, str):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    else:
        backend.pre_tokenizer, backend.normalizer = None, prefix
    backend.decoder = decoders.Metaspace()
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(special_tokens=SPECIAL, **SMALL)
    backend.train_from_iterator([WORDS], trainer=trainer)
    return backend


def byte_level(space: bool) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, **SMALL)
    backend.train_from_iterator([f" {WORDS}\n\n"] * 3, trainer=trainer)
    return backend


def stripping() -> Backend:
    """Phi's kind: special tokens that take in the white space behind them."""
    backend = byte_level(False)
    for token in ("<|im_start|>", "<|im_end|>", "</s>"):
        backend.add_special_tokens([AddedToken(token, rstrip=True, normalized=False, special=True)])
    return backend


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
PLAIN = "PreTrainedTokenizerFast"
KINDS: dict[str, tuple[Callable[[], Backend], str]] = {
    "bpe, prepended by a normaliser": (lambda: bpe(LLAMA_2), PLAIN),
    **{
        f"{model.__name__}, metaspace {scheme}": (
            lambda model=model, scheme=scheme: model(scheme),
            PLAIN,
        )
        for model in (bpe, unigram)
        for scheme in ("first", "always", "never")
    },
    "the class LlamaTokenizer": (lambda: bpe(LLAMA_2), "LlamaTokenizer"),
    "wordpiece": (wordpiece, PLAIN),
    "bytes": (lambda: byte_level(False), PLAIN),
    "bytes with a space in front": (lambda: byte_level(True), PLAIN),
    "special tokens that strip": (stripping, PLAIN),
}


def save(folder: Path, backend: Backend, kind: str) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | named))
    return folder


def draw(tokenizer: Tokenizer, template: ChatTemplate, turns: list[Turn], ask: bool) -> Rendered:
    return render(
        turns,
        [],
        tokenizer=tokenizer,
        template=template,
        tags=ImageTags(),
        tile_size=16,
        tokens_per_tile=1,
        generation_prompt=ask,
    )


def check(folder: Path, **options: Any) -> None:
    """Compare all dialects and conversations; every prompt begins its training sample."""
    from transformers import AutoTokenizer

    ours = Tokenizer(str(folder), **options)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    for name, dialect in DIALECTS.items():
        if dialect.get("end", "<|im_end|>") != "</s>" and ours.end_of_turn != "<|im_end|>":
            continue
        template = ChatTemplate(**dialect)
        template.check(ours)
        for texts in CONVERSATIONS:
            roles = ("user", "assistant") * len(texts)
            turns = [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            expected = theirs.apply_chat_template(
                messages, chat_template=jinja(dialect), tokenize=True, return_dict=False
            )
            found = draw(ours, template, turns, ask=False)
            assert found.tokens == expected, (name, texts)
        turns = [Turn("user", CONVERSATIONS[0][0]), Turn("assistant", CONVERSATIONS[0][1])]
        whole = draw(ours, template, turns, ask=False)
        prompt = draw(ours, template, turns[:1], ask=True)
        size = len(prompt.tokens)
        assert whole.tokens[:size] == prompt.tokens, name
        assert not any(whole.weights[:size]) and all(whole.weights[size : size + 2])
        answer = [t for t, w in zip(whole.tokens, whole.weights, strict=True) if w]
        assert ours.decode(answer).strip() == CONVERSATIONS[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_conversation(tmp_path: Path, kind: str) -> None:
    make, name = KINDS[kind]
    check(save(tmp_path / "tokenizer", make(), name))


@pytest.mark.parametrize(
    ("kind", "dialect", "joined"),
    [
        ("bytes", "chatml", False),
        ("bytes", "vicuna", True),
        ("bpe, metaspace first", "chatml", True),
        ("bpe, prepended by a normaliser", "chatml", False),
        ("wordpiece", "vicuna", False),
    ],
)
def test_token_counts_of_joined_turns_have_a_digest_of_their_own(
    tmp_path: Path, kind: str, dialect: str, joined: bool
) -> None:
    """Where turns are tokens of their own, the counts of before are still right."""
    make, name = KINDS[kind]
    tokenizer = Tokenizer(str(save(tmp_path / "tokenizer", make(), name)))
    template = ChatTemplate(**DIALECTS[dialect])
    build = InstructBuilder(
        template, ImageTags(), 1, tile_size=16, tokenizer=tokenizer, sequence_length=64
    )
    assert ("joined" in vars(build)) == joined


@pytest.mark.slow
def test_a_real_byte_level_vocabulary(qwen: Tokenizer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen.path, tmp_path / "qwen"))
    config = {"tokenizer_class": PLAIN, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    check(folder)


def test_real_sentencepiece_vocabularies(tmp_path: Path) -> None:
    """Those of Mistral that the package mistral-common ships, where it is installed."""
    pytest.importorskip("mistral_common")
    pytest.importorskip("sentencepiece")
    models = [x for x in files("mistral_common").joinpath("data").iterdir() if ".model." in x.name]
    assert models
    for model in models:
        folder = tmp_path / model.name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        check(folder, image_token="<pad>", end_of_turn="</s>", extra_tokens=["<pad>"])
