"""Seed, save and restore every random generator of this rank."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def capture() -> Tensor:
    """Return the states of all generators as JSON, uint8 [n].

    They are Python's, numpy's, torch's, the device's and mcore's.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], position, has_gauss, gauss],
        "torch": _encode(torch.get_rng_state()),
        "device": _encode(mcore_random._get_cuda_rng_state()),
        "tracker": {
            key: _encode(state)
            for key, state in mcore_random.get_cuda_rng_tracker().get_states().items()
        },
    }
    return torch.frombuffer(bytearray(json.dumps(states).encode()), dtype=torch.uint8)


def restore(data: Tensor) -> None:
    """Restore the states that `capture` returned; trailing spaces are ignored."""
    from megatron.core.tensor_parallel import random as mcore_random

    states = json.loads(data.numpy().tobytes())
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decode(states["torch"]))
    mcore_random._set_cuda_rng_state(_decode(states["device"]))
    mcore_random.get_cuda_rng_tracker().set_states(
        {key: _decode(text) for key, text in states["tracker"].items()}
    )


def reseed(seed: int) -> None:
    """Seed every generator by the rank's place in the layout; data has generators of its own.

    Ranks of one tensor-parallel group share torch's generator (replicated tensors need one
    dropout mask); pipeline stages, data- and context-parallel ranks differ.
    """
    from megatron.core import parallel_state, tensor_parallel

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed
        + 100 * parallel_state.get_pipeline_model_parallel_rank()
        + 10 * parallel_state.get_data_parallel_rank(with_context_parallel=True),
        force_reset_rng=True,
    )


@contextlib.contextmanager
def replayed() -> Iterator[None]:
    """Run with the current random states and put them back afterwards."""
    from megatron.core.tensor_parallel import random as mcore_random

    tracker = mcore_random.get_cuda_rng_tracker()
    states = {name: state.clone() for name, state in tracker.get_states().items()}
    cpu, device = torch.get_rng_state(), mcore_random._get_cuda_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        mcore_random._set_cuda_rng_state(device)
        tracker.set_states(states)
