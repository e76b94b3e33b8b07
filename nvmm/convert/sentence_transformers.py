"""The files of an exported embedder beside its weights.

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

from nvmm.data.samples.retrieval import TEMPLATE
from nvmm.data.samples.tokenizer import Tokenizer

log = logging.getLogger("nvmm")
_MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def write_embedder(folder: Path, config: Mapping[str, Any], hidden_size: int) -> None:
    """Complete an exported folder.

    config: the checkpoint's; its data.train.build says instruction, masking and length.
    Warns where sentence-transformers would pool other tokens than the training did. Raises
    ValueError when the folder has no tokenizer or it does not frame a text.
    """
    build = ((config.get("data") or {}).get("train") or {}).get("build") or {}
    masking = build.get("masking", "sentence_transformers")
    length = (config.get("data") or {}).get("sequence_length", 512)
    if masking not in ("sentence_transformers", "none"):
        log.warning(
            "sentence-transformers leaves out of the mean what masking=sentence_transformers does,"
            " not masking=%s: a query's vector differs from the training's; give Transformers a"
            " pool_mask instead",
            masking,
        )
    _update(folder / "config.json", {"instruction_masking": masking})
    source = files("nvmm.convert.formats") / "modeling_nvembed.py"
    (folder / "modeling_nvembed.py").write_text(source.read_text(encoding="utf-8"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(_MODULES.items())
    ]
    _write(folder / "modules.json", modules)
    pooling = {
        "embedding_dimension": hidden_size,
        "pooling_mode": "mean",
        "include_prompt": masking == "none",
    }
    _write(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir()
    _write(folder / "sentence_bert_config.json", {"max_seq_length": length})
    instruction = build.get("instruction")
    prompts = {"query": TEMPLATE.format(instruction=instruction) if instruction else ""}
    about = {"prompts": prompts | {"document": ""}, "default_prompt_name": None}
    _write(folder / "config_sentence_transformers.json", about | {"similarity_fn_name": "cosine"})
    _frame(folder, config, length)


def _frame(folder: Path, config: Mapping[str, Any], length: int) -> None:
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


def _update(path: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write(path, {**content, **changes})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
