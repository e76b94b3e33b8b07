"""Global names of parameters, each with a shape and a slice, from `sharded_state_dict`.

Initialisation, freezing, learning-rate patterns, gradient comparison, checkpoints and conversion
all use these names; `named_parameters()` restarts the layer count on every pipeline stage.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nvmm.config.choices import Backend
from nvmm.parallel.collectives import gather
from nvmm.parallel.setup import METADATA, Parallel, Precision


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter of this rank.

    name: global name, independent of the layout.
    parameter: the local tensor.
    global_shape: shape of the whole tensor (without padding heads).
    entry: mcore's ShardedTensor, or the factory that cuts the parameter into several.
    is_main_replica: exactly one rank of the world says True for each piece.
    """

    name: str
    parameter: Parameter
    global_shape: tuple[int, ...]
    entry: Any
    is_main_replica: bool

    def pieces(self, tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        """Cut a tensor shaped like the parameter into (global offset, view) pieces."""
        if not hasattr(self.entry, "build_fn"):
            return [(_offset(self.entry), tensor)]
        entry = self.entry
        parts = entry.build_fn(entry.key, tensor, entry.replica_id, entry.flattened_range)
        return [(_offset(part), part.data) for part in _sharded_tensors(parts)]


def _offset(sharded: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in sharded.global_offset[sharded.prepend_axis_num :])


def _sharded_tensors(state: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return [piece for item in state for piece in _sharded_tensors(item)]
    return []


def sharded_state_dict(model: Module) -> dict[str, Any]:
    """Return a model chunk's sharded_state_dict, without mcore's empty byte entries.

    mcore's linears add `_extra_state` entries that hold None but travel as pickled bytes; a
    checkpoint of nvmm holds tensors only.
    """
    from megatron.core import parallel_state

    metadata = METADATA | {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
    }
    state = model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    return {key: entry for key, entry in state.items() if not key.endswith("_extra_state")}


def sharded_parameters(models: Module | Sequence[Module]) -> list[ShardedParameter]:
    """List every parameter of this rank's model chunks with its global name, in module order.

    Raises ValueError when a parameter has no global name or two parameters share one (a tied
    embedding's copy on the last stage shares its name by design and is kept).
    """
    models = [models] if isinstance(models, Module) else list(models)
    parameters: list[ShardedParameter] = []
    for model in models:
        by_identity = {}
        for entry in sharded_state_dict(model).values():
            if isinstance(getattr(entry, "data", None), Parameter):
                by_identity[id(entry.data)] = entry
        for local_name, parameter in model.named_parameters():
            entry = by_identity.get(id(parameter))
            if entry is None:
                raise ValueError(f"parameter {local_name} is missing from sharded_state_dict")
            parameters.append(_describe(entry, parameter))
    return parameters


def _describe(entry: Any, parameter: Parameter) -> ShardedParameter:
    if hasattr(entry, "build_fn"):
        first = _sharded_tensors(entry.build())[0]
    else:
        first = entry
    replica = first.replica_id
    main = all(x == 0 for x in replica) if isinstance(replica, tuple) else replica == 0
    shape = tuple(int(x) for x in first.global_shape[first.prepend_axis_num :])
    return ShardedParameter(entry.key, parameter, shape, entry, main)


def build_chunks(
    model: Callable[..., Module],
    parallel: Parallel,
    precision: Precision,
    backend: Backend = "native",
    seed: int = 0,
    adapt: Callable[[list[Any]], None] | None = None,
) -> list[Any]:
    """Build and initialise this rank's model chunks from a YAML's partial constructor.

    adapt: adds to the built chunks what is initialised with them (LoRA's adapters).
    """
    chunks = [model(chunk=chunk) for chunk in parallel.chunks(precision, backend)]
    if adapt is not None:
        adapt(chunks)
    initialize(chunks, seed)
    return chunks


def initialize(models: Module | Sequence[Module], seed: int) -> None:
    """Draw every marked parameter from the seed and its global name, row by row.

    A row is the last axis of the whole tensor at one index of the other axes; each has a generator
    of its own, so values depend on nothing but (seed, name, row) and any layout starts from the
    same model. Parameters without a mark (norm weights, biases) keep their constructor's constants.
    """
    for sharded in sharded_parameters(models):
        initial = getattr(sharded.parameter, "initial", None)
        if initial is None:
            continue
        with torch.no_grad():
            for offset, piece in sharded.pieces(sharded.parameter.data):
                _fill(piece, sharded, offset, initial.std, seed)


def _fill(
    piece: Tensor, sharded: ShardedParameter, offset: tuple[int, ...], std: float, seed: int
) -> None:
    width = sharded.global_shape[-1]
    columns = slice(offset[-1], offset[-1] + piece.shape[-1])
    for index in itertools.product(*(range(n) for n in piece.shape[:-1])):
        row = 0
        for i, o, n in zip(index, offset, sharded.global_shape, strict=False):
            row = row * n + i + o
        values = draw_row(seed, sharded.name, row, width, std)
        piece[index] = values[columns].to(piece.dtype)


def draw_row(seed: int, name: str, row: int, width: int, std: float) -> Tensor:
    """Draw the initial values [width], fp32, of one row of the parameter with this global name."""
    key = hashlib.blake2b(f"{seed}/{name}/{row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big", signed=True))
    return torch.randn(width, generator=generator) * std


def match(pattern: str, name: str) -> bool:
    """Return True when a shell pattern (`vision.*`, `*.bias`) matches a global name."""
    return fnmatchcase(name, pattern)


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that match none of the names."""
    names = list(names)
    return [p for p in patterns if not any(match(p, n) for n in names)]


def names_on_all_ranks(names: Iterable[str]) -> list[str]:
    """Return the sorted union of every rank's names; collective."""
    return sorted({name for rank in gather(dict.fromkeys(names)) for name in rank})


def refuse_unmatched(key: str, patterns: Sequence[str], names: Iterable[str], what: str) -> None:
    """Refuse patterns that match no name on any rank: such a pattern does nothing. Collective.

    Raises ValueError naming the config key, those patterns, and the names most like the first.
    """
    all_names = names_on_all_ranks(names)
    useless = unmatched(patterns, all_names)
    if not useless:
        return
    # One line stands for a parameter of all layers.
    alike = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in all_names}

    def likeness(name: str) -> tuple[float, float]:
        """Compare the last words first: the linear or parameter matters more than where it is."""
        pairs = [(useless[0].rpartition(".")[2], name.rpartition(".")[2]), (useless[0], name)]
        last_words, names = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last_words, names

    near = sorted(alike, key=likeness, reverse=True)[:5]
    raise ValueError(f"{key}: {useless} matches {what}; there are {', '.join(near) or 'none'}")
