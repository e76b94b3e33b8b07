"""The FP8 recipe of a run, as Transformer Engine 2.11 defines it, and the layers it leaves out.

The backend applies it: mcore's own fields drive Transformer Engine, and
`nvmm.modules.fp8_quantize` emulates the recipe in the native backend's linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nvmm.config.choices import require

Recipe = Literal["delayed", "current", "blockwise", "mxfp8"]
Format = Literal["hybrid", "e4m3"]
Algorithm = Literal["max", "most_recent"]
RECIPES: dict[Recipe, str] = {
    "delayed": "delayed",
    "current": "tensorwise",
    "blockwise": "blockwise",
    "mxfp8": "mxfp8",
}
"""Our names -> mcore's."""


@dataclass(frozen=True)
class Fp8:
    """FP8 products in the linears of all transformer blocks; everything else keeps its precision.

    Args:
        recipe: "delayed" (a scale a tensor, from the amaxes of past steps), "current" (from the
            tensor itself), "blockwise" (powers of two of 128 values, 128 x 128 of weights), or
            "mxfp8" (E8M0 scales of 32 values).
        format: "hybrid" (E4M3 forward, E5M2 for gradients) or "e4m3"; None: the recipe's own,
            hybrid for the first two, e4m3 for the others.
        margin: delayed scales are divided by 2^margin.
        amax_history_len: steps that delayed scaling remembers.
        amax_compute_algo: "max" of them, or the "most_recent".
        num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: first and last layers of every
            transformer block that keep their precision.
        exclude: patterns of linears by global name (without `.weight`) that keep theirs.
    """

    recipe: Recipe = "delayed"
    format: Format | None = None
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: Algorithm = "max"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        require("precision.fp8.recipe", self.recipe, Recipe)
        if self.format is not None:
            require("precision.fp8.format", self.format, Format)
        require("precision.fp8.amax_compute_algo", self.amax_compute_algo, Algorithm)
        if self.amax_history_len < 1:
            raise ValueError(
                f"precision.fp8.amax_history_len={self.amax_history_len} must be at least 1"
            )

    @property
    def per_tensor(self) -> bool:
        """True where a tensor has one scale."""
        return self.recipe in ("delayed", "current")

    @property
    def gradients_in_e5m2(self) -> bool:
        """True where gradients are E5M2, and the rest E4M3."""
        return (self.format or ("hybrid" if self.per_tensor else "e4m3")) == "hybrid"

    @property
    def feature_multiple(self) -> int:
        """The multiple that input and output features of a linear must be of."""
        return 32 if self.recipe == "mxfp8" else 16

    def row_multiple(self, gathered: bool) -> int:
        """Return the multiple that a linear's tokens must be of.

        gathered: they are gathered over tensor-parallel ranks in FP8.

        Transformer Engine asks the same of the features of an input that it gathers.
        """
        if self.recipe == "blockwise" and gathered:
            return 128
        return self.feature_multiple

    def sequence_multiple(self, tensor: int, context: int, sequence_parallel: bool) -> int:
        """Return the multiple that the length of a row must be of in this layout.

        Under sequence parallelism each rank's part of the tokens is quantised before it is
        gathered; elsewhere tokens are padded inside the linears.
        """
        return self.row_multiple(True) * tensor * context if sequence_parallel else 1

    def keeps_precision(self, layer: int, num_layers: int) -> bool:
        """Return True when layer `layer`, from 0, is among a block's first or last, left out."""
        return (
            layer < self.num_layers_at_start_in_bf16
            or layer >= num_layers - self.num_layers_at_end_in_bf16
        )

    def transformer_kwargs(self) -> dict[str, Any]:
        """Return mcore's fields for Transformer Engine: any other backend would ignore them."""
        ends = (self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16)
        return {
            "fp8": "hybrid" if self.gradients_in_e5m2 else "e4m3",
            "fp8_recipe": RECIPES[self.recipe],
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "first_last_layers_bf16": any(ends),
            "num_layers_at_start_in_bf16": ends[0],
            "num_layers_at_end_in_bf16": ends[1],
        }
