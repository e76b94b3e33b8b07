"""NV-Embed as nvidia/NV-Embed-v2 has it: embedding_model.*, latent_attention_model.*.

Both halves of to_kv (keys, values) and of the GEGLU's first linear (value, gate) are stored as we
store them, so every row of the pooling is a renaming. The decoder is a Mistral, or a Qwen2 where it
has biases on QKV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import mistral, qwen2
from nvmm.convert.formats.config import known, need, only
from nvmm.convert.mapping import Row

_FAMILIES: dict[str, ModuleType] = {"mistral": mistral, "qwen2": qwen2}
_BIDIRECTIONAL = "bidir_mistral"
"""The released model_type of a Mistral without the causal mask."""
_POOLINGS = "nvmm.modules.pooling."
_THEIRS = "latent_attention_model."
_FIELDS = (
    *("text_config", "latent_attention_config", "causal", "hidden_size"),
    *("max_position_embeddings", "is_mask_instruction", "padding_side", "add_pad_token"),
    *("add_eos", "mask_type", "instruction_masking"),
)
_LATENT_FIELDS = (
    *("num_latents_value", "num_cross_heads", "cross_dim_head", "ffn_hidden_size"),
    *("latent_dim", "hidden_dim", "output_normalize"),
)
_BLOCKS = {
    "norm_query": "0.norm",
    "norm_latents": "0.norm_context",
    "linear_q": "0.fn.to_q",
    "linear_kv": "0.fn.to_kv",
    "linear_proj": "0.fn.to_out",
    "norm_mlp": "1.norm",
    "linear_fc1": "1.fn.net.0",
    "linear_fc2": "1.fn.net.2",
}


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the MLP's width to config.json, which the released code has built in."""
    latent = hf.get("latent_attention_config")
    first = spec.get(f"{_THEIRS}cross_attend_blocks.1.fn.net.2.weight")
    if latent is None or first is None:
        return dict(hf)
    return {**hf, "latent_attention_config": {"ffn_hidden_size": first.shape[1], **latent}}


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config; omitted fields have the released code's defaults."""
    known(hf, *_FIELDS)
    latent = hf.get("latent_attention_config")
    if latent is not None:
        known(latent, *_LATENT_FIELDS)
    text = _text(hf)
    model = _FAMILIES[text["model_type"]].to_model(text)
    causal = bool(hf.get("causal"))
    size = model["transformer"].get("window_size")
    if size is not None and not causal:
        # The released code's mask of all tokens has no window; within one it would hide nothing.
        for name in ("window_size", "window_attn_skip_freq"):
            model["transformer"].pop(name, None)
        model["max_sequence_length"] = min(model["max_sequence_length"], size[0] + 1)
    hidden = model["transformer"]["hidden_size"]
    del model["share_embeddings_and_output_weights"]
    pooling: dict[str, Any] = {"_target_": f"{_POOLINGS}Mean", "_partial_": True}
    if latent is not None:
        pooling |= {
            "_target_": f"{_POOLINGS}LatentAttention",
            "num_latents": latent.get("num_latents_value", 512),
            "num_heads": latent.get("num_cross_heads", 8),
            "head_dim": latent.get("cross_dim_head", 4096),
            "ffn_hidden_size": latent.get("ffn_hidden_size", 4 * hidden),
        }
    target = "nvmm.models.embedder.EmbeddingModel"
    return {**model, "_target_": target, "pooling": pooling, "causal": causal}


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json; ValueError for a pooling it cannot express."""
    family = qwen2 if model["transformer"].get("add_qkv_bias") else mistral
    text = family.from_model(_language(model))
    text["architectures"] = [text["architectures"][0].replace("ForCausalLM", "Model")]
    pooling, hidden = model["pooling"], text["hidden_size"]
    kind = pooling["_target_"].removeprefix(_POOLINGS)
    if kind not in ("LatentAttention", "Mean"):
        raise ValueError(
            f"--format nv_embed cannot express model.pooling={kind}; it can LatentAttention, Mean"
        )
    latent = None
    if kind == "LatentAttention":
        latent = {
            "model_type": "latent_attention",
            "num_latents_value": pooling.get("num_latents", 512),
            "num_cross_heads": pooling.get("num_heads", 8),
            "cross_dim_head": pooling.get("head_dim") or hidden,
            "latent_dim": hidden,
            "hidden_dim": hidden,
            "ffn_hidden_size": pooling.get("ffn_hidden_size") or 4 * hidden,
        }
    return {
        "architectures": ["NVEmbedModel"],
        "model_type": "nvembed",
        "auto_map": {
            "AutoConfig": "modeling_nvembed.NVEmbedConfig",
            "AutoModel": "modeling_nvembed.NVEmbedModel",
        },
        "hidden_size": hidden,
        "max_position_embeddings": text["max_position_embeddings"],
        "causal": model.get("causal", False),
        "latent_attention_config": latent,
        "text_config": text,
    }


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the decoder's rows without `model.` and lm_head, and the pooling's."""
    text = _text(hf)
    rows = []
    for row in _FAMILIES[text["model_type"]].table(_language(model), text):
        if "lm_head.weight" not in row.theirs:
            names = [f"embedding_model.{name.removeprefix('model.')}" for name in row.theirs]
            rows.append(replace(row, theirs=tuple(names)))
    if hf.get("latent_attention_config") is None:
        return rows
    rows.append(Row("pooling.latents", (f"{_THEIRS}latents",)))
    for ours, theirs in _BLOCKS.items():
        kinds = ["weight"]
        if ours.startswith(("norm", "linear_fc")):
            kinds.append("bias")
        rows += [
            Row(f"pooling.{ours}.{kind}", (f"{_THEIRS}cross_attend_blocks.{theirs}.{kind}",))
            for kind in kinds
        ]
    return rows


def _text(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's config under the model_type of its family."""
    text = dict(need(hf, "text_config"))
    if text.get("model_type") == _BIDIRECTIONAL:
        text["model_type"] = "mistral"
    only(text, "model_type", *_FAMILIES)
    return text


def _language(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder as the language model that its family knows.

    Raises ValueError for vectors that are not normalised: the format's always are.
    """
    if not model.get("normalize", True):
        raise ValueError("--format nv_embed cannot express model.normalize=False; it can True")
    own = ("pooling", "causal", "normalize")
    language = {key: value for key, value in model.items() if key not in own}
    return {**language, "_target_": "nvmm.models.language.LanguageModel"}
