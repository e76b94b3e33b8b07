"""Files of torch.save, read without running anything that is in them."""

from __future__ import annotations

import argparse
import enum
import pickle
import signal
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import torch

_DAMAGED = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, struct.error)
"""What torch's own reader of pickles raises of damaged bytes, beside its UnpicklingError."""


def load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a file with `weights_only`: tensors, plain values, numpy's and Megatron's arguments.

    Raises ValueError naming the file for anything else in it; nothing of it is run.
    """
    try:
        with _allowed():
            if mmap:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with path.open("rb") as stream:
                    content = torch.load(stream, map_location="cpu", weights_only=True)
    except (
        *_DAMAGED,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
    ) as error:
        # Torch raises an EOFError without a text.
        reason = str(error).splitlines() or [type(error).__name__]
        detail = next((line for line in reason if "GLOBAL" in line), reason[0])
        raise ValueError(f"{path}: refused, nothing of it was run: {detail.strip()}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict")
    return content


def _allowed() -> AbstractContextManager[None]:
    """Allow the classes of Megatron-LM's arguments, generator states and numpy's numbers."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    reconstruct = numpy.empty(0).__reduce__()[0]
    scalar = numpy.float64(0).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, signal.Signals, ModelType, AttnBackend, reconstruct]
    allowed += [numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    # LAION-CLAP's files have a metric of numpy's, under the module's name in its numpy or in ours.
    allowed += [type(numpy.dtype(numpy.float64)), scalar, (scalar, "numpy.core.multiarray.scalar")]
    # Some Pythons (3.11.2, say) pickle a member of an enum by its module's name or by getattr.
    allowed += [(member, f"signal.{member.name}") for member in signal.Signals]
    allowed.append((_enum_member, "builtins.getattr"))
    return torch.serialization.safe_globals(allowed)


def _enum_member(owner: Any, name: Any) -> Any:
    """Do all that `getattr` may do in such a file: name a member of an enum."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"GLOBAL getattr of {name!r} from {owner!r}")
