"""Layers of a bidirectional encoder: LayerScale, joint QK-norm, any number of heads under TP."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn import Parameter

from nvmm.config.choices import require
from nvmm.kernels.gated_residual import gated_residual
from nvmm.kernels.joint_norm import joint_norm
from nvmm.kernels.norm import norm
from nvmm.modules.mlp import NativeMLP
from nvmm.parallel.setup import default_device

QKNorm = Literal["joint"]


class EncoderLayer(TransformerLayer):
    """A pre-norm layer whose branches are scaled by learned vectors before the residual add.

    Args:
        layer_scale: initial value of LayerScale's `ls1` and `ls2` [hidden_size]; None for none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        layer_scale: float | None = None,
    ) -> None:
        if pg_collection is not None and submodules.mlp.module is NativeMLP:
            # mcore hands its groups to MLP alone, not to what derives from it.
            params = submodules.mlp.params | {"tp_group": pg_collection.tp}
            mlp = dataclasses.replace(submodules.mlp, params=params)
            submodules = dataclasses.replace(submodules, mlp=mlp)
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        # mcore turns autograd on for the residual add, which under no_grad would keep a graph.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        if layer_scale is not None:
            options: Any = {"dtype": config.params_dtype, "device": default_device(config)}
            self.ls1 = Parameter(torch.full((config.hidden_size,), layer_scale, **options))
            self.ls2 = Parameter(torch.full((config.hidden_size,), layer_scale, **options))
            self.self_attn_bda = functools.partial(self._scaled_add, "ls1")
            self.mlp_bda = functools.partial(self._scaled_add, "ls2")

    def _scaled_add(self, name: str, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return mcore's bias-dropout-add, the branch and its bias scaled first."""
        scale = getattr(self, name)

        def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            # Encoders refuse dropout.
            x, bias = branch
            return gated_residual(residual, x, scale, bias)

        return add


@dataclasses.dataclass(frozen=True)
class LocalHeads:
    """The attention heads of one tensor-parallel rank; the last ranks may hold zero padding heads.

    total: real heads of the layer.
    first: index of this rank's first head.
    count: heads of this rank, padding included.
    """

    total: int
    first: int
    count: int

    @property
    def real(self) -> int:
        """The number of this rank's real heads, which come first."""
        return min(max(self.total - self.first, 0), self.count)

    @property
    def padding(self) -> int:
        """The number of this rank's padding heads."""
        return self.count - self.real


def padded_heads(num_heads: int, tensor_parallel_size: int) -> int:
    """Round `num_heads` up to a multiple of the tensor-parallel size (25 -> 26 at 2, 32 at 8)."""
    return -(-num_heads // tensor_parallel_size) * tensor_parallel_size


class EncoderAttention(SelfAttention):
    """Self-attention with InternViT's joint QK-norm and heads that need not divide by TP.

    `config.num_attention_heads` is `num_heads` rounded up to a multiple of TP. The padding heads'
    rows of QKV and columns of the projection are zero, get no gradient, count in no norm statistic
    and are not part of the parameter: global shapes are those of the real heads.
    `config.add_qkv_bias` alone decides about QKV's bias; mcore's would follow `add_bias_linear`.

    Args:
        num_heads: real heads.
        qk_norm: "joint" (RMSNorm of q and of k over all heads' features together) or None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        num_heads: int,
        qk_norm: QKNorm | None = None,
    ) -> None:
        linear_qkv = functools.partial(
            _with_bias, submodules.linear_qkv, enabled=config.add_qkv_bias
        )
        super().__init__(
            config,
            dataclasses.replace(submodules, linear_qkv=linear_qkv),
            layer_number,
            attn_mask_type,
            cp_comm_type,
            pg_collection,
        )
        count = self.num_attention_heads_per_partition
        self.heads = LocalHeads(num_heads, self.tp_group.rank() * count, count)
        self.is_padded = config.num_attention_heads > num_heads
        if self.is_padded:
            with torch.no_grad():
                self.linear_qkv.weight.zero_()
                self.linear_proj.weight.zero_()
        if qk_norm is not None:
            require("model.vision.qk_norm", qk_norm, QKNorm)
            # Not q_layernorm: mcore sums over TP every gradient whose name contains that.
            size = self.hidden_size_per_attention_head
            self.q_norm = JointNorm(config, self.heads, size, self.tp_group)
            self.k_norm = JointNorm(config, self.heads, size, self.tp_group)
        self.qk_norm = qk_norm

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Project hidden_states [s, b, h] to q, k, v [s, b, heads of this rank, d]."""
        query, key, value = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate, split_qkv
        )
        if self.qk_norm is not None:
            query, key = self._joint_norms(query, key)
        if self.heads.padding:
            # Padding heads are constants, so that nothing flows back into them.
            value = F.pad(value[:, :, : self.heads.real], (0, 0, 0, self.heads.padding))
        return query, key, value

    def _joint_norms(self, *tensors: Tensor) -> list[Tensor]:
        """Norm queries and keys, each over all heads' features; padding heads become 0."""
        weights = [self.q_norm.weight, self.k_norm.weight]
        rows, eps = [x.flatten(2) for x in tensors], self.config.layernorm_epsilon
        if self.tp_group.size() == 1:
            normed = [norm(x, w, eps=eps, rms=True) for x, w in zip(rows, weights, strict=True)]
        else:
            size = self.hidden_size_per_attention_head
            columns = {"first": self.heads.first * size, "real": self.heads.real * size}
            normed = [*joint_norm(rows, weights, eps=eps, **columns, group=self.tp_group)]
        return [y.view_as(x) for y, x in zip(normed, tensors, strict=True)]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return mcore's, with padded weights cut into their real heads."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_padded:
            axes = {"linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_proj.weight": 1}
            axes |= {"linear_qkv_lora.b": 0, "linear_proj_lora.a": 1}
            for name, axis in axes.items():
                entry = state.get(prefix + name)
                if entry is not None:
                    rank = self.tp_group.rank()
                    state[prefix + name] = _real_heads(
                        entry, self.heads, axis, sharded_offsets, rank
                    )
        return state


def _with_bias(linear: Callable[..., Any], *args: Any, enabled: bool, **kwargs: Any) -> Any:
    return linear(*args, **(kwargs | {"bias": enabled}))


def _real_heads(
    entry: ShardedTensor,
    heads: LocalHeads,
    axis: int,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    rank: int,
) -> ShardedTensorFactory:
    """Cut a padded weight into its parameters: one part per real head along `axis`."""

    def part(key: str, data: Tensor, head: int, replica_id: Any) -> ShardedTensor:
        head_offset = (axis + len(sharded_offsets), head, heads.total)
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *sharded_offsets,
            head_offset,
            replica_id=replica_id,
            prepend_axis_num=len(sharded_offsets),
        )

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        parts = tensor.chunk(heads.count, axis)[: heads.real]
        return [part(key, data, heads.first + i, replica_id) for i, data in enumerate(parts)]

    def scratch(key: str, tensor: Tensor, replica_id: Any) -> ShardedTensor:
        data = torch.zeros_like(tensor.chunk(heads.count, axis)[0])
        return part(key, data, 0, (*replica_id[:-2], rank, replica_id[-1]))

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        zeros = [torch.zeros_like(parts[0])] * heads.padding
        return torch.cat([*parts[: heads.real], *zeros], axis)

    return _HeadsFactory(entry.key, entry.data, build, merge, entry.replica_id, scratch=scratch)


@dataclasses.dataclass
class _HeadsFactory(ShardedTensorFactory):
    """A factory that gives mcore a shard on a rank of padding heads alone.

    mcore wants one shard of every rank's entry: there, a copy of head 0 that is not saved, and
    is thrown away when loaded.
    """

    scratch: Callable[..., ShardedTensor] | None = None

    def build(self) -> list[ShardedTensor]:
        """Return this rank's real heads, or the scratch copy."""
        assert self.scratch is not None
        return super().build() or [self.scratch(self.key, self.data, self.replica_id)]


class JointNorm(torch.nn.Module):
    """The weight of an RMSNorm over the features of all heads together, spread over TP.

    weight: [total heads * head_dim], whole on every rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: LocalHeads,
        head_dim: int,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.weight = Parameter(
            torch.ones(
                heads.total * head_dim, dtype=config.params_dtype, device=default_device(config)
            )
        )
        # Every rank's gradient is whole already; the mean keeps ranks from drifting apart.
        self.weight.average_gradients_across_tp_domain = (  # type: ignore[attr-defined]
            group.size() > 1
        )
