"""Read a checkpoint's index without running anything that is in it.

torch's distributed checkpoints keep their index, `.metadata`, as a plain pickle: whoever wrote the
directory decides what runs when torch opens it. Before megatron-core or torch see a directory,
`read_metadata` reads it with an unpickler that builds nothing but the index's own classes.
"""

from __future__ import annotations

import enum
import json
import os
import pickle
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

from nvmm.checkpoint.digests import is_weight

_DCP = "torch.distributed.checkpoint."
_INDEX_CLASSES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (_DCP + "filesystem", "_StorageInfo"),
        (_DCP + "metadata", "BytesStorageMetadata"),
        (_DCP + "metadata", "ChunkStorageMetadata"),
        (_DCP + "metadata", "Metadata"),
        (_DCP + "metadata", "MetadataIndex"),
        (_DCP + "metadata", "StorageMeta"),
        (_DCP + "metadata", "TensorProperties"),
        (_DCP + "metadata", "TensorStorageMetadata"),
        (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
        (_DCP + "planner", "SavePlan"),
        (_DCP + "planner", "TensorWriteData"),
        (_DCP + "planner", "WriteItem"),
        (_DCP + "planner", "WriteItemType"),
        *(
            ("torch", name)
            for name in (
                *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
                *("int64", "int32", "int16", "int8", "uint8", "bool"),
            )
        ),
    }
)
"""All classes that the `.metadata` of a checkpoint of tensors names."""
_COMMON_CLASSES = frozenset({("collections", "OrderedDict")})
"""All classes that the `common.pt` of a checkpoint of tensors names."""


class _RefusedError(ValueError):
    """What a checkpoint of tensors does not need."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], path: Path, allowed: Set[tuple[str, str]]) -> None:
        super().__init__(stream)
        self.path = path
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            # Some Pythons (3.11.2, say) pickle an enum's member so: it gets that, nothing else.
            return self._enum_member
        if (module, name) not in self.allowed:
            raise _RefusedError(
                f"{self.path} names {module}.{name}, which no checkpoint of tensors needs:"
                " refused, nothing of it was run"
            )
        return super().find_class(module, name)

    def _enum_member(self, owner: Any, name: Any) -> Any:
        if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
            return owner[name]
        raise _RefusedError(f"{self.path} asks for {name!r} of {owner!r}: refused, nothing was run")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"{self.path} refers to an external object {pid!r}: refused")


def weight_names(metadata: Any) -> list[str]:
    """List the names of a checkpoint's weights, without optimizer, generators and FP8 scales."""
    return [name for name in metadata.state_dict_metadata if is_weight(name)]


def read_metadata(directory: Path, *, foreign: bool = False) -> Any:
    """Screen a checkpoint directory; return torch's Metadata of it.

    foreign: of a training program that stores pickled bytes beside the tensors, in entries and in
    common.pt. They are neither refused nor read; torch must not load such a directory whole.

    Raises ValueError naming the file and what is wrong in it: a class outside the allow-list in
    `.metadata` or `common.pt`, an entry of pickled bytes, a data file outside the directory, or a
    format other than megatron-core's torch_dist.
    """
    # 1. The format, and the file that mcore unpickles beside the index.
    _check_format(directory / "metadata.json")
    if not foreign:
        _screen_common(directory / "common.pt")
    # 2. The index, by an unpickler that knows its classes alone.
    path = directory / ".metadata"
    metadata = _load(path, _INDEX_CLASSES)
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if type(metadata) is not Metadata:
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not torch's Metadata")
    # 3. Its entries: tensors only, in files of this directory.
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata and not foreign:
            raise ValueError(
                f"{path}: entry {name} is a {type(entry).__name__}, not a tensor; torch would"
                " unpickle its bytes: refused"
            )
    for index, info in (metadata.storage_data or {}).items():
        _check_storage(path, index, info)
    return metadata


def _load(path: Path, allowed: Set[tuple[str, str]]) -> Any:
    try:
        with path.open("rb") as stream:
            return _Unpickler(stream, path, allowed).load()
    except _RefusedError:
        raise
    except Exception as error:  # whatever damaged bytes make of the unpickler
        raise ValueError(f"{path} is not a readable index: {error!r}") from error


def _check_format(path: Path) -> None:
    try:
        backends = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is not a complete checkpoint: {error}") from error
    expected = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    for key, value in expected.items():
        if not isinstance(backends, dict) or backends.get(key) != value:
            raise ValueError(f"{path}: {key} must be {value}, got {backends}")


def _screen_common(path: Path) -> None:
    """Refuse a common.pt, a zip of torch.save, that has more than plain values in it."""
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            if [name.rpartition("/")[2] for name in pickles] != ["data.pkl"]:
                raise _RefusedError(f"{path} must hold one data.pkl, has {pickles}: refused")
            with archive.open(pickles[0]) as content:
                _Unpickler(content, path, _COMMON_CLASSES).load()
    except _RefusedError:
        raise
    except Exception as error:  # whatever damaged bytes make of zipfile and the unpickler
        raise ValueError(f"{path} is not a readable torch archive: {error!r}") from error


def _check_storage(path: Path, index: Any, info: Any) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    if type(info) is not _StorageInfo:
        raise ValueError(f"{path}: {index} is stored as {type(info).__name__}: refused")
    name = info.relative_path
    if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name:
        raise ValueError(f"{path}: {index} lies in {name!r}, outside its directory: refused")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{path}: {index} is stored through {info.transform_descriptors}: refused")
