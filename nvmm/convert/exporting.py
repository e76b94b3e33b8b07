"""Write a checkpoint of ours as a Hugging Face folder, or as a weights-only checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvmm.convert import scoring
from nvmm.convert.card import card
from nvmm.convert.chat_template import (
    Conversation,
    check_conversation,
    conversation,
    write_conversation,
)
from nvmm.convert.files import publish
from nvmm.convert.formats import reward
from nvmm.convert.formats.all import (
    FORMATS,
    copy_tokenizer,
    exported_config,
    place_of,
    weight_folders,
    write_folder,
    write_processor,
)
from nvmm.convert.formats.config import mismatches
from nvmm.convert.formats.decoder import POOLING
from nvmm.convert.mapping import Row
from nvmm.convert.models import (
    AUDIO,
    TWO_TOWERS,
    SavedModel,
    check_written,
    files_beside,
    part_of,
    tensors,
    write_state,
    write_weights,
)
from nvmm.convert.processor import named_tokens, processor
from nvmm.convert.rankers import Ranker
from nvmm.convert.safetensors import write_safetensors
from nvmm.convert.sources import Average, Cast, Source, SubModel
from nvmm.convert.table import ToTheirs
from nvmm.data.samples.chat import IMAGE_MARKER
from nvmm.data.samples.sound_chat import SOUND_MARKER
from nvmm.io.progress import progress

log = logging.getLogger("nvmm")


def export(
    saved: SavedModel,
    to: Path,
    format_name: str,
    *,
    part: str | None = None,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    ranker: bool = False,
) -> None:
    """Write a checkpoint of ours as a Hugging Face folder.

    Args:
        part: language, vision or audio, of a model that has parts, or query or context of two
            towers; None for the whole model.
        vocab_size: rows of the vocabulary; None for an imported model's own number, else the
            model's vocab_size.
        tokenizer: its folder, where that has moved.
        ranker: as a ranker by P(True) (`nvmm.convert.rankers`): in a format of reward models a
            classifier of one score, in that of a language model with what vLLM needs to score it.

    Raises ValueError when the format cannot express the model, or keys do not fit.
    """
    if saved.has_adapters:
        raise ValueError(
            f"{saved.path} has LoRA adapters: put them into the weights with `merge` first, or"
            " export them alone with `adapter export`"
        )
    # 1. Every key and shape is checked here, before anything is written.
    ranks = None
    if ranker:
        ranks, talk = Ranker.of(saved), conversation(saved, tokenizer)
        if part is not None or talk is None:
            raise ValueError("--ranker is of a whole language model with a tokenizer")
        if format_name in reward.FORMATS:
            saved = ranks.classifier(saved, talk)
    model = _model(saved, part)
    embeds = "pooling" in (model.get("language") or model)
    if embeds:
        files_beside(format_name).check(saved.state["config"], format_name, model)
    talk = None if part in ("vision", AUDIO) else conversation(saved, tokenizer)
    placeholder = getattr(FORMATS[format_name], "PLACEHOLDER", None)
    if placeholder and talk is not None and vocab_size is None:
        vocab_size = _rows_with_placeholder(saved, format_name, talk.tokenizer.image_id)
    config, rows = layout(saved, format_name, part, vocab_size)
    source: Source = saved.source if part is None else SubModel(saved.source, f"{part}.")
    original = _original(saved, format_name, part)
    converted = Cast(ToTheirs(source, rows), dtype)
    stored = next(iter(converted.spec.values())).dtype
    if "vocab_size" not in language_of(config):
        talk = None
    whole_config = exported_config(config, original, stored)
    if talk is not None and talk.trained and not embeds:
        _set_ends(language_of(whole_config), talk)
        if format_name in reward.FORMATS:
            whole_config |= scoring.fields(saved, talk, whole_config)
    if ranks is not None and format_name in reward.FORMATS:
        whole_config |= ranks.fields()
    if placeholder and talk is not None:
        whole_config |= _with_row(placeholder, talk.tokenizer.image_id, whole_config)
    build = _build(saved) if part is None else {}
    recipe = processor(model, format_name, build)
    named = None
    if format_name == "internvl" and talk is not None and build:
        named = named_tokens(build, talk.tokenizer)
    # What a run did with pictures is written, not what the folder of its tokenizer says.
    prepared = (
        talk is not None and talk.trained and hasattr(FORMATS[format_name], "processor_config")
    )
    # 2. The weights, then the files that describe them; config.json completes the folder.
    with publish(to) as temporary:
        size = sum(tensor.nbytes for tensor in converted.spec.values())
        with progress(size, "export", unit="B") as bar:
            written = _write(temporary, converted, format_name, max_shard_bytes, bar)
        if converted.underflow:
            log.warning("export: %s", converted.underflow)
        check_written(tensors(temporary, format_name), converted, written)
        texts = place_of(temporary, format_name, "TOKENIZER")
        if talk is not None:
            copy_tokenizer(talk.folder, texts)
            if not embeds:
                media = _media(saved, format_name, talk) if part is None else {}
                write_conversation(texts, talk, media=media, named=named)
            image = talk.tokenizer.image_token
            write_processor(temporary, whole_config, format_name, image, replace=prepared)
        write_folder(
            temporary,
            whole_config,
            card(saved, format_name, part, sum(t.numel() for t in converted.spec.values())),
            format_name,
            recipe,
            replace=prepared,
        )
        if talk is not None and not embeds:
            if talk.trained and format_name in reward.FORMATS:
                scoring.write_padding(temporary, talk, whole_config["pad_token_id"])
            check_conversation(texts, talk)
            if ranks is not None:
                ranks.write(temporary, talk, whole_config["architectures"][0])
        if embeds and "hidden_size" in config:
            embedder = {**saved.state["config"], "model": model}
            files_beside(format_name).write(temporary, embedder, format_name, config)


def _write(
    folder: Path, source: Source, format_name: str, max_shard_bytes: int, bar: Any
) -> dict[str, int]:
    """Write the weights into a format's folder or folders; return name -> digest."""
    parts = weight_folders(format_name)
    if not parts:
        return write_safetensors(folder, source, max_shard_bytes=max_shard_bytes, bar=bar)
    digests: dict[str, int] = {}
    for name in parts:
        (folder / name).mkdir()
        part = SubModel(source, f"{name}.")
        found = write_safetensors(folder / name, part, max_shard_bytes=max_shard_bytes, bar=bar)
        digests |= {f"{name}.{key}": value for key, value in found.items()}
    return digests


def _build(saved: SavedModel) -> dict[str, Any]:
    """Return the config of the builder that a whole model was trained with, {} where none is."""
    train = (saved.state["config"].get("data") or {}).get("train") or {}
    return dict(train.get("build") or {})


def _media(saved: SavedModel, format_name: str, talk: Conversation) -> dict[str, str]:
    """Return the kinds of parts that a message may have, and what the chat template writes for
    each.

    For a picture that is the placeholder where a processor of Transformers expands it, else our
    marker.
    """
    parts: dict[str, str] = {}
    if "audio" in (saved.model.get("encoders") or {}):
        parts["audio"] = SOUND_MARKER
    if "vision" in saved.model:
        family = FORMATS[format_name]
        marker: str = getattr(family, "MARKER", "{token}")
        expands = hasattr(family, "processor_config")
        parts["image"] = (
            marker.format(token=talk.tokenizer.image_token) if expands else IMAGE_MARKER
        )
    return parts


def _with_row(field: str, token: int, hf: Mapping[str, Any]) -> dict[str, int]:
    """Return the field that names a placeholder. Raises ValueError where that has no row."""
    rows = hf["text_config"]["vocab_size"]
    if token >= rows:
        raise ValueError(f"--vocab-size {rows} leaves out token {token}, which {field} names")
    return {field: token}


def _rows_with_placeholder(saved: SavedModel, format_name: str, image_id: int) -> int:
    """Return the rows of a vocabulary in which the placeholder has one too."""
    original = language_of(_original(saved, format_name, None) or {}).get("vocab_size")
    return max(original or saved.model["language"]["vocab_size"], image_id + 1)


def layout(
    saved: SavedModel, format_name: str, part: str | None, vocab_size: int | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """Return config.json of a checkpoint's model or part in a format, and the format's table."""
    model, family = _model(saved, part), FORMATS[format_name]
    config = family.from_model(model)
    if config.get(POOLING) is not None:
        config["architectures"] = [config["architectures"][0].replace("ForCausalLM", "Model")]
    _set_vocabulary(config, model, _original(saved, format_name, part), vocab_size)
    return config, family.table(model, config)


def _model(saved: SavedModel, part: str | None) -> Mapping[str, Any]:
    if part is None and saved.model.get("_target_") == TWO_TOWERS:
        raise ValueError(f"{saved.path} has two towers: export each, --part query and context")
    if part is None:
        return saved.model
    return part_of(saved.model, part, f"--part {part}: the model of {saved.path}")


def _original(saved: SavedModel, format_name: str, part: str | None) -> dict[str, Any] | None:
    """Return the config.json that this model or part was imported from, None for another."""
    sources = saved.state.get("sources") or {}
    source = sources.get(part or "") or {}
    if source.get("format") != format_name:
        return None
    config: dict[str, Any] = source["config"]
    # The import of a whole CLIP or SigLIP took its vision encoder alone.
    return config.get("vision_config", config) if format_name in ("clip", "siglip") else config


def language_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the decoder."""
    nested = (config.get(name) for name in ("llm_config", "text_config", "llm_cfg"))
    inner: dict[str, Any] = next(filter(None, nested), config)
    return inner


def _set_ends(language: dict[str, Any], talk: Conversation) -> None:
    """Write the tokens that begin and end a text into a decoder's config."""
    language |= talk.ids()
    last = max(talk.end_ids, default=0)
    if last >= language["vocab_size"]:
        raise ValueError(
            f"--vocab-size {language['vocab_size']} leaves out token {last}, which ends an answer"
        )


def _set_vocabulary(
    config: dict[str, Any],
    model: Mapping[str, Any],
    original: Mapping[str, Any] | None,
    requested: int | None,
) -> None:
    """Choose the rows of the exported vocabulary: padding of ours is removed, theirs is kept."""
    inner = language_of(config)
    if "vocab_size" not in inner:
        return
    language = model.get("language", model)
    padded = language["padded_vocab_size"]
    imported = (original or {}).get("llm_config", original or {}).get("vocab_size")
    rows = requested or imported or language["vocab_size"]
    if rows > padded:
        raise ValueError(f"--vocab-size {rows} is more than the model's {padded} rows")
    inner["vocab_size"] = rows


_TRAINING_ONLY = frozenset({"attention_dropout", "hidden_dropout", "init_method_std"})


def _same_model(first: SavedModel, second: SavedModel) -> None:
    """Raise ValueError naming what two checkpoints differ in, whose mean would be no model."""
    here, there = str(first.path), str(second.path)
    lines = mismatches(first.model, second.model, here, there, free=_TRAINING_ONLY)
    digests = [entry.state.get("tokenizer_digest") for entry in (first, second)]
    if None not in digests and digests[0] != digests[1]:
        lines.append(f"tokenizer (digest)={digests[0]!r} in {here}, {digests[1]!r} in {there}")
    if lines:
        raise ValueError("these checkpoints are not of one model:\n  " + "\n  ".join(lines))


def rewrite(
    saved: Sequence[SavedModel], to: Path, *, dtype: torch.dtype | None = None, workers: int = 1
) -> None:
    """Write a weights-only copy of one checkpoint, or the average of several.

    Any layout loads any checkpoint, so a copy serves to leave out the optimizer state, change the
    dtype or join the pieces that many ranks wrote.
    """
    if len(saved) > 1 and any(entry.has_adapters for entry in saved):
        raise ValueError("the mean of LoRA factors is no mean of updates: `merge` each first")
    for other in saved[1:]:
        _same_model(saved[0], other)
    sources = [entry.source for entry in saved]
    source: Source = sources[0] if len(sources) == 1 else Average(sources)
    state: dict[str, Any] = {
        key: saved[0].state[key]
        for key in (
            "config",
            "tokenizer_digest",
            "template_digests",
            "sources",
            "initialised",
            "base",
            "merged_from",  # with `sources` alone it would be an import as it came
        )
        if key in saved[0].state
    }
    state["rewritten_from"] = [str(entry.path) for entry in saved]
    with publish(to) as temporary:
        label = "average" if len(saved) > 1 else "reshard"
        write_weights(temporary, Cast(source, dtype), label, workers)
        tokenizer = saved[0].path / "tokenizer"
        if tokenizer.is_dir() and copy_tokenizer(tokenizer, temporary / "tokenizer"):
            path = str((to / "tokenizer").resolve())
            config = state["config"]
            state["config"] = config | {"tokenizer": config["tokenizer"] | {"path": path}}
        write_state(temporary, state)
