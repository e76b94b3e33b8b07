"""A post-norm transformer layer, as BERT's: the norm follows each residual add."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from nvmm.modules.mlp import NativeMLP


@dataclass
class PostNormSubmodules(TransformerLayerSubmodules):
    """mcore's, with the norms behind attention and MLP."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class PostNormLayer(TransformerLayer):
    """norm(x + attention(x)), then norm(x + MLP(x)).

    mcore's layer has norms in front of its two branches, which are the identity here. The norms
    that follow come into what adds a branch to its residual.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: PostNormSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        # mcore turns autograd on for the residual add, which under no_grad would keep a graph.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        size, eps = config.hidden_size, config.layernorm_epsilon
        for name in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            spec = getattr(submodules, name)
            setattr(self, name, build_module(spec, config=config, hidden_size=size, eps=eps))
        self.self_attn_bda = functools.partial(self._add_and_norm, "post_self_attn_layernorm")
        self.mlp_bda = functools.partial(self._add_and_norm, "post_mlp_layernorm")

    def _add_and_norm(self, name: str, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return mcore's bias-dropout-add with a norm behind it."""
        add, norm = get_bias_dropout_add(training, fused), getattr(self, name)

        def added(branch: tuple[Tensor, Tensor | None], residual: Tensor, share: float) -> Tensor:
            normed: Tensor = norm(add(branch, residual, share))
            return normed

        return added


def post_norm_spec(
    config: TransformerConfig, backend: BackendSpecProvider, mask: AttnMaskType
) -> ModuleSpec:
    """Return the spec of a post-norm layer, whose linears have no norm to be fused with."""
    norm = backend.layer_norm(config.normalization == "RMSNorm")
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    fused = backend.fuse_layernorm_and_linear()
    return ModuleSpec(
        module=PostNormLayer,
        submodules=PostNormSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=backend.core_attention(), linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP if fused else NativeMLP,
                submodules=MLPSubmodules(
                    linear_fc1=column,
                    linear_fc2=row,
                    activation_func=backend.activation_func() if fused else None,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            post_self_attn_layernorm=norm,
            post_mlp_layernorm=norm,
        ),
    )
