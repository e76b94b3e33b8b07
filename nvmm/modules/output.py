"""The output layer's loss without its logits, over a vocabulary that tensor parallelism shares."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nvmm.kernels.library import fused
from nvmm.kernels.linear_cross_entropy import linear_cross_entropy


def fused_loss(
    layer: ColumnParallelLinear,
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    weight: Tensor | None = None,
) -> Tensor | None:
    """Return the cross-entropy of each token, float32 [b, s]; None where it needs the logits.

    Args:
        layer: the output layer, split over the vocabulary.
        hidden: [s, b, h]; under sequence parallelism this rank's share of s.
        labels: int64 [b, s].
        vocab_size: ids that are real; the weight's rows behind them take no part.
        weight: the tied embedding's, where the layer has none.
    """
    weight = layer.weight if weight is None else weight
    # A module that replaces the layer (Transformer Engine) or an adapter on it needs its forward.
    plain = type(layer) is ColumnParallelLinear and layer.bias is None and not layer._forward_hooks
    if not plain:
        return None
    # mcore's loss is float32; that of a proof in double precision is not.
    if hidden.dtype != torch.float64 and not fused("linear_cross_entropy", hidden, weight):
        return None
    if layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=layer.tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=layer.tp_group)
    loss = linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.t().flatten(),
        vocab_size=vocab_size,
        group=layer.tp_group if layer.tp_group.size() > 1 else None,
        into_main_grad=layer.gradient_accumulation_fusion and hasattr(weight, "main_grad"),
    )
    return loss.view(labels.shape[::-1]).t().contiguous()
