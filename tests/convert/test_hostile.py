"""Input that is damaged, lies or would run code; conversions that are cut short."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvmm.checkpoint.files import find, require_resumable
from nvmm.checkpoint.index import read_metadata
from nvmm.checkpoint.load import load
from nvmm.convert import importing, models
from nvmm.convert.distributed import DistributedSource, write_distributed
from nvmm.convert.files import publish
from nvmm.convert.safetensors import INDEX, SafetensorsSource, write_safetensors
from nvmm.convert.sources import read
from tests.convert import families


def folder(path: Path, **tensors: Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"w": torch.arange(6.0).view(2, 3)}, path / "model.safetensors")
    return path


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.mkdir(parents=True, exist_ok=True)
    file = path / "model.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def entry(shape: Any, *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "damaged header"),
        (b"[1]", b"", "not an object"),
        ({"w": entry([10**12], 0, 4 * 10**12)}, b"", "truncated"),
        ({"w": entry([10**12], 0, 8)}, bytes(8), r"takes 4000000000000 bytes, not 8"),
        ({"w": entry([2**62, 2**62], 0, 8)}, bytes(8), "bytes, not 8"),
        ({"w": entry([-1], 0, 4)}, bytes(4), "damaged header"),
        ({"w": entry([1.0], 0, 4)}, bytes(4), "damaged header"),
        ({"w": entry([1], 0, 4, dtype="F4")}, bytes(4), "damaged header"),
        ({"w": entry([1], 4, 8)}, bytes(8), "begins at 4"),
        ({"w": entry([1], 0, 4), "v": entry([1], 0, 4)}, bytes(4), "begins at 0, not at 4"),
        ({"w": entry([1], 0, 4)}, bytes(3), "truncated"),
        ({"w": entry([1], 0, 4)}, bytes(5), "has"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsSource(with_header(tmp_path, header, data))
    assert str(tmp_path) in str(error.value)


def test_every_flipped_bit_of_a_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Refused, or read as tensors of the same bytes under another name."""
    path = folder(tmp_path) / "model.safetensors"
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    for place in range(length):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        try:
            source = SafetensorsSource(tmp_path)
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:
            assert sum(spec.nbytes for spec in source.spec.values()) == 24


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="a header of 4611686018427387904 bytes in 10"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b"])
def test_an_index_that_points_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="outside its folder: refused"):
        SafetensorsSource(tmp_path)


def test_an_index_that_does_not_agree(tmp_path: Path) -> None:
    (folder(tmp_path) / "model.safetensors").rename(tmp_path / "shard.safetensors")
    for weight_map, message in (
        ({"w": "gone.safetensors"}, "which is not there"),
        ({"w": ["shard.safetensors"]}, "is no index"),
        ({}, None),
        ([], "is no index"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        if message is None:
            assert SafetensorsSource(tmp_path).spec == {}
            continue
        with pytest.raises(ValueError, match=message):
            SafetensorsSource(tmp_path)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/nvmm_convert_payload"),))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        SafetensorsSource(tmp_path)
    assert not Path("/tmp/nvmm_convert_payload").exists()


def test_a_checkpoints_pickle_is_not_run(tmp_path: Path) -> None:
    written(tmp_path / "good")
    (tmp_path / "good" / "state.json").write_text('{"state": {}}')
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="refused"):
        models.open_checkpoint(tmp_path / "good")
    assert not Path("/tmp/nvmm_convert_payload").exists()


def test_damaged_data_of_a_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    file = path / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: \d+ bytes do not hold w \[2, 3\]"):
        DistributedSource(path, read_metadata(path))
    file.write_bytes(bytes(size))
    source = DistributedSource(path, read_metadata(path))
    with pytest.raises(ValueError, match=r"__0_0\.distcp: w cannot be read"):
        read(source, "w")


def test_an_index_that_claims_too_much(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    metadata = read_metadata(path)
    entry = metadata.state_dict_metadata["w"]
    huge = torch.Size([10**12, 3])
    entry.size, entry.chunks[0].sizes = huge, huge
    with pytest.raises(ValueError, match=r"bytes do not hold w \[1000000000000, 3\]"):
        DistributedSource(path, metadata)
    metadata.storage_data.clear()
    with pytest.raises(ValueError, match="w is stored nowhere"):
        DistributedSource(path, metadata)


class Failing:
    """A source whose second tensor cannot be read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.spec = {name: torch.empty(4, device="meta") for name in ("a", "b")}

    def blocks(self, name: str) -> Iterator[Tensor]:
        if name == "b":
            raise self.error
        yield torch.ones(4)


def written(path: Path, **tensors: Tensor) -> Path:
    path.mkdir()
    source = SafetensorsSource(folder(path.with_name(f"{path.name}_source"), **tensors))
    write_distributed(path, source)
    return path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, workers: int, error: BaseException
) -> None:
    final = tmp_path / "ours"
    with pytest.raises(type(error)), publish(final) as temporary:
        write_distributed(temporary, Failing(error), workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_does_not_load(tmp_path: Path) -> None:
    """What a kill leaves is not found, and the next conversion removes it."""
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    shutil.move(written(tmp_path / "a"), run / ".tmp_ours")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find(tmp_path / "run")
    with pytest.raises(ValueError, match="neither a complete checkpoint"):
        find(run / ".tmp_ours")
    with publish(run / "ours") as temporary:
        assert list(temporary.iterdir()) == []
    with pytest.raises(ValueError, match="exists already"), publish(run / "ours"):
        pass


def test_blocks_dtypes_and_shards_come_back(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(5, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "whole": torch.arange(7),
    }
    path = written(tmp_path / "a", **tensors)
    source = DistributedSource(path, read_metadata(path))
    out = tmp_path / "out"
    out.mkdir()
    write_safetensors(out, source, max_shard_bytes=40)
    assert len(list(out.glob("model-*-of-*.safetensors"))) == 2
    found: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    for loaded in (found, {name: read(SafetensorsSource(out), name) for name in tensors}):
        for name, value in tensors.items():
            assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)


@pytest.mark.usefixtures("world")
def test_an_import_is_not_resumed_and_refuses_another_model(tmp_path: Path) -> None:
    families.language("qwen2", tmp_path / "theirs")
    folders = {"": models.open_folder(tmp_path / "theirs")}
    model = importing.derive(folders)
    given = model | {"rotary_base": 5, "transformer": model["transformer"] | {"num_layers": 3}}
    with pytest.raises(ValueError) as error:
        importing.check_given(folders, given)
    assert f"model.rotary_base=10000 in {tmp_path}/theirs, 5 in the given config" in str(
        error.value
    )
    assert "model.transformer.num_layers=2 in" in str(error.value)
    constructor = instantiate(given, _convert_="all")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.input_layernorm\.weight"):
        importing.import_folders(folders, given, constructor, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    constructor = instantiate(model, _convert_="all")
    importing.import_folders(folders, model, constructor, tmp_path / "ours", dtype=torch.bfloat16)
    saved = models.open_checkpoint(tmp_path / "ours")
    assert {spec.dtype for spec in saved.source.spec.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="start from it with init_from="):
        require_resumable(tmp_path / "ours")
    with pytest.raises(ValueError, match="holds weights alone"):
        load(tmp_path / "ours", [], None)
