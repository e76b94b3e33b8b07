"""sentence-transformers' files beside a BERT: what makes a vector of its hidden states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from nvmm.convert.formats.bert import POOLINGS, pooling_name, setting
from nvmm.data.samples.tokenizer import Tokenizer

_KINDS = ("Transformer", "Pooling", "Normalize")
_TYPE = "sentence_transformers.models."
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def read_modules(folder: Path) -> dict[str, Any] | None:
    """Return pooling, normalisation, longest text and prompts of a folder; None without its files.

    Returns: "pooling" (a key of `bert.POOLINGS`), "normalize", "max_seq_length" (or None),
        "query_prefix" and "document_prefix".
    Raises ValueError naming the file and what it has that our encoder has not.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modules = _read(file, list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (list(_KINDS), list(_KINDS[:2])):
        raise ValueError(
            f"{file}: {', '.join(kinds)} must be {', '.join(_KINDS)}, or the first two"
        )
    pooling = _read(folder / modules[1].get("path", "") / "config.json", dict)
    about = _optional(folder / "sentence_bert_config.json")
    if about.get("do_lower_case"):
        raise ValueError(
            f"{folder}/sentence_bert_config.json: do_lower_case=true is not read; BERT's tokenizer"
            " says itself whether it lowers, so set it to false"
        )
    prompts = _optional(folder / "config_sentence_transformers.json").get("prompts") or {}
    documents = (prompts[name] for name in _DOCUMENT_PROMPTS if prompts.get(name))
    return {
        "pooling": _mode(pooling, folder),
        "normalize": len(kinds) == len(_KINDS),
        "max_seq_length": about.get("max_seq_length"),
        "query_prefix": prompts.get("query") or "",
        "document_prefix": next(documents, ""),
    }


def _mode(pooling: Mapping[str, Any], folder: Path) -> str:
    """Return the one pooling of its config, in the spelling of any version."""
    modes = pooling.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _OLD_MODES.items() if pooling.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        choices = ", ".join(POOLINGS)
        raise ValueError(f"{folder}: the pooling {', '.join(modes)} must be one of {choices}")
    if pooling.get("include_prompt") is False:
        raise ValueError(f"{folder}: include_prompt=false is not read; prompts are pooled too")
    return str(modes[0])


def data(modules: Mapping[str, Any] | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data` of an imported encoder's checkpoint, with which it embeds texts."""
    modules = modules or {}
    build = {
        "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "_partial_": True,
        "num_negatives": 1,
        "in_batch_negatives": True,
        "query_prefix": modules.get("query_prefix", ""),
        "document_prefix": modules.get("document_prefix", ""),
    }
    length = modules.get("max_seq_length") or setting(model, "max_sequence_length")
    return {"sequence_length": length, "train": {"build": build}}


def tokenizer_options(folder: Path) -> dict[str, Any]:
    """Return the `tokenizer` of an imported BERT: no tokens are added, texts end in [SEP]."""
    special = _optional(folder / "tokenizer_config.json")
    names = {"image_token": ("unk_token", "[UNK]"), "end_of_turn": ("sep_token", "[SEP]")}
    options: dict[str, Any] = {"_target_": "nvmm.data.samples.tokenizer.Tokenizer"}
    for key, (name, default) in names.items():
        token = special.get(name) or default
        options[key] = token["content"] if isinstance(token, dict) else token
    return options


def write_modules(folder: Path, config: Mapping[str, Any], hidden_size: int) -> None:
    """Write sentence-transformers' files into an exported BERT's folder.

    config: the checkpoint's; its data say the longest text and the prefixes.
    Raises ValueError where the texts of training had instructions that a prompt cannot be.
    """
    model, data = config["model"], config.get("data") or {}
    build = (data.get("train") or {}).get("build") or {}
    normalize = setting(model, "normalize")
    if build.get("instruction"):
        raise ValueError(
            f"data.train.build.instruction={build['instruction']!r} is not written by --format"
            " bert; train an encoder with query_prefix"
        )
    kinds = _KINDS if normalize else _KINDS[:2]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE + kind}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths:
        (folder / path).mkdir(exist_ok=True)
    pooling = {
        "embedding_dimension": hidden_size,
        "pooling_mode": pooling_name(model),
        "include_prompt": True,
    }
    length = data.get("sequence_length") or setting(model, "max_sequence_length")
    prefixes = {name: build.get(f"{name}_prefix") or "" for name in ("query", "document")}
    similarity = "cosine" if normalize else "dot"
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": prefixes, "default_prompt_name": None, "similarity_fn_name": similarity},
    )
    _frame(folder, config["tokenizer"])


def _frame(folder: Path, options: Mapping[str, Any]) -> None:
    """Make tokenizer.json put [CLS] before a text and [SEP] behind it, as the training did."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError("an encoder is exported with its tokenizer.json; the checkpoint has none")
    given = {k: v for k, v in options.items() if k not in ("_target_", "path")}
    tokenizer, backend = Tokenizer(str(folder), **given), Backend.from_file(str(path))
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*begin, tokenizer.eos_id]
    if backend.encode("a").ids == [*begin, *tokenizer.encode("a"), tokenizer.eos_id]:
        return
    names = [str(backend.id_to_token(i)) for i in ids]
    frame = [*names[:-1], "$A", names[-1]]
    backend.post_processor = TemplateProcessing(
        single=" ".join(frame),
        pair=" ".join([*frame, "$B:1", f"{names[-1]}:1"]),
        special_tokens=list(zip(names, ids, strict=True)),
    )
    backend.save(str(path))


def _read(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold {'a list' if kind is list else 'an object'}")
    return content


def _optional(file: Path) -> dict[str, Any]:
    return _read(file, dict) if file.is_file() else {}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
