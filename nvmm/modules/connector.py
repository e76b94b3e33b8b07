"""The connector from an encoder to a language model: pixel shuffle and an MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.config.choices import require
from nvmm.kernels import pixel_shuffle as kernels
from nvmm.kernels.activation import activation
from nvmm.modules.flops import Training, connector_flops
from nvmm.modules.mlp import FUSED_ACTIVATIONS
from nvmm.modules.specs import backend_provider
from nvmm.parallel.setup import Chunk, Normal

TokenOrder = Literal["rows", "columns"]
"""How a grid's tokens follow one another."""


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Put each factor x factor block of a grid into one token (NVLM section 3.1; InternVL's v2).

    features: [n, rows, columns, channels].

    Returns: [n, rows / factor, columns / factor, factor^2 * channels]; channels of a block in the
    order top-left, top-right, bottom-left, bottom-right.
    Raises ValueError when the factor does not divide the grid.
    """
    rows, columns = features.shape[1:3]
    if rows % factor or columns % factor:
        factors = [k for k in range(1, min(rows, columns) + 1) if not rows % k and not columns % k]
        raise ValueError(
            f"model.connector.downsample={factor} must divide the encoder's grid"
            f" ({rows}x{columns}); use one of {', '.join(map(str, factors))}, or"
            " model.connector.pad_grid=true"
        )
    return kernels.pixel_shuffle(features, factor)


class MLPConnector(MegatronModule):
    """Pixel shuffle, LayerNorm, then linear - activation - linear, or one linear.

    Tensor-parallel like the language model's MLP (columns, then rows), without sequence
    parallelism: input and output are whole on every rank, and so is the input's gradient.

    Args:
        downsample: side of the blocks that become one token.
        pad_grid: add rows of zeros below and columns of zeros on the right of a grid that
            downsample does not divide (VILA 1.5: 27 x 27 becomes 28 x 28).
        token_order: rows, or columns: the first column's tokens first, as the downsampling of VILA
            1.5's checkpoints (`mlp_downsample`) leaves them.
        hidden_size: width between the two layers; None for one layer without activation.
        layernorm: normalise the shuffled features first.
        layernorm_epsilon: 1e-6 is Megatron's for NVLM-D 72B, 1e-5 the published model's.
        bias: biases of the linears.
        activation_func: between the two layers.
        init_method_std: of the linears' weights.
        input_size: channels of the encoder; output_size: hidden size of the language model.
        chunk: which part of the model this rank builds.
    """

    tokens_of_tile = "grid"
    """Tokens are blocks of the encoder's grid (nvmm.config.tiles)."""

    def __init__(
        self,
        downsample: int = 2,
        hidden_size: int | None = None,
        layernorm: bool = True,
        layernorm_epsilon: float = 1e-6,
        bias: bool = False,
        activation_func: Callable[[Tensor], Tensor] = F.gelu,
        init_method_std: float = 0.02,
        pad_grid: bool = False,
        token_order: TokenOrder = "rows",
        *,
        input_size: int,
        output_size: int,
        chunk: Chunk,
    ) -> None:
        require("model.connector.token_order", token_order, TokenOrder)
        width = input_size * downsample**2
        config = chunk.encoder_config(
            functools.partial(
                TransformerConfig,
                num_layers=1,
                hidden_size=width,
                num_attention_heads=chunk.parallel.tensor_model_parallel_size,
                normalization="LayerNorm",
                init_method_std=init_method_std,
            )
        )
        super().__init__(config=config)
        self.downsample = downsample
        self.pad_grid = pad_grid
        self.token_order = token_order
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.activation_func = activation_func
        backend = backend_provider(chunk.backend)
        self.layernorm = (
            backend.layer_norm(rms_norm=False)(config, width, layernorm_epsilon)
            if layernorm
            else None
        )
        options: Any = {
            "config": config,
            "init_method": Normal(init_method_std),
            "bias": bias,
            "skip_bias_add": False,
            "is_expert": False,
        }
        self.linear_fc1 = backend.column_parallel_linear()(
            width, hidden_size or output_size, gather_output=False, **options
        )
        self.linear_fc2 = None
        if hidden_size is not None:
            self.linear_fc2 = backend.row_parallel_linear()(
                hidden_size, output_size, input_is_parallel=True, **options
            )

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features [n, rows * columns, input_size] to embeddings [n, tokens, output_size].

        tokens = rows * columns / downsample^2, of the padded grid where that is padded.
        """
        n = features.shape[0]
        x = features.reshape(n, *grid, -1)
        rows, columns = self._padded(grid)
        if (rows, columns) != grid:
            x = F.pad(x, (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
        x = pixel_shuffle(x, self.downsample)
        if self.token_order == "columns":
            x = x.transpose(1, 2)
        x = x.flatten(1, 2)
        if self.layernorm is not None:
            x = self.layernorm(x)
        x, _ = self.linear_fc1(x)
        if self.linear_fc2 is None:
            return tensor_parallel.gather_from_tensor_model_parallel_region(x)
        kind = FUSED_ACTIVATIONS.get((self.activation_func, False))
        x = self.activation_func(x) if kind is None else activation(x, kind=kind)
        x, _ = self.linear_fc2(x)
        return x

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of a grid with those that padding adds."""
        if not self.pad_grid:
            return grid
        rows, columns = (-(-side // self.downsample) * self.downsample for side in grid)
        return rows, columns

    def flops(self, num_tiles: int, grid: tuple[int, int], training: Training) -> float:
        """Count matrix-multiply FLOPs of the linears over some tiles."""
        rows, columns = self._padded(grid)
        return connector_flops(
            input_size=self.linear_fc1.input_size,
            hidden_size=self.hidden_size,
            output_size=self.output_size,
            num_tokens=num_tiles * rows * columns // self.downsample**2,
            training=training,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's, with the norm under the name it has when fused with the first linear."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        replace_prefix_for_sharding(
            {k: v for k, v in state.items() if k.startswith(f"{prefix}layernorm.")},
            f"{prefix}layernorm.",
            f"{prefix}linear_fc1.layer_norm_",
        )
        return state
