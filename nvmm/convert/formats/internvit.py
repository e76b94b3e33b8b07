"""InternViT 6B and 300M in the names of OpenGVLab's folders; NVLM-D's has them too.

The 6B has RMSNorm, QK-norm and no QKV bias; the 300M LayerNorm, QKV bias and no QK-norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import GELU, known, need, only, transformer, whole
from nvmm.convert.mapping import DummyHeads, FusedQKV, Rename, Reshape, Row, expand

NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
_DEFAULTS = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
}
"""Sizes that OpenGVLab's class has where config.json leaves them out."""
NUM_DUMMY_HEADS = "num_dummy_heads"
"""A key that OpenGVLab's config.json lacks; `complete` finds its value in the shapes."""

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "num_channels", "hidden_act", "norm_type", "layer_norm_eps"),
    *("qkv_bias", "qk_normalization", "initializer_factor", NUM_DUMMY_HEADS),
    # Of experts, which use_moe turns on.
    *("use_moe", "num_experts", "num_routed_experts", "num_shared_experts", "capacity_factor"),
    *("eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio", "moe_intermediate_size"),
    *("moe_output_scale", "noisy_gate_policy", "shared_expert_intermediate_size"),
    *("use_residual", "use_rts", "use_weighted_residual"),
)


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config."""
    known(hf, *_FIELDS)
    hf = {**_DEFAULTS, **hf}
    only(hf, "hidden_act", "gelu")
    only(hf, "num_channels", 3)
    only(hf, "use_moe", False)
    heads = need(hf, "num_attention_heads")
    return {
        "_target_": "nvmm.modules.encoders.vision.VisionTransformer",
        "_partial_": True,
        "transformer": transformer(
            num_layers=need(hf, "num_hidden_layers"),
            hidden_size=need(hf, "hidden_size"),
            num_attention_heads=heads,
            kv_channels=need(hf, "hidden_size") // heads,
            ffn_hidden_size=need(hf, "intermediate_size"),
            normalization=NORMS[only(hf, "norm_type", "rms_norm", "layer_norm")],
            layernorm_epsilon=hf.get("layer_norm_eps", 1e-6),
            activation_func=GELU,
            add_bias_linear=True,
            add_qkv_bias=bool(hf.get("qkv_bias", False)),
            # The published initializer_range, 1e-10, is not what anyone starts from.
            init_method_std=0.02,
        ),
        "image_size": need(hf, "image_size"),
        "patch_size": need(hf, "patch_size"),
        "qk_norm": "joint" if hf.get("qk_normalization", True) else None,
        "layer_scale": hf.get("initializer_factor", 0.1),
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json."""
    if "patch_size" not in model:
        raise ValueError("--format internvit is an encoder; name it with --part vision")
    full = whole(model)
    config = full["transformer"]
    names = {ours: theirs for theirs, ours in NORMS.items()}
    hf = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_channels": 3,
        "image_size": full["image_size"],
        "patch_size": full["patch_size"],
        "hidden_act": "gelu",
        "norm_type": names[config["normalization"]],
        "layer_norm_eps": config["layernorm_epsilon"],
        "qk_normalization": full["qk_norm"] == "joint",
        "qkv_bias": config["add_qkv_bias"],
        "initializer_factor": full["layer_scale"],
        "initializer_range": config.get("init_method_std", 0.02),
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    decoder.expressible(model, to_model(hf), "internvit")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Add the number of dummy heads that the fused QKV has rows for to config.json."""
    filled = {**_DEFAULTS, **hf}
    qkv = spec.get(f"{prefix}encoder.layers.0.attn.qkv.weight")
    heads = need(filled, "num_attention_heads")
    head_dim = need(filled, "hidden_size") // heads
    dummies = 0
    if qkv is not None and qkv.dim() == 2:
        dummies = max(qkv.shape[0] // (3 * head_dim) - heads, 0)
    return {**hf, NUM_DUMMY_HEADS: dummies}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder."""
    full = whole(model)
    config = full["transformer"]
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    dummies = hf.get(NUM_DUMMY_HEADS, 0)
    layer, theirs = "decoder.layers.*.", "encoder.layers.*."
    width = config["hidden_size"]
    # 1. The embeddings and LayerScale.
    rows = [
        Row("class_token", ("embeddings.class_embedding",)),
        Row("conv1.weight", ("embeddings.patch_embedding.weight",)),
        Row("conv1.bias", ("embeddings.patch_embedding.bias",)),
        Row(
            "position_embeddings.weight",
            ("embeddings.position_embedding",),
            Reshape((-1, width), (1, -1, width)),
        ),
        Row(f"{layer}ls1", (f"{theirs}ls1",)),
        Row(f"{layer}ls2", (f"{theirs}ls2",)),
    ]
    # 2. The norms, under the names that mcore's have where they are fused with the next linear.
    norm_kinds = ["weight"] if config["normalization"] == "RMSNorm" else ["weight", "bias"]
    for kind in norm_kinds:
        rows += [
            Row(f"{layer}self_attention.linear_qkv.layer_norm_{kind}", (f"{theirs}norm1.{kind}",)),
            Row(f"{layer}mlp.linear_fc1.layer_norm_{kind}", (f"{theirs}norm2.{kind}",)),
        ]
    # 3. Attention, without the zero heads that NVLM-D's folder has behind the real ones.
    for kind in ["weight", "bias"] if config["add_qkv_bias"] else ["weight"]:
        rows.append(
            Row(
                f"{layer}self_attention.linear_qkv.{kind}",
                (f"{theirs}attn.qkv.{kind}",),
                FusedQKV(heads, head_dim, dummies),
            )
        )
    if full["qk_norm"] == "joint":
        rows += [
            Row(
                f"{layer}self_attention.{x}_norm.weight",
                (f"{theirs}attn.{x}_norm.weight",),
                DummyHeads(0, heads, head_dim, dummies),
            )
            for x in "qk"
        ]
    rows += [
        Row(
            f"{layer}self_attention.linear_proj.weight",
            (f"{theirs}attn.proj.weight",),
            DummyHeads(1, heads, head_dim, dummies),
        ),
        Row(f"{layer}self_attention.linear_proj.bias", (f"{theirs}attn.proj.bias",), Rename()),
    ]
    # 4. The MLP.
    for kind in ("weight", "bias"):
        rows += [
            Row(f"{layer}mlp.linear_fc1.{kind}", (f"{theirs}mlp.fc1.{kind}",)),
            Row(f"{layer}mlp.linear_fc2.{kind}", (f"{theirs}mlp.fc2.{kind}",)),
        ]
    return expand(rows, config["num_layers"])
