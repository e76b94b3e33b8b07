"""Token ids of real vocabularies, digests, and the trained byte-level BPE."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.prepare.digits import SPECIAL_TOKENS, train_tokenizer
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data.conftest import QWEN_PATTERN

QWEN_IDS = {
    "<tile_1>": [27, 21094, 62, 16, 29],
    "<tile_6>": [27, 21094, 62, 21, 29],
    "<tile_global_thumbnail>": [27, 21094, 19296, 37824, 29],
    "<tile_global>": [27, 21094, 19296, 29],
    "<Image>": [46465, 29],
    "</Image>": [522, 1906, 29],
    "<Image><tile_1>": [46465, 1784, 21094, 62, 16, 29],
    "<|im_start|>assistant\n": [151644, 77091, 198],
    "<|vision_pad|>": [151654],
}


@pytest.mark.parametrize("text", QWEN_IDS)
def test_qwen_ids(qwen: Tokenizer, text: str) -> None:
    assert qwen.encode(text) == QWEN_IDS[text]
    assert qwen.encode(text) == QWEN_IDS[text], "the cache answers as the first call did"


def test_qwen_special_ids(qwen: Tokenizer) -> None:
    assert (qwen.image_id, qwen.end_of_turn_id, qwen.eos_id, qwen.pad_id) == (
        151654,
        151645,
        151645,
        151643,
    )
    assert qwen.bos_id is None
    assert qwen.vocab_size == 151657


def test_returned_ids_can_be_changed_by_the_caller(tiny: Tokenizer) -> None:
    ids = tiny.encode("Read")
    ids.append(7)
    assert tiny.encode("Read") == ids[:-1]


def test_tags_and_digits_of_the_tiny_vocabulary_are_single_tokens(tiny: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert len(tiny.encode(token)) == 1
    assert len(tiny.encode("4711")) == 4
    assert tiny.decode(tiny.encode("Zoë read 4711.")) == "Zoë read 4711."


def test_agrees_with_transformers(tiny: Tokenizer) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny.path, local_files_only=True)
    text = "<|im_start|>user\n<Image><tile_1>Which digit is number 3?<|im_end|>\n ünïcode  "
    assert tiny.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tiny.vocab_size == len(reference)
    assert tiny.pad_id == reference.pad_token_id
    assert tiny.eos_id == reference.eos_token_id


def test_folder_without_tokenizer_json_is_converted(tiny: Tokenizer, tmp_path: Path) -> None:
    model = json.loads((Path(tiny.path) / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    converted = Tokenizer(str(tmp_path), extra_tokens=["<|vision_pad|>"])
    assert converted.encode("Read the number.") == tiny.encode("Read the number.")
    assert converted.eos_id == tiny.eos_id


NEW = {"content": "<im_patch>", "lstrip": True, "rstrip": True, "normalized": False}
FOLDERS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing more": {},
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {"SIZE": NEW}}},
    "special added_tokens_decoder": {
        "tokenizer_config": {"added_tokens_decoder": {"SIZE": NEW | {"special": True}}}
    },
    "additional_special_tokens": {
        "tokenizer_config": {"additional_special_tokens": ["<im_patch>", "<b>"]}
    },
    "extra_special_tokens": {
        "tokenizer_config": {"extra_special_tokens": {"image_token": "<im_patch>"}}
    },
    "a list of extra_special_tokens": {"tokenizer_config": {"extra_special_tokens": [NEW]}},
    "a token of its own key": {"tokenizer_config": {"image_token": "<im_patch>"}},
    "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["<im_patch>"]}},
    "eos in special_tokens_map": {"special_tokens_map": {"eos_token": "<|endoftext|>"}},
    "a new eos in special_tokens_map": {"special_tokens_map": {"eos_token": "</s>"}},
    "added_tokens": {"added_tokens": {"<im_patch>": "SIZE"}},
    "added_tokens that are special": {
        "added_tokens": {"<im_patch>": "SIZE"},
        "special_tokens_map": {"additional_special_tokens": ["<im_patch>"]},
    },
    "pad_token": {"tokenizer_config": {"pad_token": "[PAD]"}},
    "eos_token": {"tokenizer_config": {"eos_token": "</s>"}},
    "a word as bos_token": {"tokenizer_config": {"bos_token": "what"}},
    "a new bos": {"tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<s>"}}},
    "a new bos as a bare object": {"tokenizer_config": {"bos_token": {"content": "<s>"}}},
    "a class of its own": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "no class": {"tokenizer_config": {"tokenizer_class": None}},
    "a model's config": {"config": {"model_type": "qwen2"}},
}


REFUSED = {
    "a new bos as a bare object": "bos_token",
    "a list of extra_special_tokens": "Input must be",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_other_files_are_those_of_transformers(
    tiny: Tokenizer, tmp_path: Path, name: str
) -> None:
    """Tokens that tokenizer.json lacks, in every file that may name them."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny.path, tmp_path / "copy"))
    for file, content in FOLDERS[name].items():
        path = folder / f"{file}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        text = json.dumps(old | content)
        if file == "added_tokens":
            text = text.replace('"SIZE"', str(tiny.vocab_size))
        path.write_text(text.replace("SIZE", str(tiny.vocab_size)))
    if name in REFUSED:
        with pytest.raises(TypeError, match=REFUSED[name]):
            AutoTokenizer.from_pretrained(str(folder))
        with pytest.raises(ValueError, match=f"cannot read this folder .*{REFUSED[name]}"):
            Tokenizer(str(folder))
        return
    ours, theirs = Tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    text = "<|im_start|>user\nwhat <im_patch> 12?</s> [PAD]<b>x<|im_end|>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    if not FOLDERS[name]:
        assert ours.digest == tiny.digest


def test_a_folder_read_by_transformers_keeps_the_digest_of_its_file(
    tiny: Tokenizer, tmp_path: Path
) -> None:
    """Qwen2.5's folder as published, whose splitter the class makes anew with other offsets."""
    folder = Path(shutil.copytree(tiny.path, tmp_path / "copy"))
    state = json.loads((folder / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    parts = [split, level | {"trim_offsets": False}]
    state |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    state |= {"normalizer": {"type": "NFC"}}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    alone = Tokenizer(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(token.pop("id")): token for token in state["added_tokens"]},
        **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    read = Tokenizer(str(folder))
    assert read.digest == alone.digest != tiny.digest
    assert read.eos_id == tiny.eos_id and read.encode(" 12 é\n") == alone.encode(" 12 é\n")


def test_a_run_of_before_has_the_digest_of_tokenizer_json_alone(
    tiny: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny.path, tmp_path / "copy"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    read = Tokenizer(str(folder), extra_tokens=["<new>"])
    before = Tokenizer(tiny.path, extra_tokens=["<new>"]).digest
    assert read.digest != before and read.is_of(read.digest) and not caplog.text
    assert read.is_of(before) and "whose splitter differs" in caplog.text
    assert not read.is_of(tiny.digest), "it had no token <new>"
    # Tokens that were dropped then have no rows in that run's model.
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert not Tokenizer(str(folder), extra_tokens=["<new>"]).is_of(before)


def test_folders_that_no_template_works_with_are_refused(tiny: Tokenizer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.path, tmp_path / "copy"))
    for config, message in (
        ('{"split_special_tokens": true}', "split_special_tokens"),
        ("[]", "must hold an object"),
        ("{", r"tokenizer_config\.json is damaged"),
        ('{"a": ' + "[" * 100_000, r"tokenizer_config\.json is damaged"),
        ('{"tokenizer_class": "TokenizersBackend", "eos_token": ["a"]}', "cannot read .*eos_token"),
        ('{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["a.X", null]}}', "cannot read"),
        (
            '{"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": {"4": 5}}',
            r"cannot read .*TypeError",
        ),
    ):
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            Tokenizer(str(folder))
    folder = Path(shutil.copytree(tiny.path, tmp_path / "strip"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(tiny.vocab_size): NEW}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer\.image_token=<im_patch> .* white space"):
        Tokenizer(str(folder), image_token="<im_patch>")


def test_digest_is_of_the_content(tiny: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny.path, copy)
    assert Tokenizer(str(copy)).digest == tiny.digest
    assert Tokenizer(str(copy), extra_tokens=["<more>"]).digest != tiny.digest
    other = train_byte_level_bpe(
        tmp_path / "other",
        ["another text"],
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    assert Tokenizer(str(other)).digest != tiny.digest


def test_pickles(tiny: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("Read the number.<|im_end|>") == tiny.encode("Read the number.<|im_end|>")
    assert copy.digest == tiny.digest


def test_training_is_reproducible(tiny: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (Path(tiny.path) / name).read_bytes()


def test_extra_tokens_get_ids_after_the_vocabulary(tiny: Tokenizer) -> None:
    more = Tokenizer(tiny.path, image_token="<pad_image>", extra_tokens=["<pad_image>"])
    assert more.image_id == tiny.vocab_size
    assert more.vocab_size == tiny.vocab_size + 1


def test_refuses_bad_folders_and_tokens(tiny: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=/nowhere is not a folder"):
        Tokenizer("/nowhere")
    with pytest.raises(ValueError, match=r"tokenizer\.image_token=<absent> is not in"):
        Tokenizer(tiny.path, image_token="<absent>")
    with pytest.raises(ValueError, match="is also the padding token"):
        Tokenizer(tiny.path, image_token="<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read tokenizer\.json"):
        Tokenizer(str(tmp_path))


def test_trainer_refuses_a_vocabulary_without_room(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_byte_level_bpe(
            tmp_path,
            ["x"],
            vocab_size=256,
            special_tokens=["<e>"],
            eos_token="<e>",
            pad_token="<e>",
        )
