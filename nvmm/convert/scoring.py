"""What an exported reward model's folder says beside its weights: names of scores, and padding.

Transformers and TRL read the score at a row's rightmost token that is not the padding token. A text
that ends with that token would be scored one token early, so the padding of an export ends no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvmm.convert.chat_template import Conversation
from nvmm.convert.files import is_local
from nvmm.convert.models import SavedModel
from nvmm.data.samples.tokenizer import Tokenizer

_CONFIG = "tokenizer_config.json"


def fields(saved: SavedModel, talk: Conversation, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that a trained reward model adds to its family's.

    The labels have the names of the attributes that the data were labelled with.
    """
    build = ((saved.state["config"].get("data") or {}).get("train") or {}).get("build") or {}
    names = list(build.get("attributes") or [])
    labels: dict[str, Any] = {}
    if len(names) == config["num_labels"]:
        labels["id2label"] = {str(number): name for number, name in enumerate(names)}
        labels["label2id"] = {name: number for number, name in enumerate(names)}
    return labels | {"pad_token_id": padding(talk, config["vocab_size"])}


def padding(talk: Conversation, vocab_size: int) -> int:
    """Return the id that an export pads with: the first that ends no text of the tokenizer's
    padding, placeholder and BOS token.

    Raises ValueError where there is none.
    """
    tokenizer = talk.tokenizer
    last = None if talk.template is None else talk.tokens()[-1]
    for token in (tokenizer.pad_id, tokenizer.image_id, tokenizer.bos_id):
        if token is not None and token != last and token < vocab_size:
            return token
    raise ValueError(
        f"{talk.folder} has no token to pad with: texts end with its padding token, and there is"
        f" neither a BOS nor an image token below {vocab_size}"
    )


def write_padding(folder: Path, talk: Conversation, pad_id: int) -> None:
    """Make the padding token of an exported tokenizer the one that config.json names.

    Raises ValueError where Transformers then pads with another one.
    """
    name = _name(talk.tokenizer, pad_id)
    for file in (_CONFIG, "special_tokens_map.json"):
        path = folder / file
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if file == _CONFIG or "pad_token" in content:
                content["pad_token"] = name
                text = json.dumps(content, indent=2, ensure_ascii=False)
                path.write_text(text + "\n", encoding="utf-8")
    if not is_local(folder):
        return
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    if theirs.pad_token_id != pad_id:
        raise ValueError(
            f"Transformers pads with token {theirs.pad_token_id} of {talk.folder}, and the reward"
            f" model reads {pad_id} ({name}) as padding: scores of a batch would differ"
        )


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)
