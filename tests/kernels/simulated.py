"""The CUDA sources, built for the simulator and loaded as `torch.ops.nvmm_simulated`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nvmm.kernels import build

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults.cu")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


def builder() -> ModuleType:
    """Return the module that compiles csrc/."""
    return build


def simulator(sanitized: bool = False) -> Path:
    """The library, built once for each state of the sources (in build/)."""
    sources = sorted([*(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc"), FAULTS])
    state = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        if path.is_file():
            state.update(path.read_bytes())
    name = f"simulated-{'sanitized-' if sanitized else ''}{state.hexdigest()[:16]}.so"
    target = ROOT / "build" / name
    if not target.is_file():
        builder().build_simulated(target, [FAULTS], SANITIZED if sanitized else ())
    return target


class Elsewhere:
    """Operations on copies that `there` makes of their arguments.

    Arguments get back what was changed in place; results are on the CPU.
    """

    def __init__(self, there: Callable[[Tensor], Tensor], ops: Any = torch.ops.nvmm) -> None:
        self.there, self.ops = there, ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.call(name, arguments)

    def call(self, name: str, arguments: Any) -> Any:
        """Run the operation `name`."""
        copies: dict[int, Tensor] = {}
        moved = tree_map_only(
            Tensor, lambda t: copies.setdefault(id(t), self.there(t.detach())), arguments
        )
        found = getattr(self.ops, name)(*moved)
        for before in tree_leaves(arguments):
            if isinstance(before, Tensor):
                before.detach().copy_(copies[id(before)])
        return tree_map_only(Tensor, Tensor.cpu, found)


class InFloat32(Elsewhere):
    """The CPU's loops for float16, which they do not have."""

    def __init__(self) -> None:
        super().__init__(lambda t: t.float() if t.dtype == torch.float16 else t.clone())

    def call(self, name: str, arguments: Any) -> Any:
        """As of its base; masters, which float32 has none of, are the parameters themselves."""
        if name == "adamw" and arguments[0][0].dtype == torch.float16 and arguments[2]:
            parameters, gradients, masters, *rest = arguments
            super().call(name, (masters, gradients, [], *rest))
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
            return None
        return super().call(name, arguments)


def placed(tensor: Tensor, device: str, shift: int = 0) -> Tensor:
    """A copy with the gaps of a view and its place among 16 bytes, `shift` elements further."""
    first = tensor.storage_offset() + shift
    gaps = (s * (n - 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + sum(gaps) if tensor.numel() else first
    whole = torch.empty(last + 1, dtype=tensor.dtype, device=device)
    return whole.as_strided(tensor.shape, tensor.stride(), first).copy_(tensor)
