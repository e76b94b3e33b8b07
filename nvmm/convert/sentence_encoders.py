"""The files beside a BERT that is an encoder of sentences; as `embedders` for decoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvmm.convert.formats.bert import MODULES, POOLINGS, pooling_name, setting
from nvmm.convert.sentence_transformers import (
    NATIVE,
    Sentences,
    frame,
    read_json,
    read_sentences,
    write_sentences,
)

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def read(folder: Path, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder's files add to its config.json: `MODULES`, None without such files.

    Raises ValueError naming the file and what it has that our encoder has not.
    """
    return {MODULES: read_modules(folder)}


def read_modules(folder: Path) -> dict[str, Any] | None:
    """Return pooling, normalisation, longest text and prompts of a folder; None without its files.

    Returns: "pooling" (a key of `bert.POOLINGS`), "normalize", "max_seq_length" (or None),
        "query_prefix" and "document_prefix".
    Raises ValueError as `read` does.
    """
    found = read_sentences(folder, POOLINGS, unnormalized=True)
    if found is None:
        return None
    if not found.include_prompt:
        raise ValueError(f"{folder}: include_prompt=false is not read; prompts are pooled too")
    prompts = found.prompts
    documents = (prompts[name] for name in _DOCUMENT_PROMPTS if prompts.get(name))
    return {
        "pooling": found.pooling,
        "normalize": found.normalize,
        "max_seq_length": found.max_seq_length,
        "query_prefix": prompts.get("query") or "",
        "document_prefix": next(documents, ""),
    }


def saved(
    folder: Path, format_name: str, hf: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `data` and `tokenizer` of an imported encoder's checkpoint, with which it embeds.

    No tokens are added to the vocabulary, and texts end in [SEP].
    """
    modules = hf.get(MODULES) or {}
    build = {
        "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "_partial_": True,
        "num_negatives": 1,
        "in_batch_negatives": True,
        "query_prefix": modules.get("query_prefix", ""),
        "document_prefix": modules.get("document_prefix", ""),
    }
    encoder = model.get("language", model)
    length = modules.get("max_seq_length") or setting(encoder, "max_sequence_length")
    special = read_json(folder / "tokenizer_config.json")
    names = {"image_token": ("unk_token", "[UNK]"), "end_of_turn": ("sep_token", "[SEP]")}
    options: dict[str, Any] = {"_target_": "nvmm.data.samples.tokenizer.Tokenizer"}
    for key, (name, default) in names.items():
        token = special.get(name) or default
        options[key] = token["content"] if isinstance(token, dict) else token
    return {
        "data": {"sequence_length": length, "train": {"build": build}},
        "tokenizer": options,
    }


def check(config: Mapping[str, Any], format_name: str, model: Mapping[str, Any]) -> None:
    """Raise ValueError where the texts of training had what sentence-transformers' have not.

    config: the checkpoint's; model: the model or part that is exported.
    """
    build = _build(config)
    if build.get("instruction"):
        raise ValueError(
            f"data.train.build.instruction={build['instruction']!r} is not written by --format"
            f" {format_name}; train an encoder with query_prefix"
        )
    masking = build.get("masking", NATIVE[0])
    if masking not in NATIVE and model["pooling"]["_target_"].endswith(".Mean"):
        raise ValueError(
            f"data.train.build.masking={masking} is not what sentence-transformers leaves out of a"
            f" mean ({' or '.join(NATIVE)})"
        )


def write(folder: Path, config: Mapping[str, Any], format_name: str, hf: Mapping[str, Any]) -> None:
    """Write sentence-transformers' files into an exported BERT's folder.

    config: the checkpoint's; its data say the longest text and the prefixes. hf: config.json.
    Raises ValueError when the folder has no tokenizer.json.
    """
    model, build = config["model"], _build(config)
    length = (config.get("data") or {}).get("sequence_length")
    sentences = Sentences(
        pooling_name(model),
        normalize=setting(model, "normalize"),
        max_seq_length=length or setting(model, "max_sequence_length"),
        prompts={name: build.get(f"{name}_prefix") or "" for name in ("query", "document")},
    )
    write_sentences(folder, sentences, hf["hidden_size"])
    frame(folder, config["tokenizer"])


def _build(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's sample builder."""
    data = config.get("data") or {}
    return (data.get("train") or {}).get("build") or {}
