"""Compare two models: tensor by tensor through the mapping, then by their logits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.checkpoint.contents import Contents
from nvmm.checkpoint.record import DamagedError
from nvmm.config.parts import part_alone
from nvmm.convert.formats import megatron
from nvmm.convert.models import HubFolder, SavedModel, open_checkpoint, open_folder
from nvmm.convert.sources import Source, read


def open_side(path: Path) -> HubFolder | SavedModel:
    """Open a Hugging Face folder, one of Megatron-LM's, or a checkpoint of ours."""
    if (path / "config.json").is_file() or megatron.locate(path) is not None:
        return open_folder(path)
    return open_checkpoint(path)


def aligned(
    a: HubFolder | SavedModel, b: HubFolder | SavedModel
) -> tuple[HubFolder | SavedModel, HubFolder | SavedModel]:
    """Return both sides, of a checkpoint with parts the one that the other side is a folder of.

    Raises ValueError for a LoRA checkpoint, whose weights are not in it, and for a part that the
    checkpoint does not have.
    """
    for side in (a, b):
        if isinstance(side, SavedModel) and side.has_adapters:
            raise ValueError(f"{side.path} has LoRA adapters: `merge` them first")
    return _part_like(a, b), _part_like(b, a)


def _part_like(side: HubFolder | SavedModel, other: HubFolder | SavedModel) -> Any:
    theirs = other.model if isinstance(other, SavedModel) else other.model()
    if not isinstance(side, SavedModel) or "transformer" in side.model or "language" in theirs:
        return side
    name = part_alone(theirs)
    if name not in side.model:
        raise ValueError(f"{side.path} has no part like {other.path}")
    return side.part(name)


def compare_tensors(a: HubFolder | SavedModel, b: HubFolder | SavedModel) -> dict[str, Any]:
    """Compare two models under our names, in fp32 where their dtypes differ.

    Returns {"tensors": how many both have, "equal": how many are bit-equal, "only_in_a",
    "only_in_b", "different": name -> largest absolute difference}.
    """
    first, second = _sources(a, b)
    both = [name for name in first.spec if name in second.spec]
    different: dict[str, Any] = {}
    for name in both:
        one, other = read(first, name), read(second, name)
        if one.shape != other.shape:
            different[name] = f"shapes {list(one.shape)} and {list(other.shape)}"
        elif one.dtype != other.dtype or not torch.equal(one, other):
            gap = float((one.float() - other.float()).abs().max())
            if gap or one.dtype == other.dtype:
                different[name] = gap
    return {
        "tensors": len(both),
        "equal": len(both) - len(different),
        "only_in_a": [name for name in first.spec if name not in second.spec],
        "only_in_b": [name for name in second.spec if name not in first.spec],
        "different": different,
    }


def compare_logits(a: Tensor, b: Tensor) -> dict[str, float]:
    """Compare logits [b, s, vocabulary] of two models, over the vocabulary that both have.

    KL is of a's distribution from b's, in nats, the mean over positions.
    """
    width = min(a.shape[-1], b.shape[-1])
    a, b = a[..., :width].double(), b[..., :width].double()
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    gap = (a - b).abs()
    return {
        "max_difference": float(gap.max()),
        "mean_difference": float(gap.mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }


def verified(path: Path) -> tuple[bool, str]:
    """Read every tensor of a checkpoint of ours; say whether it is whole, and what is damaged.

    Raises ValueError for a folder that is no checkpoint of ours.
    """
    try:
        side = open_side(path)
    except DamagedError as error:
        return False, str(error)
    if isinstance(side, HubFolder):
        raise ValueError(f"{path}: only a checkpoint of ours has digests to verify")
    contents = Contents.open(side.path)
    found = []
    for name in contents.metadata.state_dict_metadata:
        try:
            contents.check(name)
        except DamagedError as error:
            found.append(str(error))
    if found:
        return False, "\n".join(found)
    if contents.digests is None:
        return True, f"{side.path}: the weights are as they were saved; the rest has no digests yet"
    return True, f"{side.path}: every bit is as it was saved"


def inspect(side: HubFolder | SavedModel) -> dict[str, Any]:
    """Describe a model without loading tensors.

    digest: of names, shapes and dtypes, and of the checksums where a checkpoint has them.
    """
    spec = side.source.spec
    content = "\n".join(f"{n} {list(t.shape)} {t.dtype}" for n, t in sorted(spec.items()))
    about: dict[str, Any] = {"path": str(side.path)}
    if isinstance(side, HubFolder):
        about |= {"format": side.format, "config": side.config}
    else:
        about |= side.record()
        weights = side.path / "weights.json"
        content += weights.read_text() if weights.is_file() else ""
    return about | {
        "parameters": sum(tensor.numel() for tensor in spec.values()),
        "bytes": sum(tensor.nbytes for tensor in spec.values()),
        "digest": hashlib.sha256(content.encode()).hexdigest(),
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in spec.items()
        },
    }


def _sources(a: HubFolder | SavedModel, b: HubFolder | SavedModel) -> tuple[Source, Source]:
    """Return both under our names; a folder takes the model config of a checkpoint beside it."""
    saved = [side for side in (a, b) if isinstance(side, SavedModel)]
    converted: list[Source] = [
        side.to_ours(saved[0].model if saved else side.model())
        if isinstance(side, HubFolder)
        else side.source
        for side in (a, b)
    ]
    return converted[0], converted[1]
