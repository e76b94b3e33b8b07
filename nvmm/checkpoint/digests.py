"""Digests of tensors that tell where each element lies, and that add up over pieces.

The digest of a tensor is the sum of its words as integers, each times an odd number that its
position in the whole tensor gives, mod 2**64. A word is two or four neighbours along the last axis
(or one element of 8 bytes), which saves time. So the pieces of any layout give the same sum, one
changed element always changes it, and other changes (elements, rows or pages that are swapped or
set to zero) do unless 32 bits or more happen to agree. It finds damage, not forgery.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DIGESTS = ("digest", "pieces")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORDS = {1: torch.int32, 2: torch.int32, 4: torch.int64, 8: torch.int64}
_PAGE = 65_536  # words whose numbers are kept
_BLOCK = 262_144  # words multiplied at a time, which a core's cache holds
# The odd constants of the golden ratio and of splitmix64, as signed integers.
_STEP, _MIX = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64


def digest(piece: Tensor, offset: Sequence[int]) -> int:
    """Return a piece's part of its tensor's digest, 0 <= digest < 2**64.

    offset: where the piece begins in the whole tensor, one number an axis.
    """
    if piece.numel() == 0:
        return 0
    if piece.dim() == 0:
        piece, offset = piece.reshape(1), (0,)
    # 1. The words of its rows; those that begin or end outside it are filled with zeros.
    size = piece.element_size()
    elements = _WORDS[size].itemsize // size
    bits = piece.detach().contiguous().view(_INTEGERS[size])
    before = offset[-1] % elements
    after = -(before + bits.shape[-1]) % elements
    if before or after:
        bits = torch.nn.functional.pad(bits, (before, after))
    elif bits.storage_offset() % elements:
        bits = bits.clone()
    bits = bits.view(_WORDS[size])
    first = offset[-1] // elements
    # 2. The number of a word is the product of those of its axes: all but the last give rows.
    *axes, width = bits.shape
    rows = torch.ones(1, dtype=torch.int64, device=bits.device)
    for axis, size in enumerate(axes):
        positions = torch.arange(offset[axis], offset[axis] + size, device=bits.device)
        numbers = _page(axis, bits.device)[positions % _PAGE] * _odd(axis, positions // _PAGE)
        rows = (rows[:, None] * numbers).flatten()
    bits = bits.view(-1, width)
    # 3. The number of a column is that of its place in a page times that of the page.
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    begin = 0
    while begin < width:
        page, place = divmod(first + begin, _PAGE)
        count = min(_PAGE - place, width - begin)
        numbers = _page(len(axes), bits.device)[place : place + count]
        part = torch.zeros_like(total)
        step = max(1, _BLOCK // count)
        columns = bits[:, begin : begin + count]
        for block, factors in zip(columns.split(step), rows.split(step), strict=True):
            part += ((block * numbers).sum(1) * factors).sum()
        total += part * _odd(len(axes), torch.tensor(page, device=bits.device))
        begin += count
    return int(total) % 2**64


@functools.lru_cache(maxsize=16)
def _page(axis: int, device: torch.device) -> Tensor:
    """Return the odd numbers [_PAGE], int64, of the places in a page along an axis."""
    return _odd(axis, torch.arange(-_PAGE, 0, device=device))


def _odd(axis: int, positions: Tensor) -> Tensor:
    """Return an odd number, int64, for each position of an axis."""
    numbers = positions + 1
    for _ in range(2):  # one round leaves neighbours alike in their high bits
        numbers = numbers * (_STEP + 2 * axis)
        numbers = numbers ^ (numbers >> 29)
        numbers = numbers * _MIX
        numbers = numbers ^ (numbers >> 32)
    return numbers | 1


def sum_of_bits(tensor: Tensor) -> int:
    """Sum a tensor's bits as integers: the digest of checkpoints without a format, mod 2**64."""
    return int(tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def place(offset: Sequence[int]) -> str:
    """Return the key of a piece in digests.json: where it begins, 0-dimensional pieces at ""."""
    return " ".join(str(int(position)) for position in offset)


def write_digests(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write digests.json of all tensors, and weights.json, which tells the weights of two
    checkpoints apart whatever their layouts.

    tensors: name -> dtype, shape, digest, pieces (place -> digest).
    """
    digests = {name: {key: entry[key] for key in _DIGESTS} for name, entry in tensors.items()}
    weights = {
        name: {"dtype": entry["dtype"], "shape": entry["shape"], "checksum": entry["digest"]}
        for name, entry in tensors.items()
        if is_weight(name)
    }
    for name, content in (("digests.json", digests), ("weights.json", weights)):
        (folder / name).write_text(json.dumps(dict(sorted(content.items())), indent=1))


def is_weight(name: str) -> bool:
    """Return True for the name of a weight, not of optimizer, generators or FP8 scales."""
    return name != "rng" and not name.startswith(("optimizer.", "fp8."))
