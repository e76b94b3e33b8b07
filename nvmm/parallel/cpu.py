"""Let megatron-core run on CPU and gloo by answering its `torch.cuda` calls.

megatron-core 0.16.1 names CUDA in its optimizer, schedules, RNG tracker and checkpoint writer. On a
machine without a GPU those calls are answered here with the CPU's, so the library itself stays
unmodified and the code that trains on GPUs is the code that tests prove on two cores. The module is
imported only where `torch.cuda.is_available()` is False.

Only tensor factories are wrapped, not every torch call: a TorchFunctionMode would double the eager
dispatch time of all operators.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
_installed = False


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and str(device).startswith("cuda"))


def _on_cpu(factory: Any) -> Any:
    """Wrap a factory so that `device="cuda"` means the CPU and `pin_memory` is dropped."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


class _Timeline:
    """A stream or event that does nothing: on the CPU everything is already ordered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _nothing() -> Any:
    """Return a new function that does nothing: torch.compile refuses one under two names."""
    return lambda *args, **kwargs: None


def _tensor_type(original: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # megatron-core compares `Tensor.type()` with 'torch.cuda.FloatTensor'.
        if not isinstance(result, str):
            return result
        # It knows no double precision; called bf16, fp64 gets fp32 masters in the optimizer too.
        return result.replace("torch.", "torch.cuda.").replace("Double", "BFloat16")

    return wrapper


def _move(original: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(CPU if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return wrapper


def install() -> None:
    """Answer megatron-core's CUDA calls with the CPU's. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    # 1. Import mcore before anything is replaced: its import compiles functions and lists torch's.
    from megatron.core.tensor_parallel import random as mcore_random

    # 2. Replace tensor factories. `with torch.device(...)` looks a factory up in a set that torch
    # fills at first use. It is filled now, with torch's own functions: the wrappers call those, so
    # a set of wrappers would never match. Transformers' from_pretrained relies on it.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # 3. Replace moves: `.to("cuda")` and `.cuda()` leave a tensor where it is.
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.to = _move(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = _move(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment,return-value]

    # 4. Answer torch.cuda itself: the device is the CPU, and nothing needs to be waited for.
    cuda = torch.cuda
    answers = {
        "current_device": lambda: CPU,
        "is_initialized": lambda: False,
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "set_device": _nothing(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "Stream": _Timeline,
        "Event": _Timeline,
        "current_stream": _Timeline,
        "default_stream": _Timeline,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.nvtx.range_push = _nothing()  # type: ignore[assignment]
    cuda.nvtx.range_pop = _nothing()  # type: ignore[assignment]

    # 5. Give mcore's tracker real CPU generator states: without them ranks of a TP group would
    # drop other elements of the tensors that they share.
    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )
    # The tracker warns that the CPU generator moved inside its fork; here that is its purpose.
    logging.getLogger(mcore_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
