"""sentence-transformers' files beside an embedder's weights, and a tokenizer that frames texts.

One reader and one writer, for embedders of decoders (`embedders`) and of BERT
(`sentence_encoders`). transformers 5 ignores add_eos_token of tokenizer_config.json, so the tokens
that frame a text are put into the post-processor of tokenizer.json, and checked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from nvmm.data.samples.tokenizer import Tokenizer

KINDS = ("Transformer", "Pooling", "Normalize")
NATIVE = ("sentence_transformers", "none")
"""The maskings that sentence-transformers' Pooling has."""
_TYPE = "sentence_transformers.models."
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Sentences:
    """What a folder's files say of the way from a text to its vector.

    pooling: sentence-transformers' name. normalize: whether vectors have length 1. include_prompt:
    whether a prompt's tokens are pooled. max_seq_length: the longest text in tokens, None where no
    file says it. prompts: name -> text before every text that is encoded with that name.
    """

    pooling: str
    normalize: bool
    include_prompt: bool = True
    max_seq_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_sentences(
    folder: Path, poolings: Collection[str], *, unnormalized: bool = False
) -> Sentences | None:
    """Read a folder's files; None without modules.json.

    poolings: sentence-transformers' names of those that the reader has. unnormalized: whether it
    has vectors as they are pooled, too.

    Raises ValueError naming the file and the module, pooling or setting that the reader has not.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modules = _read(file, list)
    if not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{file} must hold a list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds != list(KINDS) and not (unnormalized and kinds == list(KINDS[:2])):
        shorter = ", or the first two" if unnormalized else ""
        raise ValueError(f"{file}: {', '.join(kinds)} must be {', '.join(KINDS)}{shorter}")
    pooling = _read(folder / str(modules[1].get("path", "")) / "config.json", dict)
    about = read_json(folder / "sentence_bert_config.json")
    if about.get("do_lower_case"):
        raise ValueError(
            f"{folder}/sentence_bert_config.json: do_lower_case=true is not read; the tokenizer"
            " says itself whether it lowers, so set it to false"
        )
    return Sentences(
        _mode(pooling, folder, poolings),
        normalize=len(kinds) == len(KINDS),
        include_prompt=pooling.get("include_prompt", True) is not False,
        max_seq_length=about.get("max_seq_length"),
        prompts=read_prompts(folder),
    )


def read_prompts(folder: Path) -> dict[str, str]:
    """Read the prompts of config_sentence_transformers.json; none without the file.

    Raises ValueError where they are no texts.
    """
    file = folder / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise ValueError(f"{file}: prompts={prompts!r} must be an object of texts")
    return {name: text for name, text in prompts.items() if text}


def _mode(pooling: Mapping[str, Any], folder: Path, poolings: Collection[str]) -> str:
    """Return the one pooling of its config, in the spelling of any version."""
    modes = pooling.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _OLD_MODES.items() if pooling.get(key)]
    modes = [str(mode) for mode in modes] if isinstance(modes, list) else [str(modes)]
    if len(modes) != 1 or modes[0] not in poolings:
        choices = ", ".join(poolings)
        raise ValueError(f"{folder}: the pooling {', '.join(modes)} must be one of {choices}")
    return str(modes[0])


def write_sentences(folder: Path, sentences: Sentences, hidden_size: int) -> None:
    """Write the files that `read_sentences` reads into an exported folder."""
    kinds = KINDS if sentences.normalize else KINDS[:2]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE + kind}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths:
        (folder / path).mkdir(exist_ok=True)
    pooling = {
        "embedding_dimension": hidden_size,
        "pooling_mode": sentences.pooling,
        "include_prompt": sentences.include_prompt,
    }
    length = {"max_seq_length": sentences.max_seq_length, "do_lower_case": False}
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", length)
    write_prompts(folder, sentences.prompts, "cosine" if sentences.normalize else "dot")


def write_prompts(folder: Path, prompts: Mapping[str, str], similarity: str = "cosine") -> None:
    """Write config_sentence_transformers.json. similarity: of two vectors, cosine or dot."""
    about = {"default_prompt_name": None, "similarity_fn_name": similarity}
    write_json(folder / "config_sentence_transformers.json", {"prompts": dict(prompts), **about})


def frame(folder: Path, configured: Mapping[str, Any]) -> Tokenizer:
    """Make tokenizer.json put BOS before a text, where there is one, and EOS behind it.

    configured: the training's `tokenizer`, which is returned as the folder has it.

    Raises ValueError where the folder has no tokenizer.json, or texts are not framed in the end.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError("an embedder is exported with its tokenizer, and the checkpoint has none")
    options = {k: v for k, v in configured.items() if k not in ("_target_", "path")}
    tokenizer = Tokenizer(str(folder), **options)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if _ids(path) == [*begin, *tokenizer.encode("a"), tokenizer.eos_id]:
        return tokenizer
    backend = Backend.from_file(str(path))
    ids = [*begin, tokenizer.eos_id]
    names = [str(backend.id_to_token(i)) for i in ids]
    single = [*names[:-1], "$A", names[-1]]
    backend.post_processor = TemplateProcessing(
        single=" ".join(single),
        pair=" ".join([*single, "$B:1", f"{names[-1]}:1"]),
        special_tokens=list(zip(names, ids, strict=True)),
    )
    backend.save(str(path))
    found = _ids(path)
    if found[: len(begin)] != begin or found[-1] != tokenizer.eos_id:
        raise ValueError(f"{path} does not begin a text with BOS and end it with EOS: {found}")
    return tokenizer


def _ids(path: Path) -> list[int]:
    """Return what a tokenizer.json makes of a short text."""
    backend = Backend.from_file(str(path))
    backend.no_padding()
    backend.no_truncation()
    return list(backend.encode("a").ids)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is no file. Raises ValueError for anything else."""
    return _read(path, dict) if path.is_file() else {}


def _read(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold {'a list' if kind is list else 'an object'}")
    return content


def update_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change some keys of an object's file."""
    write_json(path, {**read_json(path), **changes})


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
