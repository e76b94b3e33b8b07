"""The tensors of a checkpoint, read piece by piece, each compared with its digest.

Every reader reads here: mcore's loading (`Contents.reading`), conversion and `inspect --verify`. A
piece is checked as it is stored, before it is cut to a layout or cast to a dtype.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nvmm.checkpoint.digests import digest, is_weight, place, sum_of_bits
from nvmm.checkpoint.index import read_metadata
from nvmm.checkpoint.record import DamagedError, check_files, read_record


class Contents:
    """The index of a checkpoint and the digests of its tensors.

    Args:
        path: its directory.
        metadata: torch's Metadata of it, screened.
        digests: name -> digest and pieces (place -> digest); None where there are none.
        sums: name -> checksum of the weights of a checkpoint of before there were digests.
    """

    def __init__(
        self,
        path: Path,
        metadata: Any,
        digests: Mapping[str, Mapping[str, Any]] | None = None,
        sums: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.digests = digests
        self.sums = sums
        self._sizes: dict[str, int] = {}

    @classmethod
    def open(cls, path: Path) -> Contents:
        """Read and check the small files of a checkpoint of ours, and the sizes of the others.

        Raises DamagedError, and ValueError for what `read_metadata` refuses.
        """
        try:
            record = read_record(path)
            check_files(path, record)
        except DamagedError as damage:
            try:
                read_metadata(path)
            except Exception as error:  # it says more of an index that somebody has changed
                raise DamagedError(path, f"{damage.args[1]} ({error})") from error
            raise
        digests, sums = None, None
        if "format" in record:
            digests = read_table(path, "digests.json")
        else:
            sums = read_table(path, "weights.json")
        contents = cls(path, read_metadata(path), digests, sums)
        contents.check_sizes(contents.metadata.state_dict_metadata)
        return contents

    def check_sizes(self, names: Iterable[str]) -> None:
        """Compare the index with the files' sizes before anything is allocated by its claims."""
        for name in names:
            entry = self.metadata.state_dict_metadata[name]
            covered = 0
            for chunk in entry.chunks:
                info = self._stored(name, chunk.offsets)
                size = self._size(info.relative_path)
                numel = chunk.sizes.numel()
                if (
                    info.offset + info.length > size
                    or info.length < numel * entry.properties.dtype.itemsize
                ):
                    file = self.path / info.relative_path
                    what = f"{file}: {size} bytes do not hold {name} {list(chunk.sizes)}"
                    raise DamagedError(self.path, what)
                covered += numel
            if covered != entry.size.numel():
                raise DamagedError(self.path, f"the pieces of {name} do not make it up")

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            path = self.path / file
            self._sizes[file] = path.stat().st_size if path.is_file() else 0
        return self._sizes[file]

    def _stored(self, name: str, offsets: Any) -> Any:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        try:
            info = self.metadata.storage_data[MetadataIndex(name, offsets)]
        except (KeyError, TypeError) as error:
            raise DamagedError(self.path, f"{name} is stored nowhere") from error
        if info is None:
            raise DamagedError(self.path, f"{name} is stored nowhere")
        return info

    def chunks(self, name: str) -> list[Any]:
        """Return where the pieces of a tensor begin (`offsets`) and end, in order."""
        chunks = self.metadata.state_dict_metadata[name].chunks
        return sorted(chunks, key=lambda chunk: tuple(chunk.offsets))

    def read(self, name: str, offsets: Any, stream: IO[bytes] | None = None) -> Tensor:
        """Read the piece of a tensor that begins at `offsets`.

        stream: the piece's file, where that is open already.

        Raises DamagedError where it is not the one that was saved.
        """
        from torch.distributed.checkpoint.utils import _create_file_view

        entry = self.metadata.state_dict_metadata[name]
        [shape] = [chunk.sizes for chunk in entry.chunks if chunk.offsets == offsets]
        info = self._stored(name, offsets)
        file = self.path / info.relative_path
        try:
            opened: Any = file.open("rb") if stream is None else contextlib.nullcontext(stream)
            with opened as content:
                window: Any = _create_file_view(content, info.offset, info.length)
                tensor = torch.load(window, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever damaged bytes make of torch.load
            raise DamagedError(self.path, f"{file}: {name} cannot be read: {error}") from error
        # A layer of a stacked tensor is stored with a leading axis of 1.
        shapes = (shape, torch.Size([1, *shape]))
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape not in shapes
            or tensor.dtype != entry.properties.dtype
        ):
            what = f"{file}: {name} is not the tensor that the index describes"
            raise DamagedError(self.path, what)
        tensor = tensor.detach().reshape(shape)
        if self.digests is not None:
            known = self.digests.get(name, {}).get("pieces", {}).get(place(offsets))
            if known is None:
                raise DamagedError(self.path, f"{name} at {list(offsets)} has no digest")
            if digest(tensor, offsets) != known:
                raise DamagedError(
                    self.path,
                    f"{file}: the bits of {name} at {list(offsets)} are not those that were saved"
                    " (damaged files?)",
                )
        return tensor

    def check(self, name: str) -> None:
        """Read a tensor to compare it with its digest. Raises DamagedError."""
        total = 0
        for chunk in self.chunks(name):
            tensor = self.read(name, chunk.offsets)
            if self.sums is not None and is_weight(name):
                total += sum_of_bits(tensor)
        if self.sums is not None and is_weight(name):
            if name not in self.sums:
                raise DamagedError(self.path, f"{name} has no checksum in weights.json")
            if total % 2**64 != self.sums[name]["checksum"]:
                raise DamagedError(self.path, f"{name} is not what was saved (damaged files?)")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let mcore's loading read through this object, meanwhile."""
        from megatron.core.dist_checkpointing.strategies import torch as strategy
        from torch.distributed._shard._utils import narrow_tensor_by_index
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
        from torch.futures import Future

        contents = self

        def read_file(stream: IO[bytes], items: Iterable[Any], planner: LoadPlanner) -> None:
            last, tensor = None, torch.empty(0)
            for item in items:
                index = item.storage_index
                if last != index:  # one piece may go to several places
                    last, tensor = index, contents.read(index.fqn, index.offset, stream)
                part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)

        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return contents.metadata

            def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
                def where(item: Any) -> tuple[str, int]:
                    info = contents.metadata.storage_data[item.storage_index]
                    return info.relative_path, info.offset

                files = itertools.groupby(sorted(plan.items, key=where), lambda x: where(x)[0])
                for file, items in files:
                    try:
                        stream = (contents.path / file).open("rb")
                    except OSError as error:
                        raise DamagedError(contents.path, f"{file}: {error}") from error
                    with stream:
                        read_file(stream, items, planner)
                done: Future[None] = Future()
                done.set_result(None)
                return done

        make, name = strategy._get_filesystem_reader, "_get_filesystem_reader"
        setattr(strategy, name, lambda path, cache_metadata=False: Reader(path))
        try:
            yield
        finally:
            setattr(strategy, name, make)


def read_table(path: Path, name: str) -> dict[str, Any]:
    """Return what a file holds: name -> values of a tensor."""
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(x, dict) for x in content.values()):
        raise DamagedError(path, f"{name} does not describe tensors")
    return content
