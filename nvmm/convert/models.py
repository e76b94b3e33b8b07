"""The models that conversions read and write: Hugging Face folders and checkpoints of ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nvmm.checkpoint.contents import Contents, read_table
from nvmm.checkpoint.digests import digest
from nvmm.checkpoint.files import find, read_state
from nvmm.checkpoint.index import read_metadata, weight_names
from nvmm.checkpoint.record import read_record, write_record
from nvmm.convert import embedders, sentence_encoders
from nvmm.convert.clap_files import SUFFIXES, ClapFile
from nvmm.convert.distributed import DistributedSource, write_distributed
from nvmm.convert.files import is_local
from nvmm.convert.formats import clap, clip, megatron, projector
from nvmm.convert.formats.all import FORMATS, detect, place_of, read_config, weight_folders
from nvmm.convert.formats.decoder import EMBEDDING, HEAD
from nvmm.convert.pickles import load
from nvmm.convert.safetensors import SafetensorsSource
from nvmm.convert.sources import (
    Cast,
    Merged,
    Renamed,
    Source,
    SubModel,
    at_row,
    compare_shapes,
    read,
    refuse,
)
from nvmm.convert.table import ToOurs
from nvmm.io.progress import progress

log = logging.getLogger("nvmm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("language", "vision")
AUDIO = "audio"
SOURCES = (*PARTS, "connector", AUDIO)
"""The parts of a composed model that a folder of their own may give; their parameters' names begin
with theirs."""
TOWERS = ("query", "context")
TWO_TOWERS = "nvmm.models.two_towers.TwoTowers"


def files_beside(format_name: str) -> ModuleType:
    """Return the module of the files beside an embedder: its `read`, `saved`, `check`, `write`."""
    return sentence_encoders if format_name == "bert" else embedders


def part_of(model: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """Return the config of one part of a model; both towers of a model of two have one config.

    Raises ValueError, beginning with `where`, for a part that the model has not.
    """
    if model.get("_target_") == TWO_TOWERS:
        parts = dict.fromkeys(TOWERS, model["language"])
    else:
        parts = {key: value for key, value in model.items() if key not in TOWERS}
        others = model.get("encoders") or {}
        parts |= {modality: other.get("encoder") for modality, other in others.items()}
    part = parts.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} has no {name}")
    return part


@dataclass(frozen=True)
class HubFolder:
    """A foreign model: its format, its config with fields that the shapes tell, and its tensors."""

    path: Path
    format: str
    config: dict[str, Any]
    source: Source

    def published(self) -> dict[str, Any]:
        """Return config.json as it is written; for Megatron-LM its arguments, for a file of CLAP
        what its shapes say."""
        if (self.path / "config.json").is_file():
            return read_config(self.path)
        return {key: value for key, value in self.config.items() if key not in clap.COMPLETED}

    def model(self) -> dict[str, Any]:
        """Return our model config for it."""
        try:
            return FORMATS[self.format].to_model(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer's files."""
        return place_of(self.path, self.format, "TOKENIZER")

    def unsaid(self) -> tuple[str, ...]:
        """Return the keys of our config that a folder of its format may leave open, and does."""
        of_format = getattr(FORMATS[self.format], "unsaid", None)
        return () if of_format is None else tuple(of_format(self.config))

    def saved(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint of `model`, whose texts its files describe, says beside it."""
        given: dict[str, Any] = files_beside(self.format).saved(
            self.path, self.format, self.config, model
        )
        return given

    def connector(self) -> HubFolder:
        """Return the projector of a whole model's folder as a folder of its own.

        Raises ValueError for a format whose projector is not read alone.
        """
        fields = getattr(FORMATS[self.format], "projector_config", None)
        if fields is None:
            raise ValueError(
                f"--from connector={self.path}: a {self.format} folder gives no projector; name one"
                " of LLaVA-NeXT or MM-Embed"
            )
        source = SubModel(self.source, projector.PREFIX)
        return replace(self, format="projector", config=fields(self.config), source=source)

    def before_last_layer(self) -> HubFolder:
        """Return a CLIP folder as LLaVA reads it: without its last layer."""
        return replace(self, config={**self.config, clip.FEATURE_LAYER: -2})

    def to_ours(self, model: Mapping[str, Any]) -> ToOurs:
        """Return its tensors under our names."""
        try:
            converted = ToOurs(self.source, FORMATS[self.format].table(model, self.config))
            converted.check_tied()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return converted


def open_folder(path: Path) -> HubFolder:
    """Read a folder's config.json and headers, Megatron-LM's, or a file of CLAP's makers.

    No tensor is loaded.
    """
    if path.is_file() and path.name.endswith(SUFFIXES):
        file = ClapFile(path)
        return HubFolder(path, "clap", clap.complete(file.config, file.spec), file)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder, nor a file of CLAP ({', '.join(SUFFIXES)})")
    if (located := megatron.locate(path)) is not None:
        return _open_megatron(*located)
    config = read_config(path)
    format_name = detect(config, path)
    if config.get("quantization_config"):
        raise ValueError(
            f"{path}/config.json: quantization_config is not supported; name a folder of weights"
            " in bf16, fp16 or fp32"
        )
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is a model with an adapter that Transformers loads over it; move"
            " adapter_config.json away to read the model alone, and take the adapter with `adapter"
            " import`"
        )
    source = tensors(path, format_name)
    for name, field in weight_folders(format_name).items():
        config[field] = read_config(path / name)
    try:
        config = FORMATS[format_name].complete(config, source.spec)
        config = untied(config, source)
        config |= files_beside(format_name).read(path, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return HubFolder(path, format_name, config, source)


def tensors(path: Path, format_name: str) -> Source:
    """Return a folder's tensors; those of a part's own folder have names that begin with it."""
    parts = weight_folders(format_name)
    if not parts:
        return SafetensorsSource(path)
    return Merged([Renamed(SafetensorsSource(path / name), f"{name}.") for name in parts])


def untied(config: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return a config without the tie that its folder contradicts, as Transformers reads it.

    Transformers ties two tensors only where the folder has one of them, or both alike.
    """
    embedding, head = config.get(EMBEDDING), config.get(HEAD)
    if not config.get("tie_word_embeddings") or embedding is None or head is None:
        return config
    if embedding == head or not {embedding, head} <= source.spec.keys():
        return config
    if torch.equal(read(source, embedding), read(source, head)):
        return config
    log.warning(
        "%s differs from %s, to which tie_word_embeddings says it is tied: both are read, as"
        " Transformers does",
        head,
        embedding,
    )
    return {**config, "tie_word_embeddings": False}


def _open_megatron(path: Path, format_name: str) -> HubFolder:
    if format_name == megatron.LEGACY:
        legacy = megatron.LegacySource(path)
        return HubFolder(path, format_name, legacy.args, legacy)
    args = megatron.arguments(load(path / "common.pt"), path / "common.pt")
    index = megatron.unstacked(read_metadata(path, foreign=True), args["num_layers"])
    return HubFolder(path, format_name, args, DistributedSource(path, index))


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint of ours: its folder, saved state and weights."""

    path: Path
    state: dict[str, Any]
    source: Source

    @property
    def model(self) -> dict[str, Any]:
        """The config of its model. Raises ValueError when the checkpoint has none."""
        config = (self.state.get("config") or {}).get("model")
        if not isinstance(config, dict):
            raise ValueError(f"{self.path} has no model config in its state.json")
        return config

    @property
    def has_adapters(self) -> bool:
        """True for a LoRA run's checkpoint, whose adapters are not in the weights yet."""
        return any(name.endswith(".lora_a") for name in self.source.spec)

    def part(self, name: str) -> SavedModel:
        """Return one part of a model that has parts, as if it were a model of its own."""
        config = {**self.state["config"], "model": part_of(self.model, name, str(self.path))}
        source = SubModel(self.source, f"{name}.")
        return SavedModel(self.path, {**self.state, "config": config}, source)

    def record(self) -> dict[str, Any]:
        """Return its step, the layout it was saved at, its optimizer's record and model config."""
        saved = read_record(self.path)
        return {
            "step": saved["step"],
            "layout": saved["layout"],
            "optimizer": saved["optimizer"],
            "config": self.model,
        }


def open_checkpoint(name: Path) -> SavedModel:
    """Read and check a checkpoint's small files; no tensor is loaded, and those of the optimizer
    are left out. Tensors are compared with their digests as they are read.

    Raises ValueError when the checkpoint is damaged or incomplete.
    """
    path = find(name) if is_local(name) else name
    if not (path / "state.json").is_file():
        raise ValueError(f"{name} is no complete checkpoint: it has no state.json")
    contents = Contents.open(path)
    metadata = contents.metadata
    source = DistributedSource(path, metadata, weight_names(metadata), contents)
    return SavedModel(path, read_state(path), source)


def write_weights(folder: Path, source: Source, label: str, workers: int) -> None:
    """Write a source as the weights of a checkpoint, with a progress line, and read them back."""
    size = sum(tensor.nbytes for tensor in source.spec.values())
    with progress(size, label, unit="B") as bar:
        write_distributed(folder, source, workers=workers, bar=bar)
    if isinstance(source, Cast) and source.underflow:
        log.warning("%s: %s", label, source.underflow)
    digests = {name: entry["digest"] for name, entry in read_table(folder, "digests.json").items()}
    check_written(DistributedSource(folder, read_metadata(folder)), source, digests)


def check_written(written: Source, source: Source, digests: Mapping[str, int]) -> None:
    """Compare tensors that were written with their source's names, shapes, dtypes and digests.

    Raises ValueError naming those that differ: nothing that this finds is published.
    """
    compare_shapes(written.spec, source.spec, "what was written", "its source")
    wrong = [
        f"{name} does not read back as it was written"
        for name, spec in written.spec.items()
        if spec.dtype != source.spec[name].dtype or _digest(written, name) != digests[name]
    ]
    refuse(wrong)


def _digest(source: Source, name: str) -> int:
    total, row = 0, 0
    for block in source.blocks(name):
        total += digest(block, at_row(row, block))
        row += block.shape[0] if block.dim() else 1
    return total % 2**64


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json, which makes weights a checkpoint: `read_state` gives `state` back."""
    layout = dict.fromkeys(("world_size", "tensor", "pipeline", "virtual_pipeline", "context"), 1)
    # No optimizer: this is what Checkpoint.load refuses to resume from.
    record = {"step": 0, "layout": layout, "optimizer": None, "state": state, "number": 1}
    write_record(folder, record)
