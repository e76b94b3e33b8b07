"""The weights that no source of an import gives, as a run from the seed would begin with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nvmm.parallel.parameters import draw_row

_BLOCK = 16_777_216  # elements drawn at a time


class Initial:
    """The values that a run from this seed would begin with, where no source gives any.

    They are a connector's, an output layer's and those of the blocks that attend to media. spreads:
    of those that are drawn; of the others norms begin as ones, biases as zeros. gate: of the
    blocks. Raises ValueError for other parameters.
    """

    def __init__(
        self,
        missing: Mapping[str, Tensor],
        seed: int,
        spreads: Mapping[str, float],
        dtype: torch.dtype,
        gate: float = 0.0,
    ) -> None:
        self.seed = seed
        self.gate = gate
        self.spreads = spreads
        self.spec = {name: tensor.to(dtype) for name, tensor in missing.items()}
        known = ("connector.", "cross_attention.", "output_layer.", "language.output_layer.")
        others = [
            name
            for name, tensor in missing.items()
            if not name.startswith(known) or (tensor.dim() > 1 and name not in spreads)
        ]
        if others:
            raise ValueError("no source gives " + ", ".join(others))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield rows, drawn one by one, some megabytes at a time."""
        spec = self.spec[name]
        if spec.dim() == 1:
            norm = name.endswith(("norm_weight", "norm.weight"))
            value = self.gate if name.endswith("gate") else float(norm)
            yield torch.full(spec.shape, value, dtype=spec.dtype)
            return
        rows, width = spec.shape
        std = self.spreads[name]
        step = max(1, _BLOCK // width)
        for first in range(0, rows, step):
            yield torch.stack(
                [
                    draw_row(self.seed, name, row, width, std).to(spec.dtype)
                    for row in range(first, min(first + step, rows))
                ]
            )
