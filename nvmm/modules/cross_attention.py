"""Gated cross-attention from the decoder to media: NVLM-X, NVLM-H, Flamingo's XATTN-Dense.

y = x + tanh(a) * XAttn(norm(x), keys), and where the block has a feed-forward part of its own
z = y + tanh(f) * FFN(norm(y)), with a and f 0 at the start: the language model is untouched
(Flamingo, arXiv:2204.14198, section 2.2; NVLM 1.0 section 3.3 names no details beyond it). Keys
have no positions and no causal mask; who sees what is `nvmm.modules.spans`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Parameter

from nvmm.config.choices import require
from nvmm.kernels.gated_residual import gated_residual
from nvmm.modules.spans import TextSees, span_attention
from nvmm.parallel.setup import default_device

Placement = Literal["inside", "before"]
Gate = Literal["scalar", "channel"]
_HEADS = ("num_attention_heads", "num_query_groups", "kv_channels")
_SIZES = (*_HEADS, "ffn_hidden_size", "kv_size")


@dataclass(frozen=True)
class CrossAttention:
    """The layers in which a decoder cross-attends to media, and the form of their blocks.

    Args:
        interval: one block for every `interval` layers of the decoder.
        offset: which layer of each group has it, from 0; None for the last one (Flamingo's rule).
        placement: "inside" a layer, between self-attention and FFN (NVLM's figure 3), or "before"
            the layer, as a block of its own (Flamingo).
        num_attention_heads, num_query_groups, kv_channels: heads, key-value heads and their width;
            None for the decoder's.
        gate: one number for the whole branch ("scalar") or one for every "channel".
        initial_gate: before the tanh.
        ffn_hidden_size: width of the block's own gated feed-forward part; None for none.
        activation_func: of that part, between its two linears; None for the decoder's own, with
            which it is a gated linear unit where the decoder's is.
        qk_norm: normalise queries and keys head by head. Products are scaled by 1 / sqrt(width),
            whatever the decoder's softmax_scale.
        kv_norm: normalise the media features first.
        kv_size: width of the media features; None for the decoder's.
        bias: biases of all the block's linears.
        text_sees: the images that ordinary text sees, see `nvmm.modules.spans.query_spans`.
    """

    interval: int = 1
    offset: int | None = None
    placement: Placement = "inside"
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    gate: Gate = "scalar"
    initial_gate: float = 0.0
    ffn_hidden_size: int | None = None
    activation_func: Callable[[Tensor], Tensor] | None = None
    qk_norm: bool = False
    kv_norm: bool = False
    kv_size: int | None = None
    bias: bool = False
    text_sees: TextSees = "preceding"

    def __post_init__(self) -> None:
        require("model.cross_attention.placement", self.placement, Placement)
        require("model.cross_attention.gate", self.gate, Gate)
        require("model.cross_attention.text_sees", self.text_sees, TextSees)
        if self.interval < 1 or not 0 <= (self.offset or 0) < self.interval:
            raise ValueError(
                f"model.cross_attention.interval={self.interval} must be at least 1, and"
                f" offset={self.offset} null or in [0, interval)"
            )
        for name in _SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"model.cross_attention.{name}={size} must be null or at least 1")
        if self.activation_func is not None and self.ffn_hidden_size is None:
            raise ValueError(
                "model.cross_attention.activation_func needs ffn_hidden_size: without it the blocks"
                " have no feed-forward part"
            )

    def is_at(self, layer: int) -> bool:
        """Return True when the decoder's layer of this index, from 0, has a block."""
        offset = self.interval - 1 if self.offset is None else self.offset
        return layer % self.interval == offset

    def sizes(self, config: TransformerConfig) -> tuple[int, int, int]:
        """Return heads, key-value heads and their width in a decoder of this config."""
        heads = self.num_attention_heads or config.num_attention_heads
        if self.num_query_groups is not None:
            groups = self.num_query_groups
        elif self.num_attention_heads is None:
            groups = config.num_query_groups or heads
        else:
            groups = heads
        width = self.kv_channels or config.kv_channels
        assert width is not None  # TransformerConfig derives it where it is not given
        return heads, groups, width

    def has_gated_linear_unit(self, config: TransformerConfig) -> bool:
        """Return True where the blocks' feed-forward part is one, in a decoder of this config."""
        return config.gated_linear_unit and self.activation_func is None

    def layers(
        self, plain: ModuleSpec, backend: BackendSpecProvider
    ) -> Callable[[int], ModuleSpec]:
        """Return a function from a layer's index to its spec: `plain`, or `plain` with a block."""
        block = ModuleSpec(module=GatedCrossAttention, params={"options": self, "backend": backend})
        attending = copy.deepcopy(plain)
        if self.placement == "inside":
            attending.submodules.cross_attention = block
        else:
            attending.module = BlockFirstLayer
            attending.params = attending.params | {"block": block}
        return lambda layer: attending if self.is_at(layer) else plain


class BlockFirstLayer(TransformerLayer):
    """A transformer layer with a cross-attention block in front of it.

    Args:
        block: spec of the cross-attention block.
    """

    def __init__(self, config: TransformerConfig, *args: Any, block: ModuleSpec, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.cross_attention_block = build_module(
            block,
            config=config,
            layer_number=self.layer_number,
            pg_collection=self.pg_collection,
        )

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = self.cross_attention_block(
            hidden_states,
            attention_mask=kwargs.get("context_mask"),
            key_value_states=kwargs.get("context"),
            inference_context=kwargs.get("inference_context"),
        )
        return super()._forward_attention(hidden_states, *args, **kwargs)


class GatedCrossAttention(MegatronModule):
    """One block: tensor-parallel heads, its own norms and gates, residual adds included.

    Args:
        config: the decoder's; its normalisation, activation, dropout and initialisation hold here.
        layer_number: of the decoder's layer, from 1.
        options: the block's form.
        backend: gives linears and norms.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        options: CrossAttention,
        backend: BackendSpecProvider,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp"])
        self.tp_group = pg_collection.tp
        self.layer_number = layer_number
        heads, groups, width = options.sizes(config)
        _check_heads(heads, groups, self.tp_group.size())
        self.num_groups = groups // self.tp_group.size()
        self.head_size = width

        norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
        eps, hidden = config.layernorm_epsilon, config.hidden_size
        self.input_norm = norm(config, hidden, eps)
        self.kv_size = options.kv_size or hidden
        self.kv_norm = norm(config, self.kv_size, eps) if options.kv_norm else None
        linear: dict[str, Any] = {
            "config": config,
            "bias": options.bias,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
        split_output = linear | {"init_method": config.init_method, "gather_output": False}
        self.linear_q = column(hidden, heads * width, **split_output)
        self.linear_kv = column(self.kv_size, 2 * groups * width, **split_output)
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            # Not q_layernorm: mcore sums over TP whatever has that name, by another part's flag.
            head_norm = backend.layer_norm(config.normalization == "RMSNorm", for_qk=True)
            self.q_norm = heads_per_rank(head_norm(config, width, eps))
            self.k_norm = heads_per_rank(head_norm(config, width, eps))
        self.linear_proj = row(
            heads * width,
            hidden,
            **linear,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
        )
        self.gate = self._gate(options)
        self.ffn = self.ffn_norm = None
        if options.ffn_hidden_size is not None:
            ffn_config = copy.copy(config)
            ffn_config.add_bias_linear = options.bias
            ffn_config.ffn_hidden_size = options.ffn_hidden_size
            ffn_config.gated_linear_unit = options.has_gated_linear_unit(config)
            if options.activation_func is not None:
                ffn_config.activation_func = options.activation_func
            linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
            self.ffn_norm = norm(config, hidden, eps)
            self.ffn = MLP(
                ffn_config,
                linears,
                ffn_hidden_size=options.ffn_hidden_size,
                tp_group=self.tp_group,
            )
            self.ffn_gate = self._gate(options)

    def _gate(self, options: CrossAttention) -> Parameter:
        size = 1 if options.gate == "scalar" else self.config.hidden_size
        gate = Parameter(
            torch.full(
                (size,),
                options.initial_gate,
                dtype=self.config.params_dtype,
                device=default_device(self.config),
            )
        )
        gate.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return gate

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
    ) -> Tensor:
        """Add to each hidden state its attention over the media that its position sees.

        Args:
            hidden_states: [s, b, h], [s / tp, b, h] under sequence parallelism.
            attention_mask: spans, int32 [s, b, 2] on the host; None when there are no media.
            key_value_states: media [m, b, h], key n at (n // b, n % b), split over TP along m like
                the hidden states; None without media, and in decoding after the prompt.
            inference_context: mcore's KV cache; it keeps the prompt's keys and values.

        Returns: like `hidden_states`; rows that see nothing come back as they were.
        """
        # 1. Keys and values [m * b, groups / tp, d]; without any the block has nothing to add.
        keys = self._keys(key_value_states, inference_context)
        seen = None if attention_mask is None else attention_mask[..., 0] < attention_mask[..., 1]
        if keys is None or attention_mask is None or seen is None or not bool(seen.any()):
            return self._idle(hidden_states)
        # 2. Queries [s, b, heads / tp, d], gathered over the sequence under sequence parallelism.
        query, _ = self.linear_q(self.input_norm(hidden_states))
        query = query.unflatten(-1, (-1, self.head_size))
        if self.q_norm is not None:
            query = self.q_norm(query)
        # 3. Attention over the spans and its projection [s, b, h], [s / tp, b, h] with SP.
        attended, _ = self.linear_proj(self._attend(query, *keys, attention_mask))
        # 4. The gated residual, only in rows that see something: a bias must not reach the others.
        if self.config.sequence_parallel:
            seen = seen.chunk(self.tp_group.size())[self.tp_group.rank()]
        mask = seen.to(attended)
        hidden = self._add(hidden_states, attended, self.gate, mask)
        if self.ffn is None:
            return hidden
        # 5. The block's own feed-forward part, in the same rows.
        out, bias = self.ffn(self.ffn_norm(hidden))  # type: ignore[misc]
        return self._add(hidden, out, self.ffn_gate, mask, bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Tensor) -> Tensor:
        """Attend over spans; with selective recompute backward does it again."""
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = functools.partial(span_attention, spans=spans, dropout=dropout)
        # Ranks hold different heads and need different masks, as in CoreAttention.
        fork = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            if self.training and self.config.recompute_granularity == "selective":
                out: Tensor = tensor_parallel.checkpoint(attend, False, query, key, value)
                return out
            return attend(query, key, value)

    def _add(
        self,
        hidden: Tensor,
        branch: Tensor,
        gate: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Add tanh(gate) * (branch + bias) to the rows of `hidden` whose mask [s, b] is 1."""
        dropout = self.config.hidden_dropout
        if not (dropout and self.training):
            return gated_residual(hidden, branch, gate, bias, mask, tanh=True)
        branch = gated_residual(torch.zeros_like(branch), branch, gate, bias, mask, tanh=True)
        return hidden + torch.nn.functional.dropout(branch, dropout, self.training)

    def _keys(self, media: Tensor | None, inference_context: Any) -> tuple[Tensor, Tensor] | None:
        """Return keys and values [n, groups / tp, d], from the cache after the prompt."""
        memory = None if inference_context is None else inference_context.key_value_memory_dict
        name = f"cross_attention.{self.layer_number}"
        if media is None:
            return None if memory is None else memory.get(name)
        media = media[..., : self.kv_size]
        if self.kv_norm is not None:
            media = self.kv_norm(media)
        both, _ = self.linear_kv(media)
        both = both.flatten(0, 1).unflatten(-1, (self.num_groups, 2, self.head_size))
        key, value = both.unbind(-2)
        if self.k_norm is not None:
            key = self.k_norm(key)
        if memory is not None:
            memory[name] = (key, value)
        return key, value

    def _idle(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, tied to the block's parameters at weight 0.

        Overlapped gradient reduction waits for a gradient of each in every last micro-batch, and
        the trainer's check of the first step asks for one of each parameter of a called module.
        """
        if not (self.training and torch.is_grad_enabled()):
            return hidden
        trained = [p.sum() for p in self.parameters() if p.requires_grad]
        return hidden + 0 * torch.stack(trained).sum() if trained else hidden


def heads_per_rank(norm: Any) -> Any:
    """Mark a norm of heads: a TP rank has the gradient of its own heads, and ranks sum them."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = False
        parameter.sum_gradients_over_tensor_parallel = True
    return norm


def _check_heads(heads: int, groups: int, tensor_parallel_size: int) -> None:
    if heads % groups:
        raise ValueError(
            f"model.cross_attention.num_attention_heads={heads} must be a multiple of"
            f" num_query_groups={groups}"
        )
    if groups % tensor_parallel_size:
        raise ValueError(
            f"model.cross_attention.num_query_groups={groups} must be a multiple of"
            f" parallel.tensor_model_parallel_size={tensor_parallel_size}"
        )
