"""OPT's tokenizer puts `</s>` in front, and the released code another one: the template has two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.samples.test_listening import FRONT, clip, members

TEXT = "The task is event classification. What is heard? a dog barks loudly Answer: OPTIONS yes no"
ADDED = ["<audio>", "<|endofchunk|>", "<SEP>"]
"""In the order in which the released code adds them."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as facebook/opt-1.3b's folder has them, with a small vocabulary."""
    small = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    small.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=special)
    small.save_model(str(tmp_path))
    word = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    tokens = {f"{x}_token": {"content": "</s>", **word} for x in ("unk", "bos", "eos")}
    tokens["pad_token"] = {"content": "<pad>", **word}
    config = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True}
    config |= {"tokenizer_class": "GPT2Tokenizer", "special_tokens_map_file": None}
    typed = {k: {**v, "__type": "AddedToken"} for k, v in tokens.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **typed}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return tmp_path


def test_the_template_s_ids_are_those_of_the_released_code(folder: Path) -> None:
    """`bos_token + prefix + <audio> + ... + eos_token`, through Transformers' tokenizer."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ADDED[:2]})
    theirs.add_special_tokens({"sep_token": ADDED[2]})
    prefix, prompt, answer = "The task is event classification. ", "what is heard?", "a dog barks"
    text = f"{theirs.bos_token}{prefix}<audio>{prompt}\nAnswer:{theirs.sep_token}{answer}"
    expected = theirs(f"{text}<|endofchunk|>{theirs.eos_token}").input_ids
    assert expected[:3] == [2, 2, theirs("The").input_ids[1]]

    ours = Tokenizer(str(folder), image_token="<audio>", end_of_turn="</s>", extra_tokens=ADDED)
    builder = SoundBuilder(FRONT, ListeningTemplate(), tokenizer=ours, sequence_length=64)
    text = builder(members(clip(0, prompt, answer), prefix=prefix)).text
    assert text.tokens.tolist() == expected
    assert [ours.token_id(token) for token in ADDED] == theirs.convert_tokens_to_ids(ADDED)
