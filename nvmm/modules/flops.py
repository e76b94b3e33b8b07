"""Model FLOPs of a training step. Plain arithmetic.

Counted are the matrix multiplications the model needs: not recomputed activations, norms, RoPE,
element-wise work or the embedding look-up. With `causal_attention_factor=1` the counter reproduces
the MFU that Nemotron-4 prints (2406.11704 Table 2, 2402.16819 Table 2), which counts the whole
attention square.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvmm.batch import Batch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

PARTS = ("language", "vision", "connector", "cross_attention")
# Times the forward cost. A trained part computes both gradients; a frozen one behind which
# something trains computes only the gradient of its input. Attention has no weights of its own.
_LINEAR_COST = {"trained": 3, "passed": 2, "frozen": 1}
_ATTENTION_COST = {"trained": 3, "passed": 3, "frozen": 1}


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
    training: str = "trained",
    causal_attention_factor: float = 0.5,
) -> float:
    """Matrix-multiply FLOPs of a decoder with an output layer over some sequences.

    Args:
        segment_lengths: tokens of each sequence; attention is quadratic in each of them apart.
        training: "trained", "passed" (frozen, but gradients pass through) or "frozen" (forward).
        causal_attention_factor: the share of the attention square that a causal mask leaves;
            1 counts it whole, as Nemotron-4's reports do.
    """
    layers = _transformer_flops(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        ffn_hidden_size=ffn_hidden_size,
        gated_linear_unit=gated_linear_unit,
        segment_lengths=segment_lengths,
        training=training,
        attention_factor=causal_attention_factor,
    )
    logits = 2.0 * hidden_size * vocab_size * sum(segment_lengths)
    return layers + logits * _LINEAR_COST[training]


def vision_flops(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    gated_linear_unit: bool,
    image_size: int,
    patch_size: int,
    class_token: bool,
    num_tiles: int,
    training: str = "frozen",
) -> float:
    """Matrix-multiply FLOPs of a ViT (patch embedding, bidirectional layers) over some tiles."""
    patches = (image_size // patch_size) ** 2
    embedding = 2.0 * 3 * patch_size**2 * hidden_size * patches * num_tiles
    layers = _transformer_flops(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        ffn_hidden_size=ffn_hidden_size,
        gated_linear_unit=gated_linear_unit,
        segment_lengths=[patches + class_token] * num_tiles,
        training=training,
        attention_factor=1.0,
    )
    return layers + embedding * _LINEAR_COST[training]


def connector_flops(
    *,
    input_size: int,
    hidden_size: int | None,
    output_size: int,
    num_tokens: int,
    training: str = "trained",
) -> float:
    """FLOPs of an MLP connector: two linears through `hidden_size`, or one where it is None."""
    if hidden_size is None:
        weights = input_size * output_size
    else:
        weights = (input_size + output_size) * hidden_size
    return 2.0 * weights * num_tokens * _LINEAR_COST[training]


def latent_attention_flops(
    *,
    num_latents: int,
    num_heads: int,
    head_dim: int,
    ffn_hidden_size: int,
    hidden_size: int,
    num_tokens: int,
    training: str = "trained",
) -> float:
    """Matrix-multiply FLOPs of NV-Embed's latent attention over the pooled tokens of a batch.

    Keys and values are the latents', computed once, whatever the number of tokens.
    """
    inner = num_heads * head_dim
    linear = hidden_size * (2 * inner + 3 * ffn_hidden_size) * num_tokens
    linear += 2 * hidden_size * inner * num_latents
    attention = 4.0 * inner * num_latents * num_tokens
    return 2.0 * linear * _LINEAR_COST[training] + attention * _ATTENTION_COST[training]


def cross_attention_flops(
    *,
    num_blocks: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int | None,
    gated_linear_unit: bool,
    num_queries: int,
    num_keys: int,
    num_pairs: int,
    training: str = "trained",
) -> float:
    """Matrix-multiply FLOPs of cross-attention blocks over one micro-batch with media.

    Args:
        num_queries: positions of the decoder; num_keys: media features and tags that are read.
        num_pairs: (query, key) pairs in which the query sees the key.
        ffn_hidden_size: of the blocks' own feed-forward part; None for none.
    """
    query, key_value = num_attention_heads * kv_channels, 2 * num_query_groups * kv_channels
    mlp = hidden_size * (ffn_hidden_size or 0) * (3 if gated_linear_unit else 2)
    linear = hidden_size * ((2 * query + mlp // hidden_size) * num_queries + key_value * num_keys)
    attention = 4.0 * query * num_pairs
    return num_blocks * (
        2.0 * linear * _LINEAR_COST[training] + attention * _ATTENTION_COST[training]
    )


def flops_per_step(
    language: TransformerConfig,
    vision: TransformerConfig | None = None,
    *,
    vocab_size: int,
    segment_lengths: Sequence[int],
    num_tiles: int = 0,
    image_size: int = 448,
    patch_size: int = 14,
    class_token: bool = True,
    downsample: int = 2,
    connector_hidden_size: int | None = None,
    trained: Collection[str] = PARTS,
    adapted: Collection[str] = (),
    causal_attention_factor: float = 0.5,
    cross_attention: Mapping[str, int | None] | None = None,
) -> dict[str, float]:
    """Model FLOPs of one micro-batch, forward and backward, over the whole model (all stages).

    Args:
        language, vision: the parts' configs with the whole model's sizes; vision None: text only.
        vocab_size: columns of the output layer that count.
        segment_lengths: valid tokens of each sequence (`segment_lengths(batch)`).
        num_tiles: tiles that pass the encoder.
        image_size, patch_size, class_token: the encoder's input, as in its YAML.
        downsample, connector_hidden_size: as in the connector's YAML.
        trained: which of PARTS have trainable parameters; none for a forward pass alone.
        adapted: those of them that train adapters alone: their weights need no gradients. The
            adapters' own FLOPs are not counted.
        cross_attention: sizes and counts of `cross_attention_flops`, but those that the decoder
            gives; None for none.

    Returns: {"language": ..., "vision": ...}; the connector counts as vision, cross-attention as
    language.
    """
    if unknown := set(trained) - set(PARTS):
        raise ValueError(f"trained={sorted(unknown)} must be among {', '.join(PARTS)}")
    behind = num_tiles > 0 and ("vision" in trained or "connector" in trained)
    modes = {
        "vision": _mode("vision" in trained, False),
        "connector": _mode("connector" in trained, "vision" in trained),
        "language": _mode("language" in trained, behind or "cross_attention" in trained),
        "cross_attention": _mode("cross_attention" in trained, behind or "language" in trained),
    }
    modes |= {part: "passed" for part in modes if part in trained and part in adapted}
    flops = {
        "language": language_flops(
            **_sizes(language),
            vocab_size=vocab_size,
            segment_lengths=segment_lengths,
            training=modes["language"],
            causal_attention_factor=causal_attention_factor,
        ),
        "vision": 0.0,
    }
    if cross_attention is not None:
        flops["language"] += cross_attention_flops(
            **cross_attention,  # type: ignore[arg-type]
            hidden_size=language.hidden_size,
            gated_linear_unit=language.gated_linear_unit,
            num_queries=sum(segment_lengths),
            training=modes["cross_attention"],
        )
    if vision is not None and num_tiles:
        tokens = (image_size // patch_size // downsample) ** 2 * num_tiles
        flops["vision"] = vision_flops(
            **_sizes(vision),
            image_size=image_size,
            patch_size=patch_size,
            class_token=class_token,
            num_tiles=num_tiles,
            training=modes["vision"],
        ) + connector_flops(
            input_size=vision.hidden_size * downsample**2,
            hidden_size=connector_hidden_size,
            output_size=language.hidden_size,
            num_tokens=tokens,
            training=modes["connector"],
        )
    return flops


def segment_lengths(batch: Batch) -> list[int]:
    """Valid tokens of each sequence: rows without padding, or the segments of a packed row."""
    return [length for length in batch.lengths.tolist() if length]


def _transformer_flops(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    gated_linear_unit: bool,
    segment_lengths: Sequence[int],
    training: str,
    attention_factor: float,
) -> float:
    query = num_attention_heads * kv_channels
    key_value = 2 * num_query_groups * kv_channels
    mlp = hidden_size * ffn_hidden_size * (3 if gated_linear_unit else 2)
    weights = hidden_size * (query + key_value) + query * hidden_size + mlp
    linear = 2.0 * weights * sum(segment_lengths)
    attention = 4.0 * query * attention_factor * sum(n * n for n in segment_lengths)
    return num_layers * (linear * _LINEAR_COST[training] + attention * _ATTENTION_COST[training])


def _sizes(config: TransformerConfig) -> dict[str, Any]:
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


def _mode(trained: bool, passed: bool) -> str:
    return "trained" if trained else "passed" if passed else "frozen"
