"""The files beside a decoder that is an embedder, and what an import reads of them.

They are its code, sentence-transformers' files and a tokenizer that frames every text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from nvmm.config.tiles import require_tokens
from nvmm.convert.formats.config import whole
from nvmm.convert.formats.decoder import EMBEDDING, POOLING, POOLINGS
from nvmm.convert.sentence_transformers import (
    NATIVE,
    Sentences,
    frame,
    read_json,
    read_prompts,
    read_sentences,
    update_json,
    write_json,
    write_prompts,
    write_sentences,
)
from nvmm.data.samples.retrieval import TEMPLATE
from nvmm.data.samples.tokenizer import Tokenizer

log = logging.getLogger("nvmm")
_FORMATS = "nvmm.convert.formats"
_CODE = {
    "nv_embed": ("modeling_nvembed",),
    "mm_embed": (
        *("modeling_nvembed", "modeling_mm_embed"),
        *("processing_mm_embed", "sentence_mm_embed"),
    ),
}
_MASKING = {"nv_embed": "nv_embed", "mm_embed": "mm_embed"}
"""The released code's masking, where a config.json has no `instruction_masking`."""


def check(config: Mapping[str, Any], format_name: str, model: Mapping[str, Any]) -> None:
    """Raise ValueError where a format cannot say how an embedder was trained.

    config: the checkpoint's; model: the model or part that is exported.
    """
    build, _ = _trained(config)
    masking = build.get("masking", NATIVE[0])
    kind = (model.get("pooling") or {}).get("_target_", "")
    if format_name not in _CODE and kind.endswith(".Mean") and masking not in NATIVE:
        raise ValueError(
            f"data.train.build.masking={masking} is not what sentence-transformers leaves out of a"
            f" mean ({' or '.join(NATIVE)}); use --format nv_embed, whose code takes a pool_mask"
        )
    if format_name != "mm_embed":
        return
    wanted = {
        "tokens_per_tile": _picture_tokens(model),
        "tile_size": whole(model["vision"])["image_size"],
        "max_tiles": 1,
    }
    for key, value in wanted.items():
        if build.get(key) not in (value, None):
            raise ValueError(
                f"--format mm_embed cannot express data.train.build.{key}={build[key]}; it can"
                f" {value}"
            )


def write(folder: Path, config: Mapping[str, Any], format_name: str, hf: Mapping[str, Any]) -> None:
    """Complete an exported folder.

    config: the checkpoint's; its data.train.build says instruction, masking and length. hf: the
    format's config.json.
    Warns where sentence-transformers would pool other tokens than the training did. Raises
    ValueError when the folder has no tokenizer or it does not frame a text.
    """
    build, length = _trained(config)
    masking = build.get("masking", NATIVE[0])
    for name in _CODE.get(format_name, ()):
        source = (files(_FORMATS) / f"{name}.py").read_text(encoding="utf-8")
        # Transformers takes along the files beside one that it imports by a relative name.
        (folder / f"{name}.py").write_text(source.replace(f"from {_FORMATS}.", "from ."))
    if format_name in _CODE:
        update_json(folder / "config.json", {"instruction_masking": masking})
    instruction = build.get("instruction")
    query = TEMPLATE.format(instruction=instruction) if instruction else ""
    prompts = {"query": query, "document": ""}
    if format_name == "mm_embed":
        write_json(
            folder / "modules.json",
            [{"idx": 0, "name": "0", "path": "", "type": "sentence_mm_embed.MMEmbedSentences"}],
        )
        write_prompts(folder, prompts)
    else:
        mode = hf.get(POOLING, "mean")
        _warn_of_masking(mode, masking)
        sentences = Sentences(mode, True, masking == "none", length, prompts)
        write_sentences(folder, sentences, hf["hidden_size"])
    tokenizer = frame(folder, config["tokenizer"])
    update_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "right",
            "model_max_length": length,
            "pad_token": tokenizer.decode([tokenizer.pad_id], skip_special_tokens=False),
            "eos_token": tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False),
        },
    )
    if format_name == "mm_embed":
        _write_processor(folder, tokenizer, config["model"], masking, length)


def _warn_of_masking(mode: str, masking: str) -> None:
    if masking not in NATIVE and mode == "mean":
        log.warning(
            "sentence-transformers leaves out of the mean what masking=sentence_transformers does,"
            " not masking=%s: a query's vector differs from the training's; give Transformers a"
            " pool_mask instead",
            masking,
        )


def _write_processor(
    folder: Path, tokenizer: Tokenizer, model: Mapping[str, Any], masking: str, length: int
) -> None:
    """Write how MM-Embed's processor makes ids and pixels."""
    vision, tokens = whole(model["vision"]), _picture_tokens(model)
    places = {"image_token_index": tokenizer.image_id, "image_seq_length": tokens}
    update_json(folder / "config.json", {**places, "max_seq_length": length})
    write_json(
        folder / "processor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_mm_embed.MMEmbedProcessor"},
            "processor_class": "MMEmbedProcessor",
            "image_token_id": tokenizer.image_id,
            "image_token": tokenizer.image_token,
            "image_size": vision["image_size"],
            "image_mean": list(vision["image_mean"]),
            "image_std": list(vision["image_std"]),
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "masking": masking,
            "image_seq_length": tokens,
            "max_length": length,
        },
    )


def read(folder: Path, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder's files add to a decoder's config.json: its pooling, None without them.

    Raises ValueError naming a module, a pooling or a setting that our embedder does not have.
    """
    if EMBEDDING not in hf:  # no decoder
        return {}
    found = read_sentences(folder, POOLINGS)
    return {POOLING: found and found.pooling}


def saved(
    folder: Path, format_name: str, hf: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `data` with which an imported embedder embeds; nothing for another model.

    folder: its own, or its decoder's. model: the whole. Raises ValueError for a prompt that is no
    instruction.
    """
    if "pooling" not in model.get("language", model):
        return {}
    if (masking := hf.get("instruction_masking") or _MASKING.get(format_name)) is None:
        found = read_sentences(folder, POOLINGS)
        masking = "none" if found is None or found.include_prompt else NATIVE[0]
    build: dict[str, Any] = {
        "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
        "_partial_": True,
        "num_negatives": 0,
        "in_batch_negatives": True,
        "instruction": _instruction(folder),
        "masking": masking,
    }
    if "vision" in model:
        side = model["vision"]["image_size"]
        build |= {"tokens_per_tile": _picture_tokens(model), "tile_size": side, "max_tiles": 1}
        if format_name != "mm_embed":  # a text embedder's folder, of which an MM-Embed is composed
            build["masking"] = "mm_embed"
    length = hf.get("max_seq_length")
    if length is None:
        length = read_json(folder / "sentence_bert_config.json").get("max_seq_length") or 512
        length += build.get("tokens_per_tile", 0)
    length = min(length, model.get("language", model)["max_sequence_length"])
    return {"data": {"sequence_length": length, "train": {"build": build}}}


def _instruction(folder: Path) -> str | None:
    prompt = read_prompts(folder).get("query") or ""
    before, _, behind = TEMPLATE.partition("{instruction}")
    if not prompt:
        return None
    if not (prompt.startswith(before) and prompt.endswith(behind)):
        raise ValueError(
            f"{folder}/config_sentence_transformers.json: the prompt {prompt!r} must be"
            f" {TEMPLATE!r}"
        )
    return prompt.removeprefix(before).removesuffix(behind)


def _trained(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """Return a checkpoint's sample builder, and its longest text in tokens."""
    data = config.get("data") or {}
    return (data.get("train") or {}).get("build") or {}, data.get("sequence_length", 512)


def _picture_tokens(model: Mapping[str, Any]) -> int:
    """Return how many tokens the one tile of a picture becomes."""
    return require_tokens(model["vision"], model["connector"])
