"""A tokenizer from a Hugging Face folder, text to ids and back, and a trainer for tiny ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

_CACHED_LENGTH = 256
_CACHE_SIZE = 65_536


class Tokenizer:
    """A Hugging Face tokenizer folder, read locally; no code of the folder is run.

    path: folder with tokenizer.json, or with slow tokenizer files that transformers can convert.
    image_token: the token that stands for one image feature; it must be in the vocabulary.
    end_of_turn: the token that ends a turn of a chat.
    extra_tokens: special tokens added after the vocabulary where the folder lacks them.

    `vocab_size` counts added tokens; every id is below it. `bos_id` may be None.
    """

    def __init__(
        self,
        path: str,
        *,
        image_token: str = "<|vision_pad|>",
        end_of_turn: str = "<|im_end|>",
        extra_tokens: Sequence[str] = (),
    ) -> None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"tokenizer.path={path} is not a folder with a Hugging Face tokenizer")
        self.path = str(path)
        self._backend, names = _load(folder)
        self._backend.no_padding()
        self._backend.no_truncation()
        missing = [token for token in extra_tokens if self._backend.token_to_id(token) is None]
        self._backend.add_special_tokens([AddedToken(t, normalized=False) for t in missing])

        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.image_token = image_token
        self.image_id = self._require(image_token, "image_token")
        self.end_of_turn = end_of_turn
        self.end_of_turn_id = self._require(end_of_turn, "end_of_turn")
        self.bos_id = self.token_id(names["bos_token"])
        eos = self.token_id(names["eos_token"])
        self.eos_id = self.end_of_turn_id if eos is None else eos
        pad = self.token_id(names["pad_token"])
        self.pad_id = self.eos_id if pad is None else pad
        if self.pad_id == self.image_id:
            raise ValueError(f"tokenizer.image_token={image_token} is also the padding token")
        self._cache: dict[str, list[int]] = {}

    def _require(self, token: str, key: str) -> int:
        """Return a token's id; raise ValueError, naming the config key, where there is none."""
        token_id = self.token_id(token)
        if token_id is None:
            raise ValueError(
                f"tokenizer.{key}={token} is not in the vocabulary of {self.path}; name a token "
                "that is, or list it in tokenizer.extra_tokens"
            )
        return token_id

    def token_id(self, token: str | None) -> int | None:
        """Return the id of one token, None if the vocabulary has no such token."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their one id.

        Nothing is added, no BOS or EOS. Short texts, as tags and affixes are, are cached.
        """
        if len(text) > _CACHED_LENGTH:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        ids = self._cache.get(text)
        if ids is None:
            ids = list(self._backend.encode(text, add_special_tokens=False).ids)
            if len(self._cache) < _CACHE_SIZE:
                self._cache[text] = ids
        return list(ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def digest(self) -> str:
        """The sha256 of vocabulary, merges, added tokens, normaliser and splitter.

        These decide the ids; the digest does not depend on the folder's path.
        """
        state: dict[str, Any] = json.loads(self._backend.to_str())
        model = state["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
        content = {
            "type": model.get("type"),
            "vocab": model.get("vocab"),
            "merges": merges,
            "added_tokens": state.get("added_tokens"),
            "normalizer": state.get("normalizer"),
            "pre_tokenizer": state.get("pre_tokenizer"),
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def is_saved_in(self, folder: Path) -> bool:
        """Return whether a folder's tokenizer.json has every token, those that were added too."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return False
        there = Backend.from_str(path.read_text(encoding="utf-8"))
        return there.get_vocab_size() == self._backend.get_vocab_size()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into a folder, with the tokens that were added."""
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


def _load(folder: Path) -> tuple[Backend, dict[str, str | None]]:
    """Load the fast tokenizer of a folder and the text of its bos, eos and pad tokens."""
    keys = ("bos_token", "eos_token", "pad_token")
    fast = folder / "tokenizer.json"
    # 1. A slow tokenizer is converted. Only this needs transformers, which takes seconds to import.
    if not fast.is_file():
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        if not getattr(converted, "is_fast", False):
            raise ValueError(
                f"tokenizer.path={folder} holds no tokenizer.json and none can be made"
            )
        backend = Backend.from_str(converted.backend_tokenizer.to_str())
        return backend, {key: getattr(converted, key) for key in keys}

    # 2. A fast one is read as it is.
    try:
        backend = Backend.from_file(str(fast))
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise ValueError(
            f"tokenizer.path={folder}: cannot read tokenizer.json ({error})"
        ) from error
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config.update(json.loads((folder / name).read_text(encoding="utf-8")))
    # 3. Tokens that only the config lists are added by id, as transformers does.
    added = config.get("added_tokens_decoder", {})
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            special = bool(entry.get("special", False))
            options = {k: bool(entry.get(k, False)) for k in ("lstrip", "rstrip", "single_word")}
            normalized = bool(entry.get("normalized", not special))
            token = AddedToken(entry["content"], special=special, normalized=normalized, **options)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
    names: dict[str, str | None] = {}
    for key in keys:
        value = config.get(key)
        names[key] = value["content"] if isinstance(value, dict) else value
    return backend, names


def train_byte_level_bpe(
    path: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str],
    bos_token: str | None = None,
    eos_token: str,
    pad_token: str,
) -> Path:
    """Train a small byte-level BPE and save it as a Hugging Face folder; return the folder.

    Every digit is a token of its own; each of `special_tokens` is one token, with the first ids.
    The same texts give the same bytes. `vocab_size` is an upper bound.

    Raises ValueError for a token that is none of `special_tokens`, and for a `vocab_size` below
    256 and their number.
    """
    for kind, token in (
        ("bos_token", bos_token),
        ("eos_token", eos_token),
        ("pad_token", pad_token),
    ):
        if token is not None and token not in special_tokens:
            raise ValueError(f"{kind}={token} must be one of special_tokens={list(special_tokens)}")
    minimum = 256 + len(special_tokens)
    if vocab_size < minimum:
        raise ValueError(f"vocab_size={vocab_size} must be at least {minimum} (bytes + special)")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_token,
        "eos_token": eos_token,
        "pad_token": pad_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
