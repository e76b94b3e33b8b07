"""Checkpoints of tensors and JSON through megatron.core.dist_checkpointing.

    <run>/checkpoints/step_00001000/
        state.json      written last: step, layout, the caller's state (data position, config ...)
        weights.json    global name -> dtype, shape and checksum of each weight that is saved
        .metadata, metadata.json, common.pt, *.distcp     torch's distributed format

Weights are stored under their global names, so any layout loads them; `optimizer.state.*` holds
master weights and running means, `rng` the generator states of each rank, `fp8.*` the scales and
amax histories of delayed scaling. There are no pickled objects, and loading unpickles none
(nvmm/metadata.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module

from nvmm.base import Base
from nvmm.metadata import read_metadata, weight_names
from nvmm.parallel import generators
from nvmm.parallel.weights import checksums, gather, global_shapes, pieces, sharded_weights

log = logging.getLogger("nvmm")
SHARDING_TYPES = ("fully_reshardable", "dp_reshardable")
_FILES = (".metadata", "metadata.json", "common.pt", "weights.json", "state.json")


class Checkpoint:
    """Saves and restores a run in one directory.

    A checkpoint is written under a name that starts with .tmp_ and renamed when all ranks are
    done; what a crash leaves is never loaded, and removed at the next save.

    Args:
        save_interval: steps between checkpoints (None: only at the end).
        keep_last: how many to keep, counted from the last one saved (None: all).
        optimizer: "fully_reshardable" loads at any layout; "dp_reshardable" is written without
            gathering the optimizer state over data parallel, and loads at another data parallel
            size only.
        async_save: write in a forked process while training goes on; `finalize` completes it.
        directory: <run>/checkpoints.
    """

    def __init__(
        self,
        save_interval: int | None = 1000,
        keep_last: int | None = 3,
        optimizer: str = "fully_reshardable",
        async_save: bool = False,
        *,
        directory: Path,
    ) -> None:
        if save_interval is not None and save_interval < 1:
            raise ValueError(f"checkpoint.save_interval={save_interval} must be positive or null")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be positive or null")
        if optimizer not in SHARDING_TYPES:
            allowed = " or ".join(SHARDING_TYPES)
            raise ValueError(f"checkpoint.optimizer={optimizer} must be {allowed}")
        self.save_interval = save_interval
        self.keep_last = keep_last
        self.sharding_type = optimizer
        self.async_save = async_save
        self.directory = Path(directory)
        self._pending: Any = None

    def save(
        self,
        step: int,
        models: Sequence[Module],
        optimizer: Any,
        state: dict[str, Any],
        left_out: Set[str] = frozenset(),
        scaling: Any = None,
    ) -> Path:
        """Write step_XXXXXXXX and return its path; collective.

        Args:
            step: optimizer steps done.
            models: this rank's unwrapped chunks, with overlapped parameter gathers completed.
            optimizer: an nvmm.optim.Optimizer.
            state: what JSON can hold; `load` and `read_state` give it back. Its `base`, if any,
                is the nvmm.base.Base that gives the weights left out.
            left_out: global names of weights that are not saved.
            scaling: an nvmm.modules.scaling.Scaling, the FP8 scales.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.finalize(blocking=True)
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f".tmp_{final.name}"
        if dist.get_rank() == 0:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
        dist.barrier()
        model_state = sharded_weights(models)
        saved_state = _without(model_state, left_out)
        record = {
            "step": step,
            "layout": _layout(),
            "optimizer": {"sharding_type": self.sharding_type, "steps": optimizer.num_steps},
            "state": json.loads(json.dumps(state)),  # a copy: an asynchronous save writes it later
        }
        files = {"weights.json": checksums(saved_state), "state.json": record}
        sharded = {
            "rng": _rng_tensor(generators.capture()),
            "optimizer": optimizer.sharded_state_dict(model_state, False, self.sharding_type),
            **saved_state,
        }
        scales = {} if scaling is None else scaling.sharded_state_dict()
        if scales:  # mcore would keep an empty entry
            sharded["scaling"] = scales
        request = dist_checkpointing.save(
            sharded, str(temporary), self._strategy(), async_sharded_save=True
        )
        assert request is not None
        request.add_finalize_fn(lambda: self._publish(temporary, final, files))
        if self.async_save:
            self._pending = self._pending or AsyncCallsQueue(persistent=False)
            self._pending.schedule_async_request(request)
        else:
            request.execute_sync()
        return final

    def finalize(self, blocking: bool = False) -> None:
        """Complete an asynchronous save when its writers are done; called by every rank at every
        step, and with `blocking` before the run ends. Does nothing without one.
        """
        if self._pending is not None:
            self._pending.maybe_finalize_async_calls(blocking=blocking)

    def latest(self) -> Path | None:
        """The complete checkpoint saved last (not the highest step: a run may have gone back);
        as rank 0 sees it, once there is a process group."""
        found: list[Path | None] = [None]
        if not dist.is_initialized() or dist.get_rank() == 0:
            found = [None, *self._complete()][-1:]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def load(
        self, path: Path, models: Sequence[Module], optimizer: Any, base: Path | None = None
    ) -> dict[str, Any]:
        """Restore weights, optimizer and generators; return the saved state; collective.

        base: where the base of a LoRA checkpoint lies, if it has moved. The layout may differ from
        the saved one; generators then start from a new seed, with a warning. Raises ValueError when
        the checkpoint is incomplete or unsafe, is not of this model, or its weights (its base's)
        do not have the checksums they were saved with.
        """
        path = Path(path)
        require_resumable(path)
        record = _read_record(path)
        metadata = read_metadata(path)
        model_state = sharded_weights(models)
        weights = global_shapes(model_state)
        missing, unexpected = _compare(path, metadata, weights)
        found = Base.saved(record["state"])
        left_out: set[str] = set()
        if found is not None:
            found = found.located(base)
            left_out = set(missing) & found.names()
        missing = [name for name in missing if name not in left_out]
        if missing or unexpected:
            raise ValueError(
                f"{path} is not of this model: missing in it {missing or 'nothing'}, only in it"
                f" {unexpected or 'nothing'}"
            )
        sharding_type = record["optimizer"]["sharding_type"]
        same_layout = record["layout"] == _layout()
        same_but_dp = record["layout"] | {"world_size": 0} == _layout() | {"world_size": 0}
        if sharding_type == "dp_reshardable" and not same_but_dp:
            raise ValueError(
                f"{path} was saved with checkpoint.optimizer=dp_reshardable at {record['layout']}"
                f" and loads at another data parallel size only, not at {_layout()}"
            )
        optimizer_state = optimizer.sharded_state_dict(model_state, True, sharding_type)
        _refuse_missing_optimizer_state(path, metadata, optimizer_state)
        if found is not None:
            load_weights(Path(found.path), models)
        sharded = {"optimizer": optimizer_state, **_without(model_state, left_out)}
        if same_layout:
            sharded["rng"] = _rng_tensor(None, metadata.state_dict_metadata["rng"].size[1])
        loaded = _load_sharded(sharded, path)
        _load_models(models, loaded)
        # A stage with nothing trainable has no optimizer state; mcore drops empty branches.
        optimizer_state = loaded.get("optimizer", {})
        optimizer.load_state_dict(optimizer_state, sharding_type, record["optimizer"]["steps"])
        _check_weights(path, models, set(weights) - left_out)
        if same_layout:
            generators.restore(loaded["rng"].flatten())
        else:
            self._reseed(path, record)
        return record["state"]

    def _reseed(self, path: Path, record: dict[str, Any]) -> None:
        content = json.dumps([record["step"], json.loads((path / "weights.json").read_text())])
        digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
        generators.reseed(int.from_bytes(digest, "big") % 2**30)
        if dist.get_rank() == 0:
            log.warning(
                f"{path} was saved at {record['layout']}, this run is at {_layout()}: random"
                " generators start from a new seed (other dropout masks)"
            )

    def _strategy(self) -> Any:
        """torch's distributed format, the writing shared out over data-parallel replicas."""
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        if not hasattr(filesystem_async, "_results_queue"):
            raise AttributeError("filesystem_async._results_queue is gone from megatron-core")
        filesystem_async._results_queue = _Results()
        return FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def _publish(self, temporary: Path, final: Path, files: dict[str, Any]) -> None:
        """Give a written checkpoint its name, then delete the oldest; the work of rank 0."""
        if dist.get_rank() == 0:
            earlier = self._complete()
            number = _read_record(earlier[-1])["number"] + 1 if earlier else 1
            files["state.json"]["number"] = number
            for name, content in files.items():
                with (temporary / name).open("w") as stream:
                    json.dump(content, stream, indent=1)
                    stream.flush()
                    os.fsync(stream.fileno())
            if final.exists():
                self._remove(final)
            temporary.rename(final)
            _sync_directory(self.directory)
            if self.keep_last is not None:
                for path in self._complete()[: -self.keep_last]:
                    self._remove(path)
        dist.barrier()

    def _complete(self) -> list[Path]:
        """Complete checkpoints in the order they were saved in."""
        paths = [p for p in self.directory.glob("step_*") if all((p / f).exists() for f in _FILES)]
        return sorted(paths, key=lambda path: _read_record(path)["number"])

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint so that no moment leaves half of it under its name."""
        doomed = path.with_name(f".tmp_removed_{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(".tmp_*"):
            shutil.rmtree(path)


def find(name: str | Path) -> Path:
    """The checkpoint `name`, or the newest one of run directory `name`; collective.

    Raises ValueError when there is none.
    """
    path = Path(name).expanduser()
    folder = path / "checkpoints"
    if not folder.is_dir():
        if (path / "state.json").is_file():
            return path
        raise ValueError(f"{name} is neither a complete checkpoint nor a run directory with one")
    latest = Checkpoint(directory=folder).latest()
    if latest is None:
        raise ValueError(f"{name} has no complete checkpoint in {folder}")
    return latest


def read_state(path: Path) -> dict[str, Any]:
    """The state a checkpoint was saved with: JSON, nothing else of it is read."""
    return _read_record(Path(path))["state"]


def require_resumable(path: Path) -> None:
    """Raise ValueError when a checkpoint has weights alone, as an import has."""
    if _read_record(Path(path)).get("optimizer") is None:
        raise ValueError(
            f"{path} holds weights alone, no state to resume; start from it with init_from={path}"
        )


def load_weights(path: Path, models: Sequence[Module], base: Path | None = None) -> list[str]:
    """Load the weights a checkpoint has in common with the model, into unwrapped chunks.

    Of a LoRA checkpoint, those of its base first; `base` is where that lies if it has moved.
    Collective. Call `Optimizer.reload_parameters` afterwards if there is an optimizer. Returns
    the model's global names that are missing in the checkpoint; what only the checkpoint has is
    logged. Raises ValueError naming both shapes when they differ, when nothing is in common, and
    when it has adapters that the model has not.
    """
    path = Path(path)
    found = Base.saved(read_state(path))
    lacking = None
    if found is not None:
        lacking = set(load_weights(Path(found.located(base).path), models))
    model_state = sharded_weights(models)
    weights = global_shapes(model_state)
    missing, unexpected = _compare(path, read_metadata(path), weights)
    if any(name.endswith(".lora_a") for name in unexpected):
        raise ValueError(
            f"{path} has LoRA adapters where this model has none: give the lora= it was trained"
            " with, or put them into the weights with tools/convert.py merge"
        )
    if len(missing) == len(weights):
        raise ValueError(f"{path} has no weight of this model; it has {unexpected[:3]} ...")
    if unexpected and dist.get_rank() == 0:
        log.warning("%s has weights this model does not have: %s", path, ", ".join(unexpected))
    absent = set(missing)
    _load_models(models, _load_sharded(_without(model_state, absent), path))
    _check_weights(path, models, set(weights) - absent)
    return missing if lacking is None else sorted(absent & lacking)


def load_scales(path: Path, scaling: Any) -> list[str]:
    """Load the FP8 scales that a checkpoint has in common with an nvmm.modules.scaling.Scaling.

    Collective. Returns the names of those it has not, which are left as they are. Raises ValueError
    where a history has another length.
    """
    path = Path(path)
    wanted = scaling.sharded_state_dict()
    saved = {n: list(entry.size) for n, entry in read_metadata(path).state_dict_metadata.items()}
    shapes = {name: shape for rank in gather(_shapes(wanted)) for name, shape in rank.items()}
    for name in shapes.keys() & saved.keys():
        if shapes[name] != saved[name]:
            raise ValueError(
                f"{path}: precision.fp8.amax_history_len={shapes[name][0] - 1} must be"
                f" {saved[name][0] - 1}, as it was saved"
            )
    missing = sorted(shapes.keys() - saved.keys())
    if len(missing) < len(shapes):
        present = {name: entry for name, entry in wanted.items() if name in saved}
        scaling.load(_load_sharded({"scaling": present}, path).get("scaling", {}))
    return missing


def _shapes(sharded: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(entry.global_shape) for name, entry in sharded.items()}


def _without(weights: dict[str, dict[str, Any]], names: Set[str]) -> dict[str, dict[str, Any]]:
    return {
        chunk: {key: entry for key, entry in state.items() if entry.key not in names}
        for chunk, state in weights.items()
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a complete checkpoint: it has no state.json") from error


def _layout() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def _compare(
    path: Path, metadata: Any, weights: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """(names only in the model, names only in the checkpoint); shapes must agree."""
    saved = {name: list(metadata.state_dict_metadata[name].size) for name in weight_names(metadata)}
    wrong = [
        f"{name} is {saved[name]} in the checkpoint, {shape} in the model"
        for name, shape in weights.items()
        if name in saved and saved[name] != shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model: " + "; ".join(wrong))
    return sorted(weights.keys() - saved.keys()), sorted(saved.keys() - weights.keys())


def _refuse_missing_optimizer_state(path: Path, metadata: Any, state: dict[str, Any]) -> None:
    wanted = {piece.key: None for piece in pieces(state)}
    missing = sorted(
        {key for rank in gather(wanted) for key in rank} - metadata.state_dict_metadata.keys()
    )
    if missing:
        raise ValueError(
            f"{path} has no optimizer state for what is trained here and was not there (is"
            f" optim.freeze another? start with init_from={path} instead of resuming): {missing}"
        )


def _load_sharded(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import CheckpointingException

    try:
        return dist_checkpointing.load(sharded, str(path))
    except CheckpointingException as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _load_models(models: Sequence[Module], loaded: dict[str, Any]) -> None:
    for index, model in enumerate(models):
        # Not strict: mcore's modules expect _extra_state entries, which hold nothing.
        result = model.load_state_dict(loaded.get(f"model{index}", {}), strict=False)
        assert not result.unexpected_keys, result.unexpected_keys


def _check_weights(path: Path, models: Sequence[Module], names: set[str]) -> None:
    """Compare the loaded weights' bits with those saved, unless the number format changed."""
    file = path / "weights.json"
    if not file.exists():
        return
    saved = json.loads(file.read_text())
    now = checksums(sharded_weights(models))
    wrong = [
        name
        for name in sorted(names & saved.keys())
        if now[name]["dtype"] == saved[name]["dtype"] and now[name] != saved[name]
    ]
    if wrong:
        raise ValueError(f"{path}: weights differ from those saved (damaged files?): {wrong}")


def _rng_tensor(data: torch.Tensor | None, length: int = 0) -> Any:
    """This rank's row of the tensor [world size, longest state], padded with spaces."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if data is not None:
        length = max(shard["length"] for shard in gather({"length": data.numel()}))
    row = torch.full((1, length), ord(" "), dtype=torch.uint8)
    if data is not None:
        row[0, : data.numel()] = data
    return ShardedTensor.from_rank_offsets("rng", row, (0, dist.get_rank(), dist.get_world_size()))


class _Results:
    """What a forked writer hands back: a nameless file that both processes hold.

    Stands for mcore's queue, which is a manager process per rank, spawned at the first save and
    left behind by a rank that is killed.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object

    def put(self, value: Any) -> None:
        pickle.dump(value, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        self.file.seek(0)
        data = self.file.read()
        if not data:
            raise queue.Empty
        return pickle.loads(data)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
