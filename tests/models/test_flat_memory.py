"""Memory per token does not grow with the sequence: no tensor of all pairs of tokens, kept or not.

A dispatch mode sees every tensor that an operator makes. At twice the length the largest one, and
the bytes that are alive at the worst moment of a step, must be twice as many and no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.inference.decoding import generate
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.ranks import run_ranks

SHORT, LONG = 2048, 4096
FLAT = 2.06
"""What twice the length may cost: rounding to blocks, and bytes that do not depend on it."""


class Memory(TorchDispatchMode):
    """The largest tensor and the most bytes alive at once, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def model_of(chunk: Any = None, **changes: Any) -> Any:
    """One narrow layer, beside which a mask of all pairs is large."""
    target = tiny.embedder("Mean") if changes.pop("embeds", False) else tiny.language()
    target["transformer"] |= {
        **{"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1},
        **{"kv_channels": 8, "ffn_hidden_size": 16, **changes.pop("transformer", {})},
    }
    target |= {"vocab_size": 60, "padded_vocab_size": 64, "max_sequence_length": 8192, **changes}
    chunk = chunk or Parallel().chunks(Precision())[0]
    return instantiate(target, _convert_="all")(chunk=chunk)


def batch_of(*lengths: int, **options: Any) -> Batch:
    samples = [
        Sample((Text(torch.arange(n) % 50, torch.ones(n)),), number)
        for number, n in enumerate(lengths)
    ]
    return collate(samples, pad_id=0, **options)


def trained(model: Any, batch: Batch) -> None:
    model.train()
    model(batch).sum().backward()


def padded(length: int, **model: Any) -> None:
    trained(model_of(**model), batch_of(length, length // 3))


def packed(length: int, **model: Any) -> None:
    """Documents of which the longest has half the row."""
    parts = (length // 2, length // 4, length // 4 - 5)
    trained(model_of(**model), batch_of(*parts, packed=True, pad_multiple=8))


def embedded(length: int) -> None:
    """Rows of different lengths without a causal mask: spans of valid keys, and a gradient."""
    trained(model_of(embeds=True), batch_of(length, length // 3))


def generated(length: int, **model: Any) -> None:
    """Prompts of different lengths: padding on the left, then a cache."""
    prompts = [
        Sample((Text(torch.arange(n) % 50, torch.zeros(n)),), n) for n in (length, length - 7)
    ]
    generate([model_of(**model).eval()], prompts, max_new_tokens=3, stop_ids=[], pad_id=0)


WINDOWS = {"transformer": {"window_size": [100, 0]}}
YARN = {
    "rope_scaling": {
        "_target_": "nvmm.modules.rope_scaling.YaRN",
        **{"factor": 4.0, "original_max_position_embeddings": 512},
    }
}
DYNAMIC = {
    "rope_scaling": YARN["rope_scaling"] | {"_target_": "nvmm.modules.rope_scaling.DynamicNTK"}
}
CASES: dict[str, Callable[[int], None]] = {
    "padded": padded,
    "packed": packed,
    "windows": lambda length: padded(length, **WINDOWS),
    "windows packed": lambda length: packed(length, **WINDOWS),
    "yarn": lambda length: padded(length, **YARN),
    "dynamic packed": lambda length: packed(length, **DYNAMIC),
    "spans": embedded,
    "generation": generated,
    "generation with windows": lambda length: generated(length, **WINDOWS),
}


def growth(case: Callable[[int], Any]) -> tuple[float, float]:
    """How many times larger the largest tensor and the peak are at twice the length."""
    case(64)  # what is made once
    found = []
    for length in (SHORT, LONG):
        with Memory() as memory:
            case(length)
        found.append(memory)
    return found[1].largest / found[0].largest, found[1].peak / found[0].peak


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", CASES)
def test_memory_per_token_is_flat(name: str) -> None:
    largest, peak = growth(CASES[name])
    assert largest <= FLAT and peak <= FLAT, (largest, peak)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", ["spans", "generation"])
def test_a_mask_of_all_pairs_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvmm.modules.attention.QUERY_BLOCK", 1 << 20)
    largest, peak = growth(CASES[name])
    assert largest > 3 and peak > 2.5


@pytest.mark.usefixtures("world")
def test_masks_that_backward_keeps_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = lambda bias, make: contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr("nvmm.modules.attention.made_again", kept)
    largest, peak = growth(CASES["spans"])
    assert largest <= FLAT and peak > 2.5


def _context_parallel(rank: int, world: int, init: str, rows: str) -> tuple[float, float]:
    from nvmm.modules import attention as module

    parallel = Parallel(context_parallel_size=world)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)

    module.QUERY_BLOCK = 128  # below the chunks of the shortest document

    def case(length: int) -> None:
        model = model_of(parallel.chunks(Precision())[0])
        if rows == "packed":
            parts = (length // 2, length // 4, length // 4)
            return trained(model, batch_of(*parts, packed=True, pad_multiple=4, segment_multiple=4))
        return trained(model, batch_of(length, length // 3, pad_multiple=4))

    return growth(case)


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_memory_per_token_is_flat_on_context_parallel_ranks(rows: str) -> None:
    for largest, peak in run_ranks(_context_parallel, 2, rows):
        assert largest <= FLAT and peak <= FLAT, (largest, peak)
