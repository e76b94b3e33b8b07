"""Checkpoints of tensors and JSON through megatron.core.dist_checkpointing.

    <run>/checkpoints/step_00001000/
        state.json      written last: step, layout, the caller's state (data position, config ...),
                        and the SHA-256 of itself and of the other small files
        digests.json    global name -> digest of each tensor, and of each piece as it is stored
        weights.json    global name -> dtype, shape and checksum (digest) of each weight
        .metadata, metadata.json, common.pt, *.distcp     torch's distributed format

Weights are stored under their global names, so any layout loads them; `optimizer.state.*` holds
master weights and running means, `rng` the generator states of each rank, `fp8.*` the scales and
amax histories of delayed scaling. There are no pickled objects, and loading unpickles none
(nvmm/checkpoint/index.py).
"""

from __future__ import annotations

import contextlib
import json
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module

from nvmm.checkpoint.digests import place, write_digests
from nvmm.checkpoint.files import complete, latest
from nvmm.checkpoint.index import read_metadata
from nvmm.checkpoint.record import read_record, write_record
from nvmm.checkpoint.weights import current_layout, digests, rng_tensor, sharded_weights, without
from nvmm.config.choices import require
from nvmm.io.files import TEMPORARY, disk_error, is_full, sync
from nvmm.parallel import generators

ShardingType = Literal["fully_reshardable", "dp_reshardable"]


class Checkpoint:
    """The checkpoints of a run, in one directory.

    A checkpoint is written under a name that starts with .tmp_ and renamed when all ranks are
    done; what a crash leaves is never loaded, and removed at the next save.

    Args:
        save_interval: steps between checkpoints (None: only at the end).
        keep_last: how many to keep, counted from the last one saved (None: all). As many of those
            since whose predecessor no step was skipped stay too: a stretch of skipped steps pushes
            no good checkpoint out.
        optimizer: "fully_reshardable" loads at any layout; "dp_reshardable" is written without
            gathering the optimizer state over data parallel, and loads at another data parallel
            size only.
        async_save: write in a forked process while training goes on; `finalize` completes it.
        directory: <run>/checkpoints.

    saved: the checkpoint that this object wrote last, None before its first.
    """

    def __init__(
        self,
        save_interval: int | None = 1000,
        keep_last: int | None = 3,
        optimizer: ShardingType = "fully_reshardable",
        async_save: bool = False,
        *,
        directory: Path,
    ) -> None:
        if save_interval is not None and save_interval < 1:
            raise ValueError(f"checkpoint.save_interval={save_interval} must be positive or null")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be positive or null")
        require("checkpoint.optimizer", optimizer, ShardingType)
        self.save_interval = save_interval
        self.keep_last = keep_last
        self.sharding_type = optimizer
        self.async_save = async_save
        self.directory = Path(directory)
        self.saved: Path | None = None
        self._pending: Any = None
        self._writing: tuple[Path, int] | None = None

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
            optimizer: an nvmm.training.optimizer.Optimizer.
            state: values that JSON can hold; `load` and `read_state` give it back. Its `base`, if
                any, is the nvmm.checkpoint.base.BaseCheckpoint that gives the weights left out.
            left_out: global names of weights that are not saved.
            scaling: an nvmm.modules.fp8_scales.Scaling, the FP8 scales.

        Raises OSError on every rank, and leaves no folder, when a rank cannot write its part.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        # 1. An earlier save ends before this one begins; what a crash left is removed.
        self.finalize(blocking=True)
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f"{TEMPORARY}{final.name}"
        self._on_first_rank(lambda: self._make_folder(temporary))
        # 2. The JSON, and the tensors of this rank with their places in the whole ones.
        model_state = sharded_weights(models)
        saved_state = without(model_state, left_out)
        record = {
            "step": step,
            "layout": current_layout(),
            "optimizer": {"sharding_type": self.sharding_type, "steps": optimizer.num_steps},
            "state": json.loads(json.dumps(state)),  # a copy: an asynchronous save writes it later
        }
        sharded = {
            "rng": rng_tensor(generators.capture()),
            "optimizer": optimizer.sharded_state_dict(model_state, False, self.sharding_type),
            **saved_state,
        }
        scales = {} if scaling is None else scaling.sharded_state_dict()
        if scales:  # mcore would keep an empty entry
            sharded["scaling"] = scales
        # 3. The writing: by mcore, in a forked process where it is asynchronous. The last step
        # gives the checkpoint its name, once every rank is done.
        self._writing = temporary, _total_bytes(sharded)
        strategy = self._strategy()
        with self._explained():
            request = dist_checkpointing.save(
                sharded, str(temporary), strategy, async_sharded_save=True
            )
            assert request is not None
            tensors = strategy.digests
            request.add_finalize_fn(
                lambda: self._on_first_rank(
                    lambda: self._publish(temporary, final, record, tensors)
                )
            )
            if self.async_save:
                self._pending = self._pending or AsyncCallsQueue(persistent=False)
                self._pending.schedule_async_request(request)
            else:
                request.execute_sync()
        self.saved = final
        return final

    def finalize(self, blocking: bool = False) -> None:
        """Complete an asynchronous save when its writers are done; do nothing without one.

        Every rank calls this at every step, and with `blocking` before the run ends.
        """
        if self._pending is not None:
            with self._explained():
                self._pending.maybe_finalize_async_calls(blocking=blocking)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Remove what a save leaves that cannot be written, and say why."""
        try:
            yield
        except (CheckpointException, OSError) as error:
            if not (isinstance(error, CheckpointException) or is_full(error)):
                raise
            assert self._writing is not None
            self._pending = None
            temporary, needed = self._writing
            explained = disk_error(temporary, error, needed)
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise explained from error

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """Do something on rank 0; raise its OSError on every rank."""
        failure: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                failure = [(error.errno, error.strerror, error.filename)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise OSError(*failure[0])

    def _make_folder(self, temporary: Path) -> None:
        """Make the folder of a save, and remove what a crash left."""
        for path in self.directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)
        temporary.mkdir(parents=True)

    def latest(self) -> Path | None:
        """Return the checkpoint of this run saved last; see `nvmm.checkpoint.files.latest`."""
        return latest(self.directory)

    def _strategy(self) -> Any:
        """Return mcore's writer of torch's distributed format, shared out over replicas.

        It has the digests of what it was given to write, `digests`, when a save has begun.
        """
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        if not hasattr(filesystem_async, "_results_queue"):
            raise AttributeError("filesystem_async._results_queue is gone from megatron-core")
        filesystem_async._results_queue = _Results()

        class Strategy(FullyParallelSaveStrategyWrapper):
            digests: dict[str, dict[str, Any]]

            def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
                # Here the writers are chosen, and the training loop has not gone on.
                self.apply_saving_parallelization(sharded_state_dict)
                self.digests = digests(sharded_state_dict)
                return self.base_strategy.async_save(sharded_state_dict, checkpoint_dir)

        return Strategy(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def _publish(
        self, temporary: Path, final: Path, record: dict[str, Any], tensors: dict[str, Any]
    ) -> None:
        """Give a written checkpoint its name, then delete the oldest; for rank 0."""
        earlier = [read_record(path) for path in complete(self.directory)[-1:]]
        record |= {
            "number": earlier[0]["number"] + 1 if earlier else 1,
            "skipped": max(0, _skipped_steps(record) - sum(map(_skipped_steps, earlier))),
        }
        _require_written(temporary, tensors)
        # state.json is the last file: a directory without it is no checkpoint.
        write_digests(temporary, tensors)
        write_record(temporary, record)
        for name in ("digests.json", "weights.json", "state.json"):
            sync(temporary / name)
        if final.exists():
            self._remove(final)
        temporary.rename(final)
        sync(self.directory)
        if self.keep_last is not None:
            paths = complete(self.directory)
            good = [path for path in paths if not read_record(path).get("skipped")]
            kept = {*paths[-self.keep_last :], *good[-self.keep_last :]}
            for path in paths:
                if path not in kept:
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint so that no moment leaves half of it under its name."""
        doomed = path.with_name(f"{TEMPORARY}removed_{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _total_bytes(state: dict[str, Any]) -> int:
    """Return the size of the sharded tensors of all ranks, replicas counted once; collective."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    kinds = (ShardedTensor, ShardedTensorFactory)
    tensors = [leaf for leaf in nested_values(state) if isinstance(leaf, kinds)]
    mine = [t.data for t in tensors if is_main_replica(t.replica_id) and t.data is not None]
    total = torch.tensor([sum(data.nbytes for data in mine)], dtype=torch.int64)
    dist.all_reduce(total)
    return int(total.item())


def _skipped_steps(record: dict[str, Any]) -> int:
    """Return the steps that a run had skipped when a state.json was written."""
    return int(record["state"].get("counters", {}).get("skipped_steps", 0))


def _require_written(folder: Path, tensors: dict[str, Any]) -> None:
    """Raise RuntimeError when the index has other pieces than those that have digests."""
    written = {
        (name, place(chunk.offsets))
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        for chunk in entry.chunks
    }
    known = {(name, piece) for name, entry in tensors.items() for piece in entry["pieces"]}
    if written != known:
        raise RuntimeError(f"{folder} was written in other pieces: {sorted(written ^ known)[:3]}")


class _Results:
    """The results of a forked writer, in an anonymous temporary file shared by parent and child.

    It replaces mcore's queue, which is a manager process per rank, spawned at the first save and
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
