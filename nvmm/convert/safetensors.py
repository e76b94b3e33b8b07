"""Hugging Face folders of safetensors, read and written tensor by tensor and never mapped whole.

The files are read with plain reads at the offsets of their headers, so that memory holds one tensor
at a time; mapped pages would count as the process's memory until the kernel takes them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nvmm.checkpoint.digests import digest
from nvmm.convert.sources import Source, at_row

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NAMED = "transformers_weights"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
_HEADER_LIMIT = 100_000_000  # the format's own
_PIECE = 16_777_216  # bytes read at a time: few enough to stay in a cache, and malloc's own
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Location:
    path: Path
    offset: int


class SafetensorsSource:
    """The tensors of a folder with model.safetensors, or shards and their index.

    The files are those that Transformers reads: `transformers_weights` of config.json where it is
    set, else model.safetensors, else the index and all that its shards hold. Without any of them
    the folder's one variant is read (model.fp16.safetensors), or its one safetensors file.

    file: the one file to read instead. `unread`: names of weight files beside those that are read.

    Raises ValueError naming the file for a missing or pickled checkpoint, a damaged header, sizes
    that do not add up, and an index that points outside the folder or at what is not there.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self.spec: dict[str, Tensor] = {}
        self._locations: dict[str, _Location] = {}
        paths = [folder / file] if file else _files(folder)
        self.unread = sorted(
            {path.name for kind in _WEIGHTS for path in folder.glob(kind)} - {p.name for p in paths}
        )
        for path in paths:
            header, start = read_header(path)
            for name, (dtype, shape, first) in header.items():
                if name in self.spec:
                    raise ValueError(f"{path}: {name} is in another file too")
                self.spec[name] = torch.empty(shape, dtype=dtype, device="meta")
                self._locations[name] = _Location(path, start + first)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor, read from its file some rows at a time."""
        spec, location = self.spec[name], self._locations[name]
        rows = spec.shape[0] if spec.dim() else 1
        step = max(1, _PIECE * rows // max(spec.nbytes, 1))
        with location.path.open("rb", buffering=0) as stream:
            stream.seek(location.offset)
            for first in range(0, max(rows, 1), step):
                shape = [min(step, rows - first), *spec.shape[1:]] if spec.dim() else []
                out = torch.empty(shape, dtype=spec.dtype)
                view = memoryview(_bytes(out))
                while view:
                    count = stream.readinto(view)  # type: ignore[attr-defined]
                    if not count:
                        raise ValueError(f"{location.path} ends within {name}")
                    view = view[count:]
                yield out


def read_header(path: Path) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], int]:
    """Read name -> (dtype, shape, offset), and the offset at which the data begins.

    Raises ValueError naming the file: nothing is allocated by what a header claims before it has
    been compared with the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in {size}")
        try:
            entries: Any = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged header: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} has a damaged header: not an object")
    entries.pop("__metadata__", None)
    start, header, spans = 8 + length, {}, []
    for name, entry in entries.items():
        dtype, shape, first, last = _entry(path, name, entry)
        spans.append((first, last, name))
        header[name] = (dtype, shape, first)
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{path} has a damaged header: {name} begins at {first}, not at {end}")
        end = last
    if start + end != size:
        raise ValueError(f"{path} has {size} bytes; its header describes {start + end}: truncated?")
    return header, start


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header: {name} is {entry}") from error
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{path} has a damaged header: {name} is {entry}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path} has a damaged header: {name} of shape {shape} and {entry['dtype']} takes"
            f" {math.prod(shape) * dtype.itemsize} bytes, not {last - first}"
        )
    return dtype, shape, first, last


def _files(folder: Path) -> list[Path]:
    """List the files to read, which are those that Transformers would read."""
    # 1. The file that config.json names, the usual one, or the usual index.
    named = _named(folder)
    for name in [named] if named else [_SINGLE, INDEX]:
        if (folder / name).is_file():
            return _listed(folder, name)
    if named:
        raise ValueError(f"{folder}/config.json: transformers_weights={named} is not there")
    # 2. Without them a variant, where there is but one, or one file of another name.
    variants = sorted(
        [
            *folder.glob("model.*.safetensors"),
            *folder.glob("model.safetensors.index.*.json"),
        ],
        key=lambda path: path.name,
    )
    paths = variants or sorted(folder.glob("*.safetensors"), key=lambda path: path.name)
    if len(paths) == 1:
        return _listed(folder, paths[0].name)
    if paths:
        names = ", ".join(path.name for path in paths)
        raise ValueError(
            f"{folder} has {names}, and neither {_SINGLE} nor {INDEX} that says which to read; set"
            " transformers_weights in its config.json"
        )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    why = f"; {pickles[0]} is a pickle, which could run code: refused" if pickles else ""
    raise ValueError(f"{folder} has no safetensors{why}")


def _named(folder: Path) -> str | None:
    """Return the file that config.json says the weights are in, None where it says none."""
    if not (folder / "config.json").is_file():
        return None
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(_NAMED)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if name is not None and not str(name).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{folder}/config.json: {_NAMED}={name!r} is no safetensors file")
    if name is not None and os.path.basename(name) != name:
        raise ValueError(f"{folder}/config.json: {_NAMED}={name!r} is outside its folder: refused")
    return name


def _listed(folder: Path, name: str) -> list[Path]:
    """List one file, or the files of an index; their headers, not the index, say what they hold."""
    if not name.endswith(".json"):
        return [folder / name]
    index = folder / name
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index: {error!r}") from error
    for file in files:
        if file in ("", ".", "..") or os.path.basename(file) != file:
            raise ValueError(f"{index} points at {file!r}, outside its folder: refused")
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file}, which is not there")
    return [folder / file for file in files]


def write_safetensors(
    folder: Path, source: Source, *, max_shard_bytes: int, bar: tqdm | None = None
) -> dict[str, int]:
    """Write a source in its spec's order: one file, or shards and an index.

    Returns name -> digest.
    """
    digests: dict[str, int] = {}
    shards = _shards(source, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        digests |= _write_file(folder / file, source, names, bar)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in source.spec.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _shards(source: Source, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in source.spec.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_file(
    path: Path, source: Source, names: Sequence[str], bar: tqdm | None
) -> dict[str, int]:
    digests: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = source.spec[name]
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name in names:
            written, total, row = 0, 0, 0
            for block in source.blocks(name):
                if block.dtype != source.spec[name].dtype:
                    raise ValueError(f"{name}: a block of {block.dtype} in {source.spec[name]}")
                written += stream.write(memoryview(_bytes(block.contiguous())))
                total += digest(block, at_row(row, block))
                row += block.shape[0] if block.dim() else 1
            if written != source.spec[name].nbytes:
                raise ValueError(f"{name}: read {written} bytes of {source.spec[name].nbytes}")
            digests[name] = total % 2**64
            if bar is not None:
                bar.update(written)
    return digests


def _bytes(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor as a flat numpy array."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
