"""Model FLOPs of a training step. Plain arithmetic.

Counted are the matrix multiplications the model needs: not recomputed activations, norms, RoPE,
element-wise work or the embedding look-up. With `causal_attention_factor=1` the counter reproduces
the MFU that Nemotron-4 prints (2406.11704 Table 2, 2402.16819 Table 2), which counts the whole
attention square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Module

from nvmm.batch import Batch
from nvmm.modules.lora import only_adapters_train

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

Training = Literal["trained", "passed", "frozen"]
"""A part is trained, or frozen with gradients that pass through it, or only runs forward."""
# Times the forward cost. A trained part computes both gradients; a frozen one behind which
# something trains computes only the gradient of its input. Attention has no weights of its own.
LINEAR_COST = {"trained": 3, "passed": 2, "frozen": 1}
ATTENTION_COST = {"trained": 3, "passed": 3, "frozen": 1}


def language_flops(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    gated_linear_unit: bool,
    vocab_size: int,
    segment_lengths: Sequence[int],
    windows: Sequence[int | None] = (),
    training: Training = "trained",
    causal_attention_factor: float = 0.5,
) -> float:
    """Count matrix-multiply FLOPs of a decoder with an output layer over some sequences.

    Args:
        windows: keys that a query of each layer sees at most, None for all; empty without windows.
        segment_lengths: tokens of each sequence; attention is quadratic in each of them apart.
        training: "trained", "passed" (frozen, but gradients pass through) or "frozen" (forward).
        causal_attention_factor: the share of the attention square that a causal mask leaves;
            1 counts it whole, as Nemotron-4's reports do.
    """
    layers = transformer_flops(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        ffn_hidden_size=ffn_hidden_size,
        gated_linear_unit=gated_linear_unit,
        segment_lengths=segment_lengths,
        windows=windows,
        training=training,
        attention_factor=causal_attention_factor,
    )
    logits = 2.0 * hidden_size * vocab_size * sum(segment_lengths)
    return layers + logits * LINEAR_COST[training]


def encoder_flops(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    gated_linear_unit: bool,
    num_tokens: int,
    front_end: float,
    num_tiles: int,
    training: Training = "frozen",
) -> float:
    """Count matrix-multiply FLOPs of an encoder of bidirectional layers over some tiles.

    num_tokens: of a tile, a class token among them; front_end: forward FLOPs of what turns a tile
    into tokens (a ViT's patch embedding, Whisper's convolutions).
    """
    layers = transformer_flops(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        ffn_hidden_size=ffn_hidden_size,
        gated_linear_unit=gated_linear_unit,
        segment_lengths=[num_tokens] * num_tiles,
        training=training,
        attention_factor=1.0,
    )
    return layers + front_end * num_tiles * LINEAR_COST[training]


def connector_flops(
    *,
    input_size: int,
    hidden_size: int | None,
    output_size: int,
    num_tokens: int,
    training: Training = "trained",
) -> float:
    """Count FLOPs of an MLP connector: two linears through `hidden_size`, or one for None."""
    if hidden_size is None:
        weights = input_size * output_size
    else:
        weights = (input_size + output_size) * hidden_size
    return 2.0 * weights * num_tokens * LINEAR_COST[training]


def latent_attention_flops(
    *,
    num_latents: int,
    num_heads: int,
    head_dim: int,
    ffn_hidden_size: int,
    hidden_size: int,
    num_tokens: int,
    training: Training = "trained",
) -> float:
    """Count matrix-multiply FLOPs of NV-Embed's latent attention over a batch's pooled tokens.

    Keys and values are the latents', computed once, whatever the number of tokens.
    """
    inner = num_heads * head_dim
    linear = hidden_size * (2 * inner + 3 * ffn_hidden_size) * num_tokens
    linear += 2 * hidden_size * inner * num_latents
    attention = 4.0 * inner * num_latents * num_tokens
    return 2.0 * linear * LINEAR_COST[training] + attention * ATTENTION_COST[training]


def cross_attention_flops(
    *,
    num_blocks: int,
    hidden_size: int,
    kv_size: int | None = None,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int | None,
    gated_linear_unit: bool,
    num_queries: int,
    num_keys: int,
    num_pairs: int,
    training: Training = "trained",
) -> float:
    """Count matrix-multiply FLOPs of cross-attention blocks over one micro-batch with media.

    Args:
        num_queries: positions of the decoder; num_keys: media features and tags that are read.
        num_pairs: (query, key) pairs in which the query sees the key.
        kv_size: width of what is read; None for hidden_size.
        ffn_hidden_size: of the blocks' own feed-forward part; None for none.
    """
    query, key_value = num_attention_heads * kv_channels, 2 * num_query_groups * kv_channels
    mlp = hidden_size * (ffn_hidden_size or 0) * (3 if gated_linear_unit else 2)
    linear = (2 * query * hidden_size + mlp) * num_queries
    linear += (kv_size or hidden_size) * key_value * num_keys
    attention = 4.0 * query * num_pairs
    return num_blocks * (
        2.0 * linear * LINEAR_COST[training] + attention * ATTENTION_COST[training]
    )


def training_of(module: Module, *, behind: bool) -> Training:
    """Return how the gradients reach a module.

    behind: True when something in front of it is trained, so that gradients pass through it.
    """
    if only_adapters_train(module):
        return "passed"  # its weights need no gradients; the adapters' own FLOPs are not counted
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return "trained" if trained else "passed" if behind else "frozen"


def segment_lengths(batch: Batch) -> list[int]:
    """List the valid tokens of each sequence: rows without padding, or a packed row's segments."""
    return [length for length in batch.lengths.tolist() if length]


def transformer_flops(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    gated_linear_unit: bool,
    segment_lengths: Sequence[int],
    training: Training,
    attention_factor: float,
    windows: Sequence[int | None] = (),
) -> float:
    query = num_attention_heads * kv_channels
    key_value = 2 * num_query_groups * kv_channels
    mlp = hidden_size * ffn_hidden_size * (3 if gated_linear_unit else 2)
    weights = hidden_size * (query + key_value) + query * hidden_size + mlp
    linear = 2.0 * weights * sum(segment_lengths)
    attention = 0.0
    for window in windows or [None] * num_layers:
        # A window takes off the triangle of keys that lie further back than it reaches.
        outside = [0 if window is None else max(0, n - window) for n in segment_lengths]
        pairs = sum(n * n - far * far for n, far in zip(segment_lengths, outside, strict=True))
        attention += 4.0 * query * attention_factor * pairs
    return num_layers * linear * LINEAR_COST[training] + attention * ATTENTION_COST[training]


def sizes(config: TransformerConfig) -> dict[str, Any]:
    """Return the sizes of a transformer that the functions above take."""
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": config.num_query_groups or heads,
        "kv_channels": config.kv_channels or config.hidden_size // heads,
        "ffn_hidden_size": config.ffn_hidden_size or 4 * config.hidden_size,
        "gated_linear_unit": config.gated_linear_unit,
    }
