"""Token ids of real vocabularies, digests, and the trained byte-level BPE."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from nvmm.data.prepare.digits import SPECIAL_TOKENS, train_tokenizer
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe

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


def test_tokens_only_in_the_config_are_added(tiny: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny.path, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(tiny.vocab_size): {"content": "<new>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(str(folder)).encode("<new>") == [tiny.vocab_size]


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
