"""Masks of blocks of queries, which backward makes again instead of keeping them.

SDPA saves its mask for backward. A mask of 512 queries and s keys is small; those of all blocks
together are a mask of all pairs of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

QUERY_BLOCK = 512
"""Queries of a block."""


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask, True where a query may look, as what SDPA adds to the logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def made_again(bias: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Let operators save `make` where they would save `bias`, which it returns again.

    Where a kernel saves a copy of the bias (some of CUDA's do), the copy is kept.
    """

    # The graph keeps `pack`, which must not keep the bias.
    reference = weakref.ref(bias)

    def pack(saved: Tensor) -> Any:
        # Detached: an operator's own output would hold the graph that holds it.
        return make if saved is reference() else saved.detach()

    return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed if isinstance(packed, Tensor) else packed()
    return tensor
