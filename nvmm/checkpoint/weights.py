"""The weights of the whole model as they are stored: pieces, global shapes, checksums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module

from nvmm.parallel.collectives import gather
from nvmm.parallel.parameters import sharded_state_dict

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 4_194_304  # elements summed at a time
_ROW = 4096  # of them in one int32


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


def checksum(tensor: torch.Tensor) -> int:
    """Sum a contiguous tensor's bits as signed integers of its element size (bytes: unsigned)."""
    bits = tensor.view(_INTEGERS[tensor.element_size()]).flatten()
    total = 0
    for block in bits.split(_BLOCK):
        if block.dtype == torch.int16:
            # Summing int16 as int64 converts each element on its own; a row's sum fits in int32.
            end = len(block) // _ROW * _ROW
            rows = block[:end].view(-1, _ROW).sum(1, dtype=torch.int32)
            total += int(rows.sum(dtype=torch.int64)) + int(block[end:].sum(dtype=torch.int64))
        else:
            total += int(block.sum(dtype=torch.int64))
    return total


def checksums(weights: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sum each weight's bits as integers, mod 2**64: exactly, so the same at every layout.

    Returns name -> dtype, shape and checksum of the whole model's weights. Collective.
    """
    partial: dict[str, dict[str, Any]] = {}
    for piece in pieces(weights):
        if any(piece.replica_id) if isinstance(piece.replica_id, tuple) else piece.replica_id:
            continue
        entry = partial.setdefault(
            piece.key, {"dtype": str(piece.dtype)[6:], "shape": _shape(piece), "checksum": 0}
        )
        entry["checksum"] += checksum(piece.data.detach().contiguous())
    total: dict[str, dict[str, Any]] = {}
    for shard in gather(partial):
        for name, entry in shard.items():
            known = total.setdefault(name, entry | {"checksum": 0})
            known["checksum"] = (known["checksum"] + entry["checksum"]) % 2**64
    return dict(sorted(total.items()))


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
