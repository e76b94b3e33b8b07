"""A tokenizer from a Hugging Face folder, text to ids and back, and a trainer for tiny ones."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nvmm.data.samples import sentence_pieces

log = logging.getLogger(__name__)
_CACHED_LENGTH = 256
_CACHE_SIZE = 65_536
_WORDS = ("A", "a", "I", "1")
"""Words that a tokenizer for text has as a token with a space in front, if it has such tokens."""


class Tokenizer:
    """A Hugging Face tokenizer folder, read locally; no code of the folder is run.

    path: folder that Transformers reads; its ids are those of Transformers, or it is refused. A
        SentencePiece model (*.model) whose folder names no tokenizer class has SentencePiece's ids.
    image_token: the token that stands for one feature of an image, or of a sound in the sequence;
        it must be in the vocabulary.
    end_of_turn: the token that ends a turn of a chat.
    extra_tokens: special tokens added after the vocabulary where the folder lacks them.

    `vocab_size` counts added tokens; every id is below it. `bos_id` may be None. A tokenizer that
    names no BOS or EOS but the tokens that frame a text (BERT's [CLS] and [SEP]) has those instead.
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
        self._extra_tokens = tuple(extra_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        # It adds tokens, which no one asks for, and may take white space out of the offsets.
        self._backend.post_processor = None
        _add_missing(self._backend, extra_tokens)

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
        added = self._backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        image = added.get(self.image_id)
        if image is not None and (image.lstrip or image.rstrip or image.single_word):
            raise ValueError(
                f"tokenizer.image_token={image_token} of {self.path} takes in the white space"
                " beside it (lstrip, rstrip or single_word); name another token"
            )
        self._cache: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        self._joined: dict[str, int] = {}

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

    @property
    def image_is_extra(self) -> bool:
        """Whether the image token is one of `extra_tokens`: a model may have no word of its id."""
        return self.image_token in self._extra_tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their one id.

        Nothing is added, no BOS or EOS. Short texts, as tags and affixes are, are cached.
        """
        return self.encode_pieces([text])[0]

    def piece(self, token: int) -> str:
        """Return a token as the vocabulary spells it."""
        return str(self._backend.id_to_token(token))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return first character and that behind the last one of each token of `text`."""
        return list(self._backend.encode(text, add_special_tokens=False).offsets)

    def encode_pieces(
        self, pieces: Sequence[str], *, continued: bool = False
    ) -> tuple[list[int], list[int]]:
        """Return the ids of the pieces' joint text, and the number of the piece that each is of.

        A token that lies in two pieces is of the later one.

        continued: the text stands behind a special token and not at the beginning, where some
            tokenizers put a space in front.
        """
        key = (self.image_token if continued else "", *pieces)
        known = self._cache.get(key)
        if known is None:
            known = self._encode(key)
            if sum(map(len, key)) <= _CACHED_LENGTH and len(self._cache) < _CACHE_SIZE:
                self._cache[key] = known
        return list(known[0]), list(known[1])

    def joined_space(self, text: str) -> int:
        """Return how many characters of white space at the end of `text` begin a word's token."""
        if not text[-1:].isspace():
            return 0
        if text not in self._joined:
            before = self.image_token + text
            starts = [len(before)]
            for word in _WORDS:
                offsets = self._backend.encode(before + word, add_special_tokens=False).offsets
                starts += [first for first, last in offsets if first < len(before) < last]
            start = min(starts)
            self._joined[text] = len(before) - start if before[start:].isspace() else 0
        return self._joined[text]

    def _encode(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return ids and pieces of texts, of which the first is left out: a token or nothing."""
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        skipped = bool(texts[0])
        ids = encoding.ids[skipped:]
        if len(texts) == 2:
            return ids, [0] * len(ids)
        ends = list(accumulate(map(len, texts)))[1:]
        # An added token may take in the white space before or behind it: its text is at its start.
        places = [
            start if token in self._added else max(start, end - 1)
            for token, (start, end) in zip(ids, encoding.offsets[skipped:], strict=True)
        ]
        return ids, [bisect_right(ends, place) for place in places]

    def beginning(self, text: str, num_tokens: int) -> str:
        """Return the beginning of `text` that its first `num_tokens` tokens are of, in whole
        characters: one that needs a further token too is left out."""
        offsets = self.spans(text)
        first, rest = offsets[: max(num_tokens, 0)], offsets[max(num_tokens, 0) :]
        end = max((end for _, end in first), default=0)
        return text[: min([end, *(start for start, _ in rest[:1])])]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def digest(self) -> str:
        """The sha256 of vocabulary, merges, added tokens, normaliser and splitter.

        These decide the ids; the digest does not depend on the folder's path.
        """
        return _digest(self._backend)

    def is_of(self, digest: str) -> bool:
        """Return whether a run that saved `digest` had this tokenizer.

        It had, too, when that is the digest of tokenizer.json alone, which is how nvmm once read
        every folder, with the same tokens. The log says then that the splitter is another.
        """
        if digest == self.digest:
            return True
        alone = _read_file(Path(self.path).expanduser())
        if alone is None:
            return False
        _add_missing(alone, self._extra_tokens)
        if _digest(alone) != digest or alone.get_vocab(True) != self._backend.get_vocab(True):
            return False
        log.warning(
            f"tokenizer.path={self.path} is read as Transformers reads it; this run began with"
            " tokenizer.json alone, whose splitter differs, so that some ids may too"
        )
        return True

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


def _add_missing(backend: Backend, tokens: Iterable[str]) -> None:
    """Add those special tokens that the tokenizer does not have."""
    missing = [token for token in tokens if backend.token_to_id(token) is None]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in missing])


def _digest(backend: Backend) -> str:
    """Return the sha256 of what decides the ids."""
    state: dict[str, Any] = json.loads(backend.to_str())
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


_NAMED = ("bos_token", "eos_token", "pad_token")
_FRAMES = {"bos_token": "cls_token", "eos_token": "sep_token"}
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def _load(folder: Path) -> tuple[Backend, dict[str, str | None]]:
    """Load the fast tokenizer of a folder and the text of its bos, eos and pad tokens.

    Transformers reads the folder, except where tokenizer.json alone says how text becomes ids:
    importing Transformers takes seconds.
    """
    config = _json(folder / "tokenizer_config.json")
    if config.get("split_special_tokens"):
        raise ValueError(
            f"tokenizer.path={folder}: split_special_tokens in tokenizer_config.json takes special"
            " tokens for text, and no template works with that; set it to false"
        )
    fast = _read_file(folder)
    if fast is not None and _is_enough(folder, config, fast):
        return fast, _named(config.get)
    model = sentence_pieces.find(folder) if fast is None else None
    if model is not None and not config.get("tokenizer_class"):
        return sentence_pieces.read(model)
    from transformers import AutoTokenizer

    try:
        read = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Each tokenizer class raises what it likes.
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"tokenizer.path={folder}: Transformers cannot read this folder ({reason})"
        ) from error
    if not getattr(read, "is_fast", False):
        raise ValueError(f"tokenizer.path={folder} holds no tokenizer.json and none can be made")
    backend = Backend.from_str(read.backend_tokenizer.to_str())
    # Classes that make a splitter of their own differ from the file in offsets alone, which would
    # be another digest for the same ids.
    if fast is not None and _splitter(fast) == _splitter(backend):
        backend.pre_tokenizer = fast.pre_tokenizer
    return backend, _named(lambda key: getattr(read, key, None))


def _named(get: Callable[[str], Any]) -> dict[str, str | None]:
    """Return the text of the tokens that begin, end and pad a text, where a folder names them."""
    found = [get(key) or get(_FRAMES.get(key, key)) for key in _NAMED]
    return dict(zip(_NAMED, _texts(found), strict=True))


def _read_file(folder: Path) -> Backend | None:
    """Return the tokenizer of tokenizer.json, None where there is no such file."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise ValueError(
            f"tokenizer.path={folder}: cannot read tokenizer.json ({error})"
        ) from error


def _is_enough(folder: Path, config: dict[str, Any], fast: Backend) -> bool:
    """Return whether tokenizer.json alone says how Transformers makes ids.

    It does when the class is the plain one, no other file takes part, and every token that
    tokenizer_config.json names is an added token of tokenizer.json already.
    """
    others = ("config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json")
    listed = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    special = {t.content for t in fast.get_added_tokens_decoder().values() if t.special}
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    return (
        config.get("tokenizer_class") in _PLAIN
        and not any((folder / other).exists() for other in others)
        and not any(config.get(key) for key in (*listed, "auto_map"))
        and all(
            token is None or (isinstance(token, str) and token in special)
            for token in _texts(tokens.values())
        )
    )


def _splitter(backend: Backend) -> str:
    """Return the splitter as JSON without what changes offsets and no ids."""
    state = b"null" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    kept = json.loads(
        state,
        object_pairs_hook=lambda pairs: {
            key: value for key, value in pairs if key != "trim_offsets"
        },
    )
    return json.dumps(kept, sort_keys=True)


def _texts(tokens: Iterable[Any]) -> list[Any]:
    """Return tokens as text where they are objects with their text as `content`."""
    return [token.get("content") if isinstance(token, dict) else token for token in tokens]


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is none; raise ValueError naming it."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"tokenizer.path={file.parent}: {file.name} is damaged ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer.path={file.parent}: {file.name} must hold an object")
    return content


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
