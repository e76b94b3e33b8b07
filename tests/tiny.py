"""Tiny models as plain configs, as a composed YAML would give them."""

from __future__ import annotations

import copy
from typing import Any

TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"


def method(path: str) -> dict[str, str]:
    return {"_target_": "hydra.utils.get_method", "path": path}


def language(**changes: Any) -> dict[str, Any]:
    """A Qwen2-like decoder: GQA, SwiGLU, RMSNorm, QKV bias, an odd vocabulary."""
    return {
        "_target_": "nvmm.models.language.LanguageModel",
        "_partial_": True,
        "transformer": {
            "_target_": TRANSFORMER,
            "_partial_": True,
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "ffn_hidden_size": 96,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-6,
            "gated_linear_unit": True,
            "activation_func": method("torch.nn.functional.silu"),
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": 0.1,
        },
        "vocab_size": 509,
        "padded_vocab_size": 512,
        "rotary_base": 10000,
        **changes,
    }


def multimodal(**changes: Any) -> dict[str, Any]:
    """NVLM-D in small: a 5-head InternViT with joint QK-norm and LayerScale, a two-layer MLP."""
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language(),
        "vision": {
            "_target_": "nvmm.modules.encoders.vision.VisionTransformer",
            "_partial_": True,
            "transformer": {
                "_target_": TRANSFORMER,
                "_partial_": True,
                "num_layers": 2,
                "hidden_size": 80,
                "num_attention_heads": 5,
                "kv_channels": 16,
                "ffn_hidden_size": 128,
                "normalization": "RMSNorm",
                "layernorm_epsilon": 1e-6,
                "activation_func": method("torch.nn.functional.gelu"),
                "add_bias_linear": True,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "init_method_std": 0.1,
            },
            "image_size": 16,
            "patch_size": 4,
            "qk_norm": "joint",
            "layer_scale": 0.1,
        },
        "connector": {
            "_target_": "nvmm.modules.connector.MLPConnector",
            "_partial_": True,
            "downsample": 2,
            "hidden_size": 96,
        },
        **changes,
    }


def vila() -> dict[str, Any]:
    """VILA 1.5 in small: SigLIP's block on 3 x 3 patches of 14 pixels, two of them beside it, a
    padded grid, and Llama; every image is 4 tokens."""
    model = multimodal()
    model["language"]["transformer"]["add_qkv_bias"] = False
    model["vision"] |= {
        "image_size": 14,
        "qk_norm": None,
        "layer_scale": None,
        "class_token": False,
    }
    model["vision"]["transformer"] |= {"normalization": "LayerNorm", "add_qkv_bias": True}
    model["connector"] |= {"bias": True, "pad_grid": True, "token_order": "columns"}
    return model


def embedder(pooling: str = "LatentAttention", **changes: Any) -> dict[str, Any]:
    """NV-Embed in small: the decoder above without its causal mask, and a pooling."""
    sizes: dict[str, dict[str, Any]] = {
        "LatentAttention": {"num_latents": 6, "num_heads": 4, "head_dim": 24},
        "SelfAttention": {"num_heads": 4},
    }
    model = language()
    return {
        **model,
        "_target_": "nvmm.models.embedder.EmbeddingModel",
        "pooling": {
            "_target_": f"nvmm.modules.pooling.{pooling}",
            "_partial_": True,
            **sizes.get(pooling, {}),
            **({"init_method_std": 0.1, "ffn_hidden_size": 80} if pooling in sizes else {}),
        },
        **changes,
    }


SYNTHETIC_WORDS = {"vocab_size": 509, "padded_vocab_size": 512}
"""The vocabulary of `nvmm.proof.synthetic`."""


def two_towers(language: dict[str, Any] | None = None) -> dict[str, Any]:
    """A query tower and a context tower of an embedder; by default of E5's kind."""
    return {
        "_target_": "nvmm.models.two_towers.TwoTowers",
        "_partial_": True,
        "language": language or bidirectional("Mean", normalize=True, **SYNTHETIC_WORDS),
    }


def bidirectional(pooling: str = "CLS", **changes: Any) -> dict[str, Any]:
    """BERT in small: post-norm layers, learned positions, token types; not normalised."""
    return {
        "_target_": "nvmm.models.bidirectional.BidirectionalEncoder",
        "_partial_": True,
        "transformer": {
            "_target_": "megatron.core.transformer.transformer_config.TransformerConfig",
            "_partial_": True,
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "normalization": "LayerNorm",
            "layernorm_epsilon": 1e-12,
            "activation_func": method("torch.nn.functional.gelu"),
            "add_bias_linear": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": 0.1,
        },
        "vocab_size": 509,
        "padded_vocab_size": 512,
        "max_sequence_length": 64,
        "pooling": {"_target_": f"nvmm.modules.pooling.{pooling}", "_partial_": True},
        "normalize": False,
        **changes,
    }


def contrastive(model: dict[str, Any], objective: dict[str, Any], **optim: Any) -> dict[str, Any]:
    """`config` with the contrastive objective; its temperature keeps rounding small."""
    target = "nvmm.objectives.contrastive.Contrastive"
    return config(model, **optim) | {
        "objective": {"_target_": target, "temperature": 0.2, **objective}
    }


def preference(
    model: dict[str, Any], loss: str = "preference.Dpo", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`config` with a loss of preferences, in double precision: its margins are small differences.

    loss: module and class in nvmm.objectives.
    """
    return config(model, learning_rate=1e-2, clip_grad=0.0) | {
        "objective": {"_target_": f"nvmm.objectives.{loss}", **(options or {})},
        "precision": {"dtype": "fp64", "grad_reduce_in_fp32": False},
    }


def reward(num_outputs: int = 3, **changes: Any) -> dict[str, Any]:
    """The decoder above with a head of scores in place of its output layer."""
    target = "nvmm.models.reward.RewardModel"
    return language() | {"_target_": target, "num_outputs": num_outputs, **changes}


def scored(model: dict[str, Any], kind: str, **options: Any) -> dict[str, Any]:
    """`config` with an objective of `nvmm.objectives.reward`, in double precision."""
    target = f"nvmm.objectives.reward.{kind}"
    return config(model, clip_grad=0.0) | {
        "objective": {"_target_": target, **options},
        "precision": {"dtype": "fp64", "grad_reduce_in_fp32": False},
    }


def lora(targets: list[str], **changes: Any) -> dict[str, Any]:
    """Adapters of rank 3 at the linears that the patterns name."""
    return {
        "_target_": "nvmm.modules.lora.Lora",
        "targets": targets,
        "rank": 3,
        "alpha": 6.0,
    } | changes


def cross_attending(**changes: Any) -> dict[str, Any]:
    """NVLM-X or -H in small: a block in every second layer, gates that let gradients through."""
    block = {
        "_target_": "nvmm.modules.cross_attention.CrossAttention",
        "interval": 2,
        "initial_gate": 0.5,
    }
    return multimodal() | {
        "_target_": "nvmm.models.cross_attending.CrossAttendingModel",
        "cross_attention": block | changes,
    }


def config(
    model: dict[str, Any],
    *,
    attended: str | None = None,
    interleaved: bool = False,
    **optim: Any,
) -> dict[str, Any]:
    """A shrunk experiment over one of the models above; attended: as the data builder's.

    AdamW's eps is above the gradients' rounding, which its first steps would take to full size.
    """
    own: dict[str, Any] = {} if attended is None else {"attended": attended}
    own |= {"interleaved": True} if interleaved else {}
    return own | {
        "model": copy.deepcopy(model),
        "objective": {"_target_": "nvmm.objectives.next_token.NextToken"},
        "optim": {
            "_target_": "nvmm.training.optim.Optim",
            "learning_rate": 1e-3,
            "eps": 1e-6,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
        }
        | optim,
        "backend": "native",
        "seed": 1234,
    }
