"""RMSNorm and LayerNorm behind mcore's norm signature."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nvmm.kernels.norm import norm
from nvmm.parallel.setup import default_device


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last axis, as `config.normalization` says.

    Statistics are taken in fp32 and cast back. With `layernorm_zero_centered_gamma` the stored
    weight is gamma - 1 (layernorm1p). Unlike mcore's WrappedTorchNorm it works under sequence
    parallelism: its parameters are marked so that their gradients are summed over TP.

    Args:
        hidden_size: width of the last axis.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.rms = config.normalization == "RMSNorm"
        factory = torch.zeros if self.zero_centered else torch.ones
        device = default_device(config)
        self.weight = Parameter(factory(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if self.rms:
            self.register_parameter("bias", None)
        else:
            self.bias = Parameter(torch.zeros_like(self.weight))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]; shape and dtype stay."""
        return norm(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            rms=self.rms,
            zero_centered=self.zero_centered,
        )
