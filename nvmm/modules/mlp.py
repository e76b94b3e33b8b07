"""mcore's MLP with bias, activation and gate in one kernel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvmm.kernels.activation import activation

FUSED_ACTIVATIONS: dict[tuple[Any, bool], str] = {
    (F.silu, True): "swiglu",
    (F.gelu, True): "geglu",
    (F.gelu, False): "gelu",
    (squared_relu, False): "squared_relu",
}
"""(activation function, gated or not) -> the `kind` of the kernel that computes it."""


def activation_kind(config: TransformerConfig) -> str | None:
    """Return the kernel's kind for the config's activation; None where mcore's code must run."""
    plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    if config.use_te_activation_func or config.bias_activation_fusion or not plain:
        return None
    return FUSED_ACTIVATIONS.get((config.activation_func, config.gated_linear_unit))


class NativeMLP(MLP):
    """mcore's MLP; parameters and their names are the same."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden_states [s, b, h] to (output [s, b, h], bias that the caller adds or None)."""
        kind = activation_kind(self.config)
        if kind is None or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        intermediate, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(activation(intermediate, bias, kind=kind))
