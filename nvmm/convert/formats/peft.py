"""PEFT's LoRA folders, and the mapping between factors of its modules and of our linears.

`adapter_model.safetensors` holds `base_model.model.MODULE.lora_A.weight` [r, in] and
`.lora_B.weight` [out, r] of every adapted module; `adapter_config.json` names the modules and their
scales.
Factors of ours are stacked here: a [k * r, in] and b [out, k * r], a block of r for each of the k
members of a fused linear, b zero outside of its row's block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvmm.convert.mapping import Row
from nvmm.convert.safetensors import SafetensorsSource
from nvmm.convert.sources import read

_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode"),
        *("base_model_name_or_path", "revision", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "r", "lora_alpha", "lora_dropout"),
        *("rank_pattern", "alpha_pattern", "use_rslora", "eva_config"),
    }
)
"""Fields of adapter_config.json with which an adapter is A and B, whatever their values."""
_PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""Fields that are supported with these values; others only when they are null, false or empty.

An initial value such as pissa changes the base's weights.
"""


@dataclass(frozen=True)
class Factors:
    """The factors of an update: scale * b @ a is added to a weight.

    a: [rank, in]; b: [out, rank].
    """

    a: Tensor
    b: Tensor
    scale: float

    def rescaled(self, scale: float) -> Factors:
        """Return the same update with another scale, the difference in b."""
        return (
            self if scale == self.scale else Factors(self.a, self.b * (self.scale / scale), scale)
        )


def to_theirs(row: Row, ours: Factors) -> dict[str, Factors]:
    """Return the factors of each of their modules.

    ours: stacked, for the linear that `row` maps.
    """
    names = [name.removesuffix(".weight") for name in row.theirs]
    if getattr(row.mapping, "axis", 0) == 1:
        [a] = row.mapping.to_theirs(ours.a)
        return {names[0]: Factors(a, ours.b, ours.scale)}
    parts = row.mapping.to_theirs(ours.b)
    blocks = zip(names, ours.a.chunk(len(parts)), parts, strict=True)
    return {
        name: Factors(a, part.chunk(len(parts), dim=1)[i].contiguous(), ours.scale)
        for i, (name, a, part) in enumerate(blocks)
    }


def to_ours(row: Row, theirs: Mapping[str, Factors], weight: Tensor) -> Factors | None:
    """Stack the factors of our linear, zero for modules without any; None if all are without.

    theirs: by module, of one scale. weight: a meta tensor shaped like our linear's weight.
    Raises ValueError naming a module whose factors do not fit.
    """
    names = [name.removesuffix(".weight") for name in row.theirs]
    adapted = [theirs[name] for name in names if name in theirs]
    if not adapted:
        return None
    rank, like = max(f.a.shape[0] for f in adapted), adapted[0].a
    blocks, parts = [], []
    for i, (name, shape) in enumerate(zip(names, row.mapping.to_theirs(weight), strict=True)):
        out, columns = shape.shape
        a, b = like.new_zeros(rank, columns), like.new_zeros(out, rank * len(names))
        if name in theirs:
            f = theirs[name]
            r = f.a.shape[0]
            if f.a.shape != (r, columns) or f.b.shape != (out, r):
                raise ValueError(
                    f"{name}: lora_A {list(f.a.shape)} and lora_B {list(f.b.shape)} do not fit a"
                    f" weight of {[out, columns]}"
                )
            a[:r], b[:, rank * i : rank * i + r] = f.a, f.b
        blocks.append(a)
        parts.append(b)
    if getattr(row.mapping, "axis", 0) == 1:
        return Factors(torch.cat(list(row.mapping.to_ours(blocks))), parts[0], adapted[0].scale)
    b = torch.cat(list(row.mapping.to_ours(parts)))
    return Factors(torch.cat(blocks), b, adapted[0].scale)


def write(
    folder: Path,
    modules: Mapping[str, Factors],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base: str | None,
    task: str | None,
    every: Iterable[str],
) -> None:
    """Write an adapter into an existing folder.

    modules: by name. base: the base model's name in the config. task: PEFT's name of what the base
    does, by which its Auto classes are found. every: all modules of the base
    that have a weight, by which the adapted ones are named as shortly as is unambiguous.
    """
    tensors = {}
    for name, f in modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = f.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = f.b.contiguous()
    # One A for a fused module (InternViT's qkv) has the ranks of all its members.
    wider = {name: f.a.shape[0] for name, f in modules.items() if f.a.shape[0] != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _targets(set(modules), set(every)),
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha * r / rank for name, r in wider.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _targets(adapted: set[str], every: set[str]) -> list[str]:
    """Return last names where all modules of that name are adapted, else whole ones."""
    kinds = {name.rpartition(".")[2] for name in adapted}
    short = {
        kind
        for kind in kinds
        if not kind.isdigit() and {n for n in every if n.rpartition(".")[2] == kind} <= adapted
    }
    return sorted(short | {name for name in adapted if name.rpartition(".")[2] not in short})


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Read adapter_config.json and the factors of each module.

    Raises ValueError for anything that is not plain LoRA, and for keys that are not its factors.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} has no readable adapter_config.json: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}/adapter_config.json: peft_type must be LORA")
    for key, value in config.items():
        if value and key not in _UNDERSTOOD and value not in _PLAIN.get(key, ()):
            raise ValueError(f"{folder}/adapter_config.json: {key}={value} is not supported")
    if not (folder / _FILE).is_file():
        raise ValueError(f"{folder} has no {_FILE}")
    source = SafetensorsSource(folder, _FILE)
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key in source.spec:
        fits = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if fits is None:
            strange.append(key)
        else:
            pairs.setdefault(fits[1], {})[fits[2]] = read(source, key)
    strange += [f"{name} (A or B alone)" for name, pair in pairs.items() if len(pair) != 2]
    if strange:
        raise ValueError(f"{folder}: not the factors of a linear: {', '.join(strange)}")
    return config, {
        name: Factors(pair["A"], pair["B"], scale(config, name, pair["A"].shape[0]))
        for name, pair in pairs.items()
    }


def scale(config: Mapping[str, Any], module: str = "", rank: int | None = None) -> float:
    """Return the number that PEFT multiplies a module's B A by.

    It is that of the config's own rank and alpha without a module or a rank.
    """
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module and re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    rank = rank or config.get("r", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
