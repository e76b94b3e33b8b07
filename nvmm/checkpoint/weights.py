"""The weights of the whole model as they are stored: pieces, global shapes, digests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module

from nvmm.checkpoint.digests import digest, place
from nvmm.parallel.collectives import gather
from nvmm.parallel.parameters import sharded_state_dict


def sharded_weights(models: Sequence[Module]) -> dict[str, dict[str, Any]]:
    """Return one entry a chunk: local names repeat in virtual stages, the sharded keys do not."""
    return {f"model{index}": sharded_state_dict(model) for index, model in enumerate(models)}


def pieces(sharded: dict[Any, Any]) -> Iterator[Any]:
    """Yield every ShardedTensor of this rank, fused parameters cut as they are stored."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensorFactory):
            yield from nested_values(entry.build())
        elif isinstance(entry, ShardedTensor):
            yield entry


def _shape(piece: Any) -> list[int]:
    return [int(size) for size in piece.global_shape]


def global_shapes(weights: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Return the global shape of every weight of the whole model; collective."""
    shapes: dict[str, list[int]] = {}
    for shard in gather({piece.key: _shape(piece) for piece in pieces(weights)}):
        shapes |= shard
    return dict(sorted(shapes.items()))


def digests(sharded: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    """Digest every tensor of a sharded state, of which each piece is some rank's main replica.

    Returns name -> dtype, shape, digest, and pieces (offset as text -> digest). Collective.
    """
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    local: dict[str, dict[str, Any]] = {}
    for piece in pieces(sharded):
        if is_main_replica(piece.replica_id):
            about = {"dtype": str(piece.dtype).removeprefix("torch."), "shape": _shape(piece)}
            entry = local.setdefault(piece.key, about | {"pieces": {}})
            offset = piece.global_offset
            entry["pieces"][place(offset)] = digest(piece.data, offset)
    whole: dict[str, dict[str, Any]] = {}
    for shard in gather(local):
        for name, entry in shard.items():
            known = whole.setdefault(name, entry | {"digest": 0, "pieces": {}})
            known["pieces"] |= entry["pieces"]
    for entry in whole.values():
        entry["digest"] = sum(entry["pieces"].values()) % 2**64
    return dict(sorted(whole.items()))


def without(weights: dict[str, dict[str, Any]], names: Set[str]) -> dict[str, dict[str, Any]]:
    """Return the sharded weights but those of these global names."""
    return {
        chunk: {key: entry for key, entry in state.items() if entry.key not in names}
        for chunk, state in weights.items()
    }


def current_layout() -> dict[str, int]:
    """Return the sizes that random states and plain data-parallel shards depend on."""
    from megatron.core import parallel_state

    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def rng_tensor(data: torch.Tensor | None, length: int = 0) -> Any:
    """Return this rank's row of the tensor [world size, longest state], padded with spaces."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if data is not None:
        length = max(shard["length"] for shard in gather({"length": data.numel()}))
    row = torch.full((1, length), ord(" "), dtype=torch.uint8)
    if data is not None:
        row[0, : data.numel()] = data
    return ShardedTensor.from_rank_offsets("rng", row, (0, dist.get_rank(), dist.get_world_size()))
