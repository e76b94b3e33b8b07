"""ModuleSpecs of transformer blocks, through mcore's BackendSpecProvider.

A backend names the norm, the parallel linears, the core attention and the activation. Global
parameter names are those of mcore's checkpoints and do not depend on the backend.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from nvmm.kernels import weight_gradient
from nvmm.modules.attention import CoreAttention
from nvmm.modules.linear import ColumnParallelLinear, RowParallelLinear
from nvmm.modules.mlp import NativeMLP
from nvmm.modules.norm import Norm

BACKENDS = ("native", "transformer_engine")
_FUSED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class NativeBackend(BackendSpecProvider):
    """Our kernels (or eager PyTorch) and SDPA on mcore's own parallel linears; CPU and CUDA."""

    def column_parallel_linear(self) -> type:
        """Return the linear whose output is split over TP."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return the linear whose input is split over TP."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Return False: norm and linear are separate modules."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """Return None: there is no fused norm and linear."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return one norm for all uses; the config says RMSNorm or LayerNorm."""
        return Norm

    def core_attention(self) -> type:
        """Return the attention on SDPA."""
        return CoreAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        """Return the experts' module, which runs them one after the other."""
        return SequentialMLP, MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
        )

    def activation_func(self) -> type | None:  # type: ignore[override]
        """Return None: NativeMLP takes `config.activation_func`."""
        return None


def backend_provider(name: str) -> BackendSpecProvider:
    """Return the provider behind `backend=`.

    Raises ValueError when Transformer Engine is asked for but not installed.
    """
    weight_gradient.install()
    if name == "native":
        return NativeBackend()
    if name == "transformer_engine":
        try:
            from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
        except ImportError as error:
            raise ValueError(
                "backend=transformer_engine needs the transformer-engine package (a CUDA machine);"
                " use backend=native"
            ) from error
        return TESpecProvider()
    raise ValueError(f"backend={name} must be one of {', '.join(BACKENDS)}")


def attention_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    mask: AttnMaskType,
    module: type = SelfAttention,
) -> ModuleSpec:
    """Return self-attention's spec, with per-head QK-norm where `config.qk_layernorm`."""
    rms = config.normalization == "RMSNorm"
    qk_norm = backend.layer_norm(rms_norm=rms, for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear()
            if backend.fuse_layernorm_and_linear()
            else backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def mlp_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Return the spec of a dense MLP, gated or not as the config says."""
    return ModuleSpec(
        module=MLP if backend.fuse_layernorm_and_linear() else NativeMLP,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_layer_norm_linear()
            if backend.fuse_layernorm_and_linear()
            else backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
            activation_func=backend.activation_func()
            if backend.fuse_layernorm_and_linear()
            else None,
        ),
    )


def layer_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    mask: AttnMaskType = AttnMaskType.causal,
    module: type = TransformerLayer,
    attention: type = SelfAttention,
) -> ModuleSpec:
    """Return the spec of a pre-norm transformer layer."""
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(config.normalization == "RMSNorm")
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention_spec(config, backend, mask, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else _FUSED_NAMES,
        ),
    )


def block_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    layer: ModuleSpec | Callable[[int], ModuleSpec],
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the specs of one model chunk's layers and final norm.

    layer: the spec of every layer, or a function from a layer's index, from 0, to its spec.
    """
    count = get_num_layers_to_build(config, vp_stage)
    if isinstance(layer, ModuleSpec):
        layers = [layer] * count
    else:
        first = get_transformer_layer_offset(config, vp_stage)
        layers = [layer(first + index) for index in range(count)]
    return TransformerBlockSubmodules(
        layer_specs=layers,
        layer_norm=backend.layer_norm(config.normalization == "RMSNorm"),
    )
