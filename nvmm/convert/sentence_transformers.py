"""The files of an embedder's folder beside its weights, and what an import reads of them.

They are its code, sentence-transformers' files and a tokenizer that frames every text.

transformers 5 ignores add_eos_token of tokenizer_config.json, so BOS and EOS are put into the
post-processor of tokenizer.json, and checked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from nvmm.convert.formats.config import whole
from nvmm.convert.formats.decoder import POOLING, POOLINGS
from nvmm.data.samples.retrieval import TEMPLATE
from nvmm.data.samples.tokenizer import Tokenizer

log = logging.getLogger("nvmm")
_MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}
_NATIVE = ("sentence_transformers", "none")
"""The maskings that sentence-transformers' Pooling has."""
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
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def check_embedder(config: Mapping[str, Any], format_name: str, model: Mapping[str, Any]) -> None:
    """Raise ValueError where a format cannot say how an embedder was trained.

    config: the checkpoint's; model: the model or part that is exported.
    """
    build, _ = _trained(config)
    masking = build.get("masking", _NATIVE[0])
    kind = (model.get("pooling") or {}).get("_target_", "")
    if format_name not in _CODE and kind.endswith(".Mean") and masking not in _NATIVE:
        raise ValueError(
            f"data.train.build.masking={masking} is not what sentence-transformers leaves out of a"
            f" mean ({' or '.join(_NATIVE)}); use --format nv_embed, whose code takes a pool_mask"
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


def write_embedder(
    folder: Path, config: Mapping[str, Any], format_name: str, hf: Mapping[str, Any]
) -> None:
    """Complete an exported folder.

    config: the checkpoint's; its data.train.build says instruction, masking and length. hf: the
    format's config.json.
    Warns where sentence-transformers would pool other tokens than the training did. Raises
    ValueError when the folder has no tokenizer or it does not frame a text.
    """
    build, length = _trained(config)
    masking = build.get("masking", _NATIVE[0])
    for name in _CODE.get(format_name, ()):
        source = (files(_FORMATS) / f"{name}.py").read_text(encoding="utf-8")
        # Transformers takes along the files beside one that it imports by a relative name.
        (folder / f"{name}.py").write_text(source.replace(f"from {_FORMATS}.", "from ."))
    if format_name in _CODE:
        _update(folder / "config.json", {"instruction_masking": masking})
    if format_name == "mm_embed":
        _write(
            folder / "modules.json",
            [{"idx": 0, "name": "0", "path": "", "type": "sentence_mm_embed.MMEmbedSentences"}],
        )
    else:
        _write_pooling(folder, hf.get(POOLING, "mean"), hf["hidden_size"], masking)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": length})
    instruction = build.get("instruction")
    prompts = {"query": TEMPLATE.format(instruction=instruction) if instruction else ""}
    about = {"prompts": prompts | {"document": ""}, "default_prompt_name": None}
    _write(folder / "config_sentence_transformers.json", about | {"similarity_fn_name": "cosine"})
    tokenizer = _frame(folder, config, length)
    if format_name == "mm_embed":
        _write_processor(folder, tokenizer, config["model"], masking, length)


def _write_pooling(folder: Path, mode: str, hidden_size: int, masking: str) -> None:
    """Write sentence-transformers' three modules."""
    if masking not in _NATIVE and mode == "mean":
        log.warning(
            "sentence-transformers leaves out of the mean what masking=sentence_transformers does,"
            " not masking=%s: a query's vector differs from the training's; give Transformers a"
            " pool_mask instead",
            masking,
        )
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(_MODULES.items())
    ]
    _write(folder / "modules.json", modules)
    pooling = {
        "embedding_dimension": hidden_size,
        "pooling_mode": mode,
        "include_prompt": masking == "none",
    }
    _write(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir()


def _write_processor(
    folder: Path, tokenizer: Tokenizer, model: Mapping[str, Any], masking: str, length: int
) -> None:
    """Write how MM-Embed's processor makes ids and pixels."""
    vision, tokens = whole(model["vision"]), _picture_tokens(model)
    places = {"image_token_index": tokenizer.image_id, "image_seq_length": tokens}
    _update(folder / "config.json", {**places, "max_seq_length": length})
    _write(
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


def read_pooling(folder: Path) -> str | None:
    """Return the one pooling of a folder's sentence-transformers files; None without such files.

    Raises ValueError naming a module, a pooling or a prompt that our embedder does not have.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds != ["Transformer", "Pooling", "Normalize"]:
        raise ValueError(
            f"{folder}/modules.json: {', '.join(kinds)} must be Transformer, Pooling, Normalize"
        )
    config = _read(folder / modules[1].get("path", "") / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_MODES.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{folder}: the pooling {', '.join(modes)} must be one of {', '.join(POOLINGS)}"
        )
    return str(modes[0])


def read_data(folder: Path, format_name: str, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `data` with which an imported embedder embeds; None for another model.

    folder: its own, or its decoder's. model: the whole. Raises ValueError for a prompt that is no
    instruction.
    """
    if "pooling" not in model.get("language", model):
        return None
    hf = _read(folder / "config.json")
    if (masking := hf.get("instruction_masking") or _MASKING.get(format_name)) is None:
        pooling = _read(folder / "1_Pooling" / "config.json")
        masking = "none" if pooling.get("include_prompt", True) else _NATIVE[0]
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
        length = _read(folder / "sentence_bert_config.json").get("max_seq_length") or 512
        length += build.get("tokens_per_tile", 0)
    length = min(length, model.get("language", model)["max_sequence_length"])
    return {"sequence_length": length, "train": {"build": build}}


def _instruction(folder: Path) -> str | None:
    about = _read(folder / "config_sentence_transformers.json")
    prompt = (about.get("prompts") or {}).get("query") or ""
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
    vision, connector = model["vision"], whole(model["connector"])
    return int((vision["image_size"] // vision["patch_size"] // connector["downsample"]) ** 2)


def _frame(folder: Path, config: Mapping[str, Any], length: int) -> Tokenizer:
    """Make the folder's tokenizer put BOS and EOS around a text; return the training's."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError("an embedder is exported with its tokenizer, and the checkpoint has none")
    options = {k: v for k, v in config["tokenizer"].items() if k not in ("_target_", "path")}
    tokenizer = Tokenizer(str(folder), **options)
    path = str(folder / "tokenizer.json")
    backend = Backend.from_file(path)
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    names = [str(backend.id_to_token(i)) for i in ids]
    template = " ".join([*(f"{n}:0" for n in names[:-1]), "$A:0", f"{names[-1]}:0"])
    backend.post_processor = TemplateProcessing(
        single=template, special_tokens=list(zip(names, ids, strict=True))
    )
    backend.save(path)
    _update(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "right",
            "model_max_length": length,
            "pad_token": backend.id_to_token(tokenizer.pad_id),
            "eos_token": names[-1],
        },
    )
    encoded = Backend.from_file(path).encode("a text").ids
    if [encoded[0], encoded[-1]] != [ids[0] if len(ids) > 1 else encoded[0], ids[-1]]:
        raise ValueError(f"{path} does not begin a text with BOS and end it with EOS: {encoded}")
    return tokenizer


def _update(path: Path, changes: Mapping[str, Any]) -> None:
    _write(path, {**_read(path), **changes})


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
