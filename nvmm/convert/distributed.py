"""torch's distributed checkpoint format, written and read tensor by tensor in one process.

`write_distributed` writes a weights-only checkpoint that megatron-core's dist_checkpointing loads
at any layout. torch's own FileSystemWriter is not used: it keeps every tensor of a file in memory
until the file is complete.
"""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from tqdm import tqdm

from nvmm.checkpoint.weights import checksum
from nvmm.convert.sources import Source

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistributedSource:
    """The tensors of a distributed checkpoint.

    metadata: torch's Metadata of it, screened by the caller: torch would unpickle it.
    names: those to read; None for all.
    """

    def __init__(self, folder: Path, metadata: Metadata, names: list[str] | None = None) -> None:
        self.folder = folder
        self.metadata = metadata
        self.entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and (names is None or name in names)
        }
        self.spec = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self.entries.items()
        }
        for name in self.spec:
            self._check(name)

    def _check(self, name: str) -> None:
        """Compare the index with the files' sizes before anything is allocated by its claims."""
        spec, chunks = self.spec[name], self.entries[name].chunks
        covered = 0
        for chunk in chunks:
            info = self._storage_of(name, chunk)
            path = self.folder / info.relative_path
            size = path.stat().st_size if path.is_file() else 0
            numel = chunk.sizes.numel()
            if info.offset + info.length > size or info.length < numel * spec.itemsize:
                raise ValueError(f"{path}: {size} bytes do not hold {name} {list(chunk.sizes)}")
            covered += numel
        if covered != spec.numel():
            raise ValueError(f"{self.folder}: the pieces of {name} do not make it up")

    def _storage_of(self, name: str, chunk: ChunkStorageMetadata) -> _StorageInfo:
        try:
            return self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: {name} is stored nowhere") from error

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor, put together from the pieces it is stored in."""
        spec = self.spec[name]
        chunks = self.entries[name].chunks
        if all(chunk.sizes[1:] == spec.shape[1:] for chunk in chunks):
            for chunk in sorted(chunks, key=lambda chunk: tuple(chunk.offsets)):
                yield self._read(name, chunk)
            return
        out = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in chunks:
            region = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            out[region] = self._read(name, chunk)
        yield out

    def _read(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage_of(name, chunk)
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as stream:
                window: Any = _create_file_view(stream, info.offset, info.length)
                tensor = torch.load(window, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from error
        spec = self.spec[name]
        # A layer of a stacked tensor is stored with a leading axis of 1.
        shapes = (chunk.sizes, torch.Size([1, *chunk.sizes]))
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape not in shapes
            or tensor.dtype != spec.dtype
        ):
            raise ValueError(f"{path}: {name} is not the tensor that the index describes")
        return tensor.detach().view(chunk.sizes)


def write_distributed(
    folder: Path, source: Source, *, workers: int = 1, bar: tqdm | None = None
) -> dict[str, dict[str, Any]]:
    """Write a source's tensors into an existing folder, one file a worker.

    Returns name -> dtype, shape and checksum (sum of the bits as integers, mod 2**64), as a
    training run's weights.json has them.
    """
    # 1. Each worker gets about as many bytes: the largest tensors are dealt first.
    shares: list[list[str]] = [[] for _ in range(workers)]
    filled = [0] * workers
    for name, spec in sorted(source.spec.items(), key=lambda item: -item[1].nbytes):
        share = filled.index(min(filled))
        shares[share].append(name)
        filled[share] += spec.nbytes
    # 2. The data files; one worker's failure stops the others at their next tensor.
    writers = [_Writer(folder, f"__0_{i}.distcp", source, bar) for i in range(workers)]
    with _without_crc(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(w.run, names) for w, names in zip(writers, shares, strict=True)]
        for future in futures:
            try:
                future.result()
            except BaseException:
                for writer in writers:
                    writer.stop.set()
                raise
    # 3. The index, which says where each piece lies, and the files beside it.
    metadata = Metadata(
        {name: entry for writer in writers for name, entry in writer.entries.items()},
        storage_data={key: info for writer in writers for key, info in writer.storage.items()},
        storage_meta=StorageMeta(),
    )
    checksums = {name: c for writer in writers for name, c in writer.checksums.items()}
    common = io.BytesIO()
    torch.save({}, common)
    for name, content in (
        ("common.pt", common.getvalue()),
        ("metadata.json", json.dumps(_FORMAT).encode()),
        ("weights.json", json.dumps(dict(sorted(checksums.items())), indent=1).encode()),
        (".metadata", pickle.dumps(metadata)),
    ):
        (folder / name).write_bytes(content)
    return checksums


@contextmanager
def _without_crc() -> Iterator[None]:
    """Turn off torch.save's CRC-32, which takes longer than writing; weights.json has checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer:
    """The writer of one data file."""

    def __init__(self, folder: Path, file: str, source: Source, bar: tqdm | None) -> None:
        self.path = folder / file
        self.source = source
        self.bar = bar
        self.stop = threading.Event()
        self.entries: dict[str, TensorStorageMetadata] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.checksums: dict[str, dict[str, Any]] = {}

    def run(self, names: list[str]) -> None:
        """Write the tensors one after the other, in the blocks they come in."""
        with self.path.open("wb") as stream:
            for name in names:
                if self.stop.is_set():
                    return
                self._write(stream, name)

    def _write(self, stream: io.BufferedWriter, name: str) -> None:
        spec = self.source.spec[name]
        chunks, row, total = [], 0, 0
        for block in self.source.blocks(name):
            if block.dtype != spec.dtype:
                raise ValueError(f"{name}: a block of {block.dtype} in a tensor of {spec.dtype}")
            # torch.save writes a tensor's whole storage: a view of a larger one is copied.
            if not block.is_contiguous() or block.untyped_storage().nbytes() != block.nbytes:
                block = block.clone(memory_format=torch.contiguous_format)
            offsets = torch.Size([row, *[0] * (spec.dim() - 1)][: spec.dim()])
            begin = stream.tell()
            torch.save(block, stream)
            info = _StorageInfo(self.path.name, begin, stream.tell() - begin)
            self.storage[MetadataIndex(name, offsets)] = info
            chunks.append(ChunkStorageMetadata(offsets, block.shape))
            total += checksum(block)
            row += block.shape[0] if block.dim() else 1
            if self.bar is not None:
                self.bar.update(block.nbytes)
        if sum(chunk.sizes.numel() for chunk in chunks) != spec.numel():
            raise ValueError(f"{name}: its blocks do not make up {list(spec.shape)}")
        self.entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype), spec.shape, chunks
        )
        self.checksums[name] = {
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
            "checksum": total % 2**64,
        }
