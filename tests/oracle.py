"""Weights of tiny random Hugging Face models under our names, to compare outputs with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """q [heads * d, ...], k and v [groups * d, ...] -> rows grouped as mcore's fused QKV."""
    parts = [x.reshape(num_groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def load(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Set every parameter by its global name; none may be missing or left over."""
    from nvmm.parallel.parameters import sharded_parameters

    rest = dict(weights)
    with torch.no_grad():
        for sharded in sharded_parameters(model):
            value = rest.pop(sharded.name)
            if len(value) < len(sharded.parameter) and sharded.name.endswith(
                ("word_embeddings.weight", "output_layer.weight")
            ):
                # Rows that pad the vocabulary must not matter, whatever they hold.
                padding = sharded.parameter.new_full(sharded.parameter[len(value) :].shape, 3.0)
                value = torch.cat([value, padding])
            assert sharded.parameter.shape == value.shape, sharded.name
            sharded.parameter.copy_(value)
    assert not rest, f"unused: {sorted(rest)}"


def randomize(model: torch.nn.Module, std: float = 0.2) -> None:
    """Give a Hugging Face model weights that make every parameter visible in its output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + (parameter if parameter.dim() == 1 else 0))
    model.eval()


def decoder_weights(hf: Any, prefix: str = "", source: str = "model.") -> dict[str, Tensor]:
    """Qwen2's or Llama's weights under the names of LanguageModel."""
    state = hf.state_dict()
    groups = getattr(hf.config, "text_config", hf.config).num_key_value_heads
    out = {
        "embedding.word_embeddings.weight": state[f"{source}embed_tokens.weight"],
        "decoder.final_layernorm.weight": state[f"{source}norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    layers = getattr(hf.config, "text_config", hf.config).num_hidden_layers
    for i in range(layers):
        here, there = f"decoder.layers.{i}.", f"{source}layers.{i}."
        for kind in ("weight", "bias"):
            if f"{there}self_attn.q_proj.{kind}" in state:
                out[f"{here}self_attention.linear_qkv.{kind}"] = fuse_qkv(
                    *(state[f"{there}self_attn.{x}_proj.{kind}"] for x in "qkv"), groups
                )
        gate, up = (state[f"{there}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        out |= {
            f"{here}self_attention.linear_qkv.layer_norm_weight": state[
                f"{there}input_layernorm.weight"
            ],
            f"{here}self_attention.linear_proj.weight": state[f"{there}self_attn.o_proj.weight"],
            f"{here}mlp.linear_fc1.layer_norm_weight": state[
                f"{there}post_attention_layernorm.weight"
            ],
            f"{here}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{here}mlp.linear_fc2.weight": state[f"{there}mlp.down_proj.weight"],
        }
    return {prefix + name: value for name, value in out.items()}


def internvit_weights(
    state: dict[str, Tensor], num_layers: int, num_heads: int, source: str = "", prefix: str = ""
) -> dict[str, Tensor]:
    """InternVLVisionModel's weights under the names of VisionTransformer."""
    embeddings = f"{source}embeddings."
    out = {
        "class_token": state[f"{embeddings}cls_token"],
        "conv1.weight": state[f"{embeddings}patch_embeddings.projection.weight"],
        "conv1.bias": state[f"{embeddings}patch_embeddings.projection.bias"],
        "position_embeddings.weight": state[f"{embeddings}position_embeddings"][0],
    }
    renamed = {
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "layernorm_before.weight": "self_attention.linear_qkv.layer_norm_weight",
        "layernorm_before.bias": "self_attention.linear_qkv.layer_norm_bias",
        "layernorm_after.weight": "mlp.linear_fc1.layer_norm_weight",
        "layernorm_after.bias": "mlp.linear_fc1.layer_norm_bias",
        "attention.q_norm.weight": "self_attention.q_norm.weight",
        "attention.k_norm.weight": "self_attention.k_norm.weight",
        "attention.projection_layer.weight": "self_attention.linear_proj.weight",
        "attention.projection_layer.bias": "self_attention.linear_proj.bias",
        "mlp.fc1.weight": "mlp.linear_fc1.weight",
        "mlp.fc1.bias": "mlp.linear_fc1.bias",
        "mlp.fc2.weight": "mlp.linear_fc2.weight",
        "mlp.fc2.bias": "mlp.linear_fc2.bias",
    }
    for i in range(num_layers):
        here, there = f"decoder.layers.{i}.", f"{source}encoder.layer.{i}."
        for old, new in renamed.items():
            if there + old in state:
                out[here + new] = state[there + old]
        for kind in ("weight", "bias"):
            if f"{there}attention.q_proj.{kind}" in state:
                out[f"{here}self_attention.linear_qkv.{kind}"] = fuse_qkv(
                    *(state[f"{there}attention.{x}_proj.{kind}"] for x in "qkv"), num_heads
                )
    return {prefix + name: value for name, value in out.items()}


def clip_weights(state: dict[str, Tensor], num_layers: int, num_heads: int) -> dict[str, Tensor]:
    """CLIPVisionModel's or SiglipVisionModel's weights under the names of VisionTransformer."""
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    out = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "position_embeddings.weight": state["embeddings.position_embedding.weight"],
    }
    if "embeddings.class_embedding" in state:
        out["class_token"] = state["embeddings.class_embedding"].view(1, 1, -1)
        out |= {f"ln_pre.{kind}": state[f"pre_layrnorm.{kind}"] for kind in ("weight", "bias")}
    else:
        out["conv1.bias"] = state["embeddings.patch_embedding.bias"]
        out |= {
            f"decoder.final_layernorm.{kind}": state[f"post_layernorm.{kind}"]
            for kind in ("weight", "bias")
        }
    for i in range(num_layers):
        here, there = f"decoder.layers.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            out |= {
                f"{here}self_attention.linear_qkv.{kind}": fuse_qkv(
                    *(state[f"{there}self_attn.{x}_proj.{kind}"] for x in "qkv"), num_heads
                ),
                f"{here}self_attention.linear_proj.{kind}": state[
                    f"{there}self_attn.out_proj.{kind}"
                ],
                f"{here}self_attention.linear_qkv.layer_norm_{kind}": state[
                    f"{there}layer_norm1.{kind}"
                ],
                f"{here}mlp.linear_fc1.layer_norm_{kind}": state[f"{there}layer_norm2.{kind}"],
                f"{here}mlp.linear_fc1.{kind}": state[f"{there}mlp.fc1.{kind}"],
                f"{here}mlp.linear_fc2.{kind}": state[f"{there}mlp.fc2.{kind}"],
            }
    return out
