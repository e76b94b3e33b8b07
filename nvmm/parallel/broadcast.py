"""Send a step's micro-batches from the one reading rank to its model-parallel group.

One rank of each model-parallel group (tensor parallel 0 of the first stage) reads data. Text goes
to every rank of the group; media go to the first pipeline stage only, but every stage learns where
the attended ones stand, all but their pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.batch import ATTENDED, Batch, Media, MediaKind

_ALIGNMENT = 16


def is_reader() -> bool:
    """Return True when this rank reads data for its model-parallel group."""
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group().rank() == 0


def broadcast_batches(
    batches: list[Batch] | None, error: str | None, device: torch.device
) -> list[Batch]:
    """Return the micro-batches of one step on every rank of the model-parallel group; collective.

    Args:
        batches: on the reading rank its micro-batches, or None with `error` when reading failed.
        error: message of the failure; it is raised on every rank.
        device: where the tensors go.

    Raises ValueError with the reader's message.
    """
    from megatron.core import parallel_state

    # 1. The reader describes its batches and lists their tensors, or only says that it failed.
    group = parallel_state.get_model_parallel_group()
    header: list[Any] = []
    text: list[Tensor] = []
    media: list[Tensor] = []
    if group.rank() == 0:
        header = (
            [{"error": error or "no batch"}]
            if batches is None
            else [_describe(batch, text, media) for batch in batches]
        )
    # 2. Text goes to every rank, so that all of them learn of a failure and none waits.
    if group.size() > 1:
        header, text = _broadcast(header, text, group, device)
    if "error" in header[0]:
        raise ValueError(header[0]["error"])
    # 3. Media, which are large, go on to the first stage alone: the reader is its rank 0.
    first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    stage = parallel_state.get_tensor_model_parallel_group()
    if first_stage and stage.size() > 1 and any(item["media"] for item in header):
        _, media = _broadcast([], media, stage, device)
    # 4. Every rank builds its batches from the tensors, in the order they were listed in.
    text = [tensor.to(device, non_blocking=True) for tensor in text]
    media = [tensor.to(device, non_blocking=True) for tensor in media]
    text_parts, media_parts = iter(text), iter(media)
    return [_rebuild(item, text_parts, media_parts if first_stage else None) for item in header]


_BATCH = tuple(f.name for f in fields(Batch) if f.name not in ("media", "extras"))
_POSITION_FIELDS = tuple(
    f.name for f in fields(Media) if f.name not in ("values", "placeholder_id", "tokens_per_item")
)


def _describe(batch: Batch, text: list[Tensor], media: list[Tensor]) -> dict[str, Any]:
    """Return JSON that names the batch's tensors; append the tensors to the two lists in order."""
    present = [name for name in _BATCH if getattr(batch, name) is not None]
    text.extend(getattr(batch, name) for name in present)
    text.extend(batch.extras.values())
    kinds = []
    for kind, item in batch.media.items():
        positions = [name for name in _POSITION_FIELDS if getattr(item, name) is not None]
        media.append(item.values)
        # Every stage needs to know where attended media stand: its layers read their keys.
        target = text if kind.placement == ATTENDED else media
        target.extend(getattr(item, name) for name in positions)
        numbers = {"placeholder_id": item.placeholder_id, "tokens_per_item": item.tokens_per_item}
        values = [_dtype_name(item.values), list(item.values.shape[1:])]
        kinds.append([list(kind), numbers, positions, values])
    return {"text": present, "extras": list(batch.extras), "media": kinds}


def _rebuild(item: dict[str, Any], text: Iterator[Tensor], media: Iterator[Tensor] | None) -> Batch:
    tensors = {name: next(text) for name in item["text"]}
    extras = {name: next(text) for name in item["extras"]}
    kinds: dict[MediaKind, Media] = {}
    for names, numbers, positions, (dtype, shape) in item["media"]:
        kind = MediaKind(*names)
        if media is not None:
            values = next(media)
            source = text if kind.placement == ATTENDED else media
        elif kind.placement == ATTENDED:
            values = tensors["tokens"].new_empty(0, *shape, dtype=getattr(torch, dtype))
            source = text
        else:
            continue  # placed media are of no use behind the first stage
        placed: dict[str, Any] = {name: next(source) for name in positions}
        kinds[kind] = Media(values=values, **placed, **numbers)
    return Batch(**tensors, extras=extras, media=kinds)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _broadcast(
    header: list[Any], tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device
) -> tuple[list[Any], list[Tensor]]:
    """Broadcast the sizes, then one buffer of JSON and aligned tensor bytes: two collectives."""
    source = dist.get_global_rank(group, 0)
    if group.rank() == 0:
        # A copy: contiguous() keeps odd strides of axes of length 1, which no byte view takes.
        tensors = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        layout = [[_dtype_name(t), list(t.shape)] for t in tensors]
        head = json.dumps([header, layout]).encode()
        parts = [_padded(torch.frombuffer(bytearray(head), dtype=torch.uint8))]
        parts += [_padded(tensor.reshape(-1).view(torch.uint8).cpu()) for tensor in tensors]
        buffer = torch.cat(parts).to(device)
        sizes = torch.tensor([len(head), buffer.numel()], dtype=torch.int64, device=device)
        dist.broadcast(sizes, source, group=group)
        dist.broadcast(buffer, source, group=group)
        return header, tensors
    sizes = torch.zeros(2, dtype=torch.int64, device=device)
    dist.broadcast(sizes, source, group=group)
    head_size, total = sizes.tolist()
    buffer = torch.empty(total, dtype=torch.uint8, device=device)
    dist.broadcast(buffer, source, group=group)
    header, layout = json.loads(bytes(buffer[:head_size].cpu().numpy()))
    received, start = [], _round_up(head_size)
    for name, shape in layout:
        dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        received.append(buffer[start : start + size].view(dtype).view(shape))
        start += _round_up(size)
    return header, received


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(data: Tensor) -> Tensor:
    return torch.nn.functional.pad(data, (0, _round_up(data.numel()) - data.numel()))
