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
from tqdm import tqdm

from nvmm.checkpoint.contents import Contents
from nvmm.checkpoint.digests import digest, place, write_digests
from nvmm.convert.sources import Source, at_row

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
    contents: its tensors with their digests; None where it has none.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Metadata,
        names: list[str] | None = None,
        contents: Contents | None = None,
    ) -> None:
        self.contents = contents or Contents(folder, metadata)
        self.entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and (names is None or name in names)
        }
        self.spec = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self.entries.items()
        }
        self.contents.check_sizes(self.spec)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor, put together from the pieces it is stored in.

        Raises DamagedError for a piece that is not what was saved, before it is yielded.
        """
        if self.contents.sums is not None:
            self.contents.check(name)
        spec = self.spec[name]
        chunks = self.contents.chunks(name)
        if all(chunk.sizes[1:] == spec.shape[1:] for chunk in chunks):
            for chunk in chunks:
                yield self.contents.read(name, chunk.offsets)
            return
        out = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in chunks:
            region = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            out[region] = self.contents.read(name, chunk.offsets)
        yield out


def write_distributed(
    folder: Path, source: Source, *, workers: int = 1, bar: tqdm | None = None
) -> dict[str, dict[str, Any]]:
    """Write a source's tensors into an existing folder, one file a worker.

    Returns name -> dtype, shape, digest and pieces (place -> digest) of each tensor.
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
    tensors = {name: entry for writer in writers for name, entry in writer.tensors.items()}
    common = io.BytesIO()
    torch.save({}, common)
    for name, content in (
        ("common.pt", common.getvalue()),
        ("metadata.json", json.dumps(_FORMAT).encode()),
        (".metadata", pickle.dumps(metadata)),
    ):
        (folder / name).write_bytes(content)
    write_digests(folder, tensors)
    return tensors


@contextmanager
def _without_crc() -> Iterator[None]:
    """Turn off torch.save's CRC-32, which takes longer than writing; digests.json has digests."""
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
        self.tensors: dict[str, dict[str, Any]] = {}

    def run(self, names: list[str]) -> None:
        """Write the tensors one after the other, in the blocks they come in."""
        with self.path.open("wb") as stream:
            for name in names:
                if self.stop.is_set():
                    return
                self._write(stream, name)

    def _write(self, stream: io.BufferedWriter, name: str) -> None:
        spec = self.source.spec[name]
        chunks, row = [], 0
        pieces: dict[str, int] = {}
        for block in self.source.blocks(name):
            if block.dtype != spec.dtype:
                raise ValueError(f"{name}: a block of {block.dtype} in a tensor of {spec.dtype}")
            # torch.save writes a tensor's whole storage: a view of a larger one is copied.
            if not block.is_contiguous() or block.untyped_storage().nbytes() != block.nbytes:
                block = block.clone(memory_format=torch.contiguous_format)
            offsets = at_row(row, block)
            begin = stream.tell()
            torch.save(block, stream)
            info = _StorageInfo(self.path.name, begin, stream.tell() - begin)
            self.storage[MetadataIndex(name, offsets)] = info
            chunks.append(ChunkStorageMetadata(offsets, block.shape))
            pieces[place(offsets)] = digest(block, offsets)
            row += block.shape[0] if block.dim() else 1
            if self.bar is not None:
                self.bar.update(block.nbytes)
        if sum(chunk.sizes.numel() for chunk in chunks) != spec.numel():
            raise ValueError(f"{name}: its blocks do not make up {list(spec.shape)}")
        self.entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype), spec.shape, chunks
        )
        self.tensors[name] = {
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
            "digest": sum(pieces.values()) % 2**64,
            "pieces": pieces,
        }
