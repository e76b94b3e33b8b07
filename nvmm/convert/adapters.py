"""Merge LoRA adapters of our checkpoints into the weights; convert them from and to PEFT."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.files import read_state
from nvmm.convert.exporting import layout
from nvmm.convert.files import publish
from nvmm.convert.formats import peft, reward
from nvmm.convert.formats.decoder import POOLING
from nvmm.convert.formats.peft import Factors
from nvmm.convert.importing import on_meta
from nvmm.convert.models import SavedModel, open_checkpoint, write_state, write_weights
from nvmm.convert.sources import Cast, InMemory, Source, WithLora, read
from nvmm.modules.lora import FACTORS, Lora, linears, stacked

log = logging.getLogger("nvmm")
_WITHOUT_HEAD = (
    *("internvit", "internvl_vision", "clip", "siglip", "whisper", "clap", "nvlm_d"),
    *("nv_embed", "mm_embed", "bert"),
)
_RENAMED = ("internvl", "llava")
"""Formats whose modules Transformers calls otherwise than its folders do; PEFT's names are the
modules'."""
_BLOCK = 4_194_304  # elements merged at a time
_STATE = ("config", "tokenizer_digest", "template_digests", "sources", "initialised")


class MergedLora:
    """Weights with their adapters' updates, W + alpha / rank * B A, which are in fp32.

    masks: linear -> [rows, members], of every linear with an adapter.
    """

    def __init__(self, source: Source, masks: Mapping[str, Tensor], scale: float) -> None:
        self.source = source
        self.masks = masks
        self.scale = scale
        weights = {n: t for n, t in source.spec.items() if not n.endswith(FACTORS)}
        self.spec = {
            name: tensor.float() if self._linear(name) else tensor
            for name, tensor in weights.items()
        }

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if linear != name and linear in self.masks else None

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield some rows at a time."""
        linear = self._linear(name)
        if linear is None:
            yield from self.source.blocks(name)
            return
        a, b = (read(self.source, f"{linear}{factor}").float() for factor in FACTORS)
        b = stacked(b, self.masks[linear])
        first, step = 0, max(1, _BLOCK // a.shape[1])
        for block in self.source.blocks(name):
            for rows in block.split(step):
                update = b[first : first + rows.shape[0]] @ a
                first += rows.shape[0]
                yield rows.float() + self.scale * update


def adapters(saved: SavedModel) -> Lora:
    """Return the adapters' options from a checkpoint's config; ValueError when it has none."""
    config = saved.state["config"].get("lora")
    if not saved.has_adapters or config is None:
        raise ValueError(f"{saved.path} has no LoRA adapters")
    return Lora(**{key: value for key, value in config.items() if key != "_target_"})


def merge(
    saved: SavedModel,
    to: Path,
    constructor: Callable[..., Any],
    *,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 1,
) -> None:
    """Write a LoRA checkpoint and its base as one weights-only checkpoint without adapters.

    constructor: of the checkpoint's model. base: where its base lies, if it has moved.
    """
    lora = adapters(saved)
    below, source = _with_bases(saved, base)
    names = [n.removesuffix(FACTORS[0]) for n in source.spec if n.endswith(FACTORS[0])]
    merged = MergedLora(source, _masks(constructor, names), lora.alpha / lora.rank)
    state = {k: v for entry in (*below, saved) for k, v in entry.state.items() if k in _STATE}
    state["config"] = {**saved.state["config"], "lora": None}
    state["merged_from"] = [str(entry.path) for entry in (*below, saved)]
    with publish(to) as temporary:
        # One rounding, of the sum.
        write_weights(temporary, Cast(merged, dtype, like=source.spec), "merge", workers)
        write_state(temporary, state)


def _with_bases(saved: SavedModel, moved: Path | None = None) -> tuple[list[SavedModel], Source]:
    """Return the checkpoints below a LoRA checkpoint, lowest first, and the weights of all."""
    base = BaseCheckpoint.saved(saved.state)
    if base is None:
        return [], saved.source
    base_model = open_checkpoint(Path(base.located(moved).path))
    below, source = _with_bases(base_model)
    return [*below, base_model], WithLora(saved.source, source)


def _masks(constructor: Callable[..., Any], names: Sequence[str]) -> dict[str, Tensor]:
    with on_meta(constructor) as model:
        by_name = linears([model])
        return {name: by_name[name].mask() for name in names}


def export_adapter(
    saved: SavedModel,
    to: Path,
    format_name: str,
    constructor: Callable[..., Any],
    *,
    part: str | None = None,
    base: str | None = None,
) -> None:
    """Write a LoRA checkpoint's adapters as a PEFT folder for the base exported in a format.

    base: that export's folder or hub name, for PEFT's Auto classes; None for the folder that the
    base was imported from, where it was.

    Raises ValueError when the run trained other weights of the part too: those are not adapters.
    """
    lora = adapters(saved)
    _require_plain(format_name)
    prefix = f"{part}." if part else ""
    # 1. The part's names; anything but adapters that was trained has no place in PEFT's folder.
    names_of_part = [name for name in saved.source.spec if name.startswith(prefix)]
    trained = [name for name in names_of_part if not name.endswith(FACTORS)]
    if saved.state.get("base") is not None and trained:
        raise ValueError(
            f"{saved.path} trained more than adapters ({', '.join(trained[:3])} ...): `merge` them"
            " and export the model, or name a part without them with --part"
        )
    config, rows = layout(saved, format_name, part)
    names = [n.removesuffix(FACTORS[0]) for n in names_of_part if n.endswith(FACTORS[0])]
    if not names:
        raise ValueError(f"{saved.path} has no adapters in {part or 'the model'}")
    # 2. Every adapted linear of ours becomes the modules that its row of the table names.
    masks = _masks(constructor, names)
    modules: dict[str, Factors] = {}
    for row in rows:
        linear = f"{prefix}{row.ours}".removesuffix(".weight")
        if row.ours is not None and row.ours.endswith(".weight") and linear in masks:
            a, b = (read(saved.source, f"{linear}{factor}") for factor in FACTORS)
            b = stacked(b, masks[linear].to(b.dtype))
            modules |= peft.to_theirs(row, Factors(a, b, lora.alpha / lora.rank))
    # 3. PEFT names modules by patterns, which must match no module that is not adapted.
    every = [n.removesuffix(".weight") for r in rows for n in r.theirs if n.endswith(".weight")]
    base = base or _imported_from(saved, format_name, part)
    if base is None:
        log.warning(
            "PEFT's Auto classes need the base in Hugging Face's format: export it and name its"
            " folder with --base, or load it yourself and give it to PeftModel.from_pretrained"
        )
    with publish(to) as temporary:
        peft.write(
            temporary,
            modules,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            base=base,
            task=_task(format_name, config),
            every=every,
        )


def _require_plain(format_name: str) -> None:
    """Raise ValueError for a format whose names are not those of PEFT's modules."""
    if format_name in _RENAMED:
        raise ValueError(
            f"--format {format_name} is no format of adapters: name a part and its own format"
            " (--part language --format qwen2), or `merge` them"
        )


def _task(format_name: str, config: Mapping[str, Any]) -> str | None:
    """Return PEFT's name of what a model of a format and config.json does."""
    if format_name in reward.FORMATS:
        return "SEQ_CLS"
    return None if format_name in _WITHOUT_HEAD or config.get(POOLING) else "CAUSAL_LM"


def _imported_from(saved: SavedModel, format_name: str, part: str | None) -> str | None:
    """Return the Hugging Face folder whose weights are a LoRA checkpoint's base, None without."""
    base = BaseCheckpoint.saved(saved.state)
    if base is None or not (Path(base.path) / "state.json").is_file():
        return None
    state = read_state(Path(base.path))
    source = (state.get("sources") or {}).get(part or "") or {}
    if source.get("format") != format_name or "merged_from" in state or state.get("base"):
        return None
    return str(source["folder"])


def import_adapter(
    folder: Path,
    base: SavedModel,
    to: Path,
    format_name: str,
    constructor: Callable[..., Any],
    *,
    part: str | None = None,
) -> None:
    """Write a PEFT folder as a LoRA checkpoint over a base of ours.

    Modules of smaller rank are filled with zeros up to the largest; of another scale, their B is
    multiplied by the ratio. Raises ValueError listing modules that the format's table has not.
    """
    _require_plain(format_name)
    # 1. Their factors, and our linears that may take them.
    config, theirs = peft.load(folder)
    scale = peft.scale(config)
    if not scale > 0:
        raise ValueError(f"{folder}/adapter_config.json: a scale of {scale} adapts nothing")
    theirs = {name: f.rescaled(scale) for name, f in theirs.items()}
    prefix = f"{part}." if part else ""
    _, rows = layout(base, format_name, part)
    with on_meta(constructor) as model:
        known = {name: (f.mask(), f.module.weight) for name, f in linears([model]).items()}
    # 2. Each row of the table collects the factors of one linear; all of theirs must be used.
    ours: dict[str, tuple[Tensor, Tensor]] = {}
    mapped: set[str] = set()
    for row in rows:
        linear = f"{prefix}{row.ours}".removesuffix(".weight")
        if row.ours is None or not row.ours.endswith(".weight") or linear not in known:
            continue
        mask, weight = known[linear]
        factors = peft.to_ours(row, theirs, weight)
        mapped |= {name.removesuffix(".weight") for name in row.theirs}
        if factors is not None:
            ours[linear] = _folded(factors, mask)
    unmapped = sorted(theirs.keys() - mapped)
    if unmapped or not ours:
        raise ValueError(
            f"{folder} adapts what --format {format_name} has no linear for:"
            f" {', '.join(unmapped) or 'nothing at all'}"
        )
    # 3. One rank for all: smaller ones are filled with zeros, member by member.
    rank = max(b.shape[1] for _, b in ours.values())
    tensors = {}
    for linear, (a, b) in ours.items():
        missing = rank - b.shape[1]
        blocks = a.unflatten(0, (-1, b.shape[1]))
        tensors[linear + FACTORS[0]] = torch.nn.functional.pad(blocks, (0, 0, 0, missing)).flatten(
            0, 1
        )
        tensors[linear + FACTORS[1]] = torch.nn.functional.pad(b, (0, missing))
    # 4. The checkpoint names its base by digest, and the adapters by a config of ours.
    lora = {
        "_target_": "nvmm.modules.lora.Lora",
        "targets": _patterns(set(ours), set(known)),
        "rank": rank,
        "alpha": scale * rank,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "train": [],
    }
    state = {key: base.state[key] for key in _STATE if key in base.state}
    state["config"] = {**base.state["config"], "lora": lora}
    state |= {"base": asdict(BaseCheckpoint.of(base.path)), "adapter_from": str(folder)}
    with publish(to) as temporary:
        write_weights(temporary, InMemory(tensors), "adapter", 1)
        write_state(temporary, state)


def _folded(factors: Factors, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Fold stacked factors to a [members * r, in] and b [out, r].

    Where the factors are no stack, all members get a copy of the one A.
    """
    count = mask.shape[1]
    rank, rest = divmod(factors.a.shape[0], count)
    if not rest:
        blocks = factors.b.unflatten(1, (count, rank))
        mask = mask.to(blocks.dtype).unsqueeze(-1)
        if not (blocks * (1 - mask)).any():
            return factors.a, (blocks * mask).sum(1)
    return factors.a.repeat(count, 1), factors.b


def _patterns(adapted: set[str], every: set[str]) -> list[str]:
    """Return names with a * for the layer where all layers are adapted, else as they are."""
    patterns = set()
    for name in adapted:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        alike = {n for n in every if re.sub(r"(?<=\.)\d+(?=\.)", "*", n) == pattern}
        patterns.add(pattern if alike <= adapted else name)
    return sorted(patterns)
