"""Load the library that `nvmm.kernels.build` makes, and choose the operations that run on it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from nvmm.config.choices import require
from nvmm.kernels import build

Choice = Literal["auto", "eager", "fused"]
PATH = build.library()

logger = logging.getLogger(__name__)


def _load() -> str | None:
    """Load the library; return the reason why that is not possible, or None."""
    if not PATH.is_file():
        if PATH == build.PREBUILT:
            return "the kernels are not built (nvmm kernels build)"
        if (reason := build.build_once(PATH)) is not None:
            return reason
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        # torch's own error hides the linker's reason.
        return f"{PATH} does not load: {error.__cause__ or error}"
    return None


MISSING = _load()
"""The reason why this process has no kernels; None when it has them."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementation of each operation.

    "fused" is its kernel, "eager" plain PyTorch, "auto" its kernel where there is one for the
    device and dtype.

    Args:
        norm: RMSNorm and LayerNorm.
        activation: bias, activation and gate between an MLP's two linears.
        gated_residual: residual adds of scaled branches (LayerScale, tanh gates).
        linear_cross_entropy: output layer and loss, without the logits in memory.
        rope: rotary position embedding of queries and keys.
        merge: media features among embeddings.
        pixel_shuffle: blocks of an encoder's grid into one token.
        joint_norm: QK-norm over heads that are spread over tensor-parallel ranks.
        adamw: the optimizer's step.
        multi_tensor: norm and clipping of the gradients.
    """

    norm: Choice = "auto"
    activation: Choice = "auto"
    gated_residual: Choice = "auto"
    linear_cross_entropy: Choice = "auto"
    rope: Choice = "auto"
    merge: Choice = "auto"
    pixel_shuffle: Choice = "auto"
    joint_norm: Choice = "auto"
    adamw: Choice = "auto"
    multi_tensor: Choice = "auto"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(f"kernels.{name}", value, Choice)
            if value == "fused" and MISSING:
                raise ValueError(f"kernels.{name}=fused needs the kernels, but {MISSING}")

    @classmethod
    def all(cls, value: Choice) -> Kernels:
        """Make one choice for every operation."""
        return cls(**{field.name: value for field in dataclasses.fields(cls)})

    def install(self, device: str = "cpu", *, log: bool = True) -> None:
        """Make these this process's choices; with `log`, log the kernels that run.

        device: type of the device that the process computes on, "cpu" or "cuda".

        Raises ValueError where an operation must be fused and has no kernel there.
        """
        global _choices
        problem = MISSING or _lacking(device)
        chosen = [name for name, value in dataclasses.asdict(self).items() if value != "eager"]
        forced = [name for name in chosen if getattr(self, name) == "fused"]
        if problem and forced:
            raise ValueError(f"kernels.{forced[0]}=fused needs the kernels, but {problem}")
        _choices = self
        if not chosen:
            problem = "as the config says"
        if log:
            running = f"eager PyTorch, {problem}" if problem else ", ".join(chosen)
            logger.info("kernels: %s", running)


_choices = Kernels()


def fused(operation: str, *tensors: Tensor | None, problem: str | None = None) -> bool:
    """Return True when `operation` runs on its kernel for these tensors.

    problem: another reason that keeps it from running, if any. Raises ValueError where the config
    says fused and there is no kernel for them.
    """
    choice = getattr(_choices, operation)
    if choice == "eager" or (choice == "auto" and MISSING):
        return False
    problem = MISSING or _obstacle([tensor for tensor in tensors if tensor is not None]) or problem
    if problem and choice == "fused":
        raise ValueError(f"kernels.{operation}=fused does not work here: {problem}; use auto")
    return problem is None


def _lacking(device: str) -> str | None:
    """Return the reason why the library has no kernels for a type of device, if it has none."""
    if device == "cuda" and not has_cuda():
        return f"{PATH} was built without CUDA"
    return None if device in ("cpu", "cuda") else f"no kernel for device {device}"


def _obstacle(tensors: list[Tensor]) -> str | None:
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if problem := _lacking(device):
        return problem
    if any(tensor.dtype != dtype for tensor in tensors):
        return "tensors of different dtypes"
    if dtype in (torch.float32, torch.bfloat16) or (dtype, device) == (torch.float16, "cuda"):
        return None
    return f"no kernel for {dtype} on {device}"


@functools.cache
def has_cuda() -> bool:
    """Return True when the library was built with nvcc."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("nvmm::norm", "CUDA")
