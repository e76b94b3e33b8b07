"""Load a checkpoint: a whole run to resume, weights alone, or FP8 scales, at any layout."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.contents import Contents
from nvmm.checkpoint.digests import is_weight
from nvmm.checkpoint.files import read_state, require_resumable
from nvmm.checkpoint.index import weight_names
from nvmm.checkpoint.record import DamagedError, read_record
from nvmm.checkpoint.weights import (
    current_layout,
    global_shapes,
    pieces,
    rng_tensor,
    sharded_weights,
    without,
)
from nvmm.config.parts import part_alone
from nvmm.parallel import generators
from nvmm.parallel.collectives import gather

log = logging.getLogger("nvmm")
_CONNECTOR = "connector."


def load(
    path: Path, models: Sequence[Module], optimizer: Any, base: Path | None = None
) -> dict[str, Any]:
    """Restore weights, optimizer and generators; return the saved state; collective.

    base: where the base of a LoRA checkpoint lies, if it has moved. The layout may differ from
    the saved one; generators then start from a new seed, with a warning. Raises ValueError when
    the checkpoint is unsafe or is not of this model, DamagedError when a file of it (of its base)
    is missing or is not what was saved; the model may have some of its weights by then.
    """
    # 1. The JSON and the screened index: neither mcore nor torch has opened the directory yet.
    path = Path(path)
    require_resumable(path)
    record = read_record(path)
    contents = Contents.open(path)
    metadata = contents.metadata
    # 2. Names and shapes must be the model's, but for weights that a LoRA run's base gives.
    model_state = sharded_weights(models)
    weights = global_shapes(model_state)
    missing, unexpected = _compare(path, metadata, weights)
    base_checkpoint = BaseCheckpoint.saved(record["state"])
    left_out: set[str] = set()
    if base_checkpoint is not None:
        base_checkpoint = base_checkpoint.located(base)
        left_out = set(missing) & base_checkpoint.names()
    missing = [name for name in missing if name not in left_out]
    if missing or unexpected:
        raise ValueError(
            f"{path} is not of this model: missing in it {missing or 'nothing'}, only in it"
            f" {unexpected or 'nothing'}"
        )
    # 3. The layout must suit the way the optimizer was saved in.
    sharding_type = record["optimizer"]["sharding_type"]
    same_layout = record["layout"] == current_layout()
    same_but_dp = record["layout"] | {"world_size": 0} == current_layout() | {"world_size": 0}
    if sharding_type == "dp_reshardable" and not same_but_dp:
        raise ValueError(
            f"{path} was saved with checkpoint.optimizer=dp_reshardable at {record['layout']}"
            f" and loads at another data parallel size only, not at {current_layout()}"
        )
    optimizer_state = optimizer.sharded_state_dict(model_state, True, sharding_type)
    _refuse_missing_optimizer_state(path, metadata, optimizer_state)
    # 4. The base's weights come first: those of the checkpoint itself replace some of them.
    if base_checkpoint is not None:
        load_weights(Path(base_checkpoint.path), models)
    sharded = {"optimizer": optimizer_state, **without(model_state, left_out)}
    if same_layout:
        sharded["rng"] = rng_tensor(None, metadata.state_dict_metadata["rng"].size[1])
    loaded = _load_sharded(sharded, contents)
    _load_models(models, loaded)
    # A stage with nothing trainable has no optimizer state; mcore drops empty branches.
    optimizer_state = loaded.get("optimizer", {})
    optimizer.load_state_dict(optimizer_state, sharding_type, record["optimizer"]["steps"])
    # 5. Random numbers go on where they can.
    if same_layout:
        generators.restore(loaded["rng"].flatten())
    else:
        contents.check("rng")  # what is not used is not damaged either
        _reseed(path, record)
    state: dict[str, Any] = record["state"]
    return state


def load_weights(
    path: Path,
    models: Sequence[Module],
    base: Path | None = None,
    *,
    part: bool = False,
    other_graph: bool = False,
) -> list[str]:
    """Load the weights a checkpoint has in common with the model, into unwrapped chunks.

    A LoRA checkpoint's base is loaded before it; `base` is where that lies if it has moved.

    other_graph: for a new run. A checkpoint of a language model or an encoder alone then gives that
    part of the model, and where it is of another class of model (NVLM-D for X), a connector of
    other shapes is left as it is and counted as missing.

    Collective. Call `Optimizer.reload_parameters` afterwards if there is an optimizer. Returns
    the model's global names that are missing in the checkpoint; what only the checkpoint has is
    logged, unless the model is meant to be a part of it (`part`). Raises ValueError naming both
    shapes when they differ, when nothing is in common, and when it has adapters that the model has
    not, DamagedError when its files are not those that were saved.
    """
    path = Path(path)
    base_checkpoint = BaseCheckpoint.saved(read_state(path))
    missing_in_base = None
    if base_checkpoint is not None:
        located = Path(base_checkpoint.located(base).path)
        missing_in_base = set(load_weights(located, models, part=part, other_graph=other_graph))
    model_state = sharded_weights(models)
    weights = global_shapes(model_state)
    contents = Contents.open(path)
    left: set[str] = set()
    prefix = ""
    if other_graph:
        prefix = _part_prefix(path, weights)
        left = _other_connector(path, models, contents.metadata, weights)
        # What the checkpoint's names do not mean is missing.
        left |= {name for name in weights if not name.startswith(prefix)}
        model_state = without(model_state, left)
        _drop_prefix(model_state, prefix)
    kept = {n.removeprefix(prefix): shape for n, shape in weights.items() if n not in left}
    missing, unexpected = _compare(path, contents.metadata, kept)
    adapters = [name for name in unexpected if name.endswith(".lora_a")]
    if part:
        adapters = [n for n in adapters if f"{n.removesuffix('.lora_a')}.weight" in weights]
    if adapters:
        raise ValueError(
            f"{path} has LoRA adapters where this model has none: give the lora= it was trained"
            " with, or put them into the weights with nvmm convert merge"
        )
    if len(missing) == len(kept):
        if part and missing_in_base is not None:
            return sorted(missing_in_base)  # A LoRA run left the whole part to its base.
        raise ValueError(f"{path} has no weight of this model; it has {unexpected[:3]} ...")
    if unexpected and not part and dist.get_rank() == 0:
        log.warning("%s has weights this model does not have: %s", path, ", ".join(unexpected))
    absent = set(missing)
    _load_models(models, _load_sharded(without(model_state, absent), contents))
    absent = {prefix + name for name in absent} | left
    missing = sorted(absent)
    return missing if missing_in_base is None else sorted(absent & missing_in_base)


def is_other_graph(path: Path, models: Sequence[Module]) -> bool:
    """Return whether a checkpoint, or a base below it, is of another graph than the model.

    It then cannot be the base of a LoRA run: names or shapes of what it gives are others.
    Collective.
    """
    weights = global_shapes(sharded_weights(models))
    below: BaseCheckpoint | None = BaseCheckpoint(str(path), "")
    while below is not None:
        path = Path(below.path)
        metadata = Contents.open(path).metadata
        if _part_prefix(path, weights) or _other_connector(path, models, metadata, weights):
            return True
        base = BaseCheckpoint.saved(read_state(path))
        below = base.located() if base is not None else None
    return False


def _part_prefix(path: Path, weights: Mapping[str, Any]) -> str:
    """Return what a model of parts puts before the names of a checkpoint of one part alone."""
    model = (read_state(path).get("config") or {}).get("model") or {}
    prefix = f"{part_alone(model)}."
    return prefix if any(name.startswith(prefix) for name in weights) else ""


def _other_connector(
    path: Path, models: Sequence[Module], metadata: Any, weights: Mapping[str, list[int]]
) -> set[str]:
    """Return the names of a connector whose shapes are others in a checkpoint of another class."""
    model = (read_state(path).get("config") or {}).get("model") or {}
    if model.get("_target_") == f"{type(models[0]).__module__}.{type(models[0]).__qualname__}":
        return set()
    names = {name for name in weights if name.startswith(_CONNECTOR)}
    saved = metadata.state_dict_metadata
    differs = any(name in saved and list(saved[name].size) != weights[name] for name in names)
    return names if differs else set()


def _drop_prefix(model_state: dict[str, dict[str, Any]], prefix: str) -> None:
    """Ask a checkpoint for the names that it has: without the prefix of the part that it is."""
    for entry in (e for state in model_state.values() for e in state.values()):
        entry.key = entry.key.removeprefix(prefix)


def load_scales(path: Path, scaling: Any) -> list[str]:
    """Load the FP8 scales that a checkpoint has in common with an nvmm.modules.fp8_scales.Scaling.

    Collective. Returns the names of those it has not, which are left as they are. Raises ValueError
    where a history has another length.
    """
    path = Path(path)
    scales = scaling.sharded_state_dict()
    contents = Contents.open(path)
    metadata = contents.metadata
    saved = {n: list(entry.size) for n, entry in metadata.state_dict_metadata.items()}
    # A stage knows its own linears alone; a refusal must come on every rank.
    local_shapes = {name: list(entry.global_shape) for name, entry in scales.items()}
    shapes = {name: shape for rank in gather(local_shapes) for name, shape in rank.items()}
    for name in shapes.keys() & saved.keys():
        if shapes[name] != saved[name]:
            raise ValueError(
                f"{path}: precision.fp8.amax_history_len={shapes[name][0] - 1} must be"
                f" {saved[name][0] - 1}, as it was saved"
            )
    missing = sorted(shapes.keys() - saved.keys())
    if len(missing) < len(shapes):
        present = {name: entry for name, entry in scales.items() if name in saved}
        scaling.load(_load_sharded({"scaling": present}, contents).get("scaling", {}))
    return missing


def _compare(
    path: Path, metadata: Any, weights: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """Return (names only in the model, names only in the checkpoint).

    Raises ValueError where a weight of both has two shapes.
    """
    saved = {name: list(metadata.state_dict_metadata[name].size) for name in weight_names(metadata)}
    wrong = [
        f"{name} is {saved[name]} in the checkpoint, {shape} in the model"
        for name, shape in weights.items()
        if name in saved and saved[name] != shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model: " + "; ".join(wrong))
    return sorted(weights.keys() - saved.keys()), sorted(saved.keys() - weights.keys())


def _refuse_missing_optimizer_state(path: Path, metadata: Any, state: dict[str, Any]) -> None:
    local_keys = {piece.key: None for piece in pieces(state)}
    keys = {key for rank in gather(local_keys) for key in rank}
    missing = sorted(keys - metadata.state_dict_metadata.keys())
    if missing:
        raise ValueError(
            f"{path} has no optimizer state for what is trained here and was not there (is"
            f" optim.freeze another? start with init_from={path} instead of resuming): {missing}"
        )


def _load_sharded(sharded: dict[str, Any], contents: Contents) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    _check_sums(contents, sharded)
    try:
        with contents.reading():
            return dist_checkpointing.load(sharded, str(contents.path))
    except CheckpointingException as error:
        raise ValueError(f"{contents.path} cannot be loaded: {error}") from error
    except CheckpointException as error:
        # Every rank gets what each rank raised.
        for failure, _ in error.failures.values():
            if isinstance(failure, DamagedError):
                raise failure from error
        raise


def _check_sums(contents: Contents, sharded: dict[str, Any]) -> None:
    """Read the weights of a checkpoint without digests to compare their sums; collective."""
    if contents.sums is None:
        return
    local = {piece.key: None for piece in pieces(sharded) if is_weight(piece.key)}
    names = sorted({name for rank in gather(local) for name in rank})
    problems: dict[str, Any] = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            contents.check(name)
        except DamagedError as error:
            problems[name] = error.args[1]
    found = {name: what for rank in gather(problems) for name, what in rank.items()}
    if found:
        raise DamagedError(contents.path, "; ".join(found.values()))


def _load_models(models: Sequence[Module], loaded: dict[str, Any]) -> None:
    for index, model in enumerate(models):
        # Not strict: mcore's modules expect _extra_state entries, which hold nothing.
        result = model.load_state_dict(loaded.get(f"model{index}", {}), strict=False)
        assert not result.unexpected_keys, result.unexpected_keys


def _reseed(path: Path, record: dict[str, Any]) -> None:
    content = json.dumps([record["step"], json.loads((path / "weights.json").read_text())])
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    generators.reseed(int.from_bytes(digest, "big") % 2**30)
    if dist.get_rank() == 0:
        log.warning(
            f"{path} was saved at {record['layout']}, this run is at {current_layout()}: random"
            " generators start from a new seed (other dropout masks)"
        )
