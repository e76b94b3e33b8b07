"""Tiny random Transformers models with awkward shapes, saved as folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import oracle

VOCABULARY = 509
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, _ORIGINAL: 8, "beta_fast": 1.5, "beta_slow": 0.1}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
    _ORIGINAL: 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "language_tiny": (
        "Qwen2",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-6,
        },
    ),
    "llama2": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama_linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    # Each with positions past the original length in a dozen tokens.
    "llama3_1": (
        "Llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": _LLAMA3 | {"high_freq_factor": 2.0, _ORIGINAL: 8},
        },
    ),
    "qwen2_yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen2_yarn_mscale": (
        "Qwen2",
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "llama_dynamic": (
        "Llama",
        {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama_longrope": ("Llama", {"rope_scaling": LONG}),
    "nemotron_yarn": (
        "Nemotron",
        {"partial_rotary_factor": 0.4, "hidden_act": "relu2", "rope_scaling": YARN},
    ),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 4}),
    "qwen2_windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen2_layer_types": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 0.1}),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.4, "hidden_act": "relu2"}),
    # As many positions as a dozen tokens and eight new ones take.
    "opt": ("OPT", {"max_position_embeddings": 20}),
    "opt_untied": ("OPT", {"tie_word_embeddings": False}),
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "ffn_dim": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}


def language(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save MODELS[name] with visible weights; returns the Transformers model."""
    import transformers

    kind, changes = MODELS[name]
    # Transformers writes into the dictionaries that it is given.
    shape = OPT if kind == "OPT" else _SHAPE
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(shape | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    oracle.randomize(model, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return model


def internvit_config(qk_norm: bool) -> dict[str, Any]:
    """OpenGVLab's config.json: the 6B in small with QK-norm, the 300M without."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 80,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_channels": 3,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "gelu",
        "norm_type": "rms_norm" if qk_norm else "layer_norm",
        "layer_norm_eps": 1e-6,
        "qk_normalization": qk_norm,
        "qkv_bias": not qk_norm,
        "initializer_factor": 0.1,
    }


def internvit(qk_norm: bool, dummies: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Transformers' encoder and its weights in OpenGVLab's names, with zero dummy heads."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    reference = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=80,
            num_hidden_layers=2,
            num_attention_heads=5,
            intermediate_size=128,
            attention_bias=not qk_norm,
            use_qk_norm=qk_norm,
            norm_type="rms_norm" if qk_norm else "layer_norm",
            image_size=(16, 16),
            patch_size=(4, 4),
        )
    )
    oracle.randomize(reference)
    state = reference.state_dict()
    names = {
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    zeros = 16 * dummies
    out = {
        "embeddings.class_embedding": state["embeddings.cls_token"],
        "embeddings.position_embedding": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        projection = state[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"embeddings.patch_embedding.{kind}"] = projection
    for layer in range(2):
        here, there = f"encoder.layers.{layer}.", f"encoder.layer.{layer}."
        out |= {f"{here}ls{i}": state[f"{there}lambda_{i}"] for i in (1, 2)}
        for kind in ("weight", "bias"):
            for old, new in names.items():
                if f"{there}{old}.{kind}" in state:
                    out[f"{here}{new}.{kind}"] = state[f"{there}{old}.{kind}"]
            parts = [state.get(f"{there}attention.{x}_proj.{kind}") for x in "qkv"]
            if parts[0] is not None:
                padded = [torch.cat([p, p.new_zeros(zeros, *p.shape[1:])]) for p in parts]
                out[f"{here}attn.qkv.{kind}"] = torch.cat(padded)
        if dummies:
            proj = out[f"{here}attn.proj.weight"]
            out[f"{here}attn.proj.weight"] = torch.cat([proj, proj.new_zeros(80, zeros)], 1)
            for x in "qk":
                norm = out.get(f"{here}attn.{x}_norm.weight")
                if norm is not None:
                    out[f"{here}attn.{x}_norm.weight"] = torch.cat([norm, norm.new_zeros(zeros)])
    return reference, {name: value.contiguous() for name, value in out.items()}


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a folder as the safetensors library does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def nvlm_d(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder in NVLM-D-72B's layout around a tiny Qwen2 and the tiny 6B; (config, tensors)."""
    import transformers

    shape = _SHAPE | {"rms_norm_eps": 1e-6}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    oracle.randomize(model, std=0.1)
    _, vision = internvit(True, dummies=7)
    generator = torch.Generator().manual_seed(9)
    tensors = {f"vision_model.{name}": value for name, value in vision.items()}
    tensors |= {f"language_model.{name}": value for name, value in model.state_dict().items()}
    for name, size in (
        ("0.weight", (320,)),
        ("0.bias", (320,)),
        ("1.weight", (92, 320)),
        ("3.weight", (60, 92)),
    ):
        tensors[f"mlp1.{name}"] = torch.randn(size, generator=generator)
    config = {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "force_image_size": 16,
        "ps_version": "v2",
        "select_layer": -1,
        "llm_config": shape | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        "vision_config": internvit_config(True),
    }
    save(folder, config, tensors)
    return config, tensors


_ENCODER = {
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 16,
    "patch_size": 4,
}
_TEXT = {
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
_WHISPER = {
    "d_model": 60,
    "encoder_layers": 2,
    "encoder_attention_heads": 5,
    "encoder_ffn_dim": 92,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 7,
    "max_source_positions": 11,
    "max_target_positions": 10,
    "vocab_size": 60,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


CLAP: dict[str, Any] = {
    **{"num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]},
    **{"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [2, 3], "window_size": 4},
    **{"num_attention_heads": [2, 4], "projection_dim": 12, "num_hidden_layers": 2},
}


def clap(kind: str, folder: Path) -> Any:
    """Save CLAP's encoder alone, with its projection, or a `whole` one; returns it."""
    import transformers

    if kind == "whole":
        text = {k: v for k, v in _TEXT.items() if k != "vocab_size"} | {"vocab_size": 60}
        config = transformers.ClapConfig(audio_config=CLAP, text_config=text, projection_dim=12)
        model = transformers.ClapModel(config)
    else:
        name = "ClapAudioModel" + ("WithProjection" if kind == "projected" else "")
        model = getattr(transformers, name)(transformers.ClapAudioConfig(**CLAP))
    oracle.randomize(model)
    statistics = getattr(model, "audio_model", model).audio_encoder.batch_norm
    generator = torch.Generator().manual_seed(8)
    statistics.running_mean.normal_(generator=generator)
    statistics.running_var.uniform_(0.5, 2, generator=generator)
    model.eval().save_pretrained(folder)
    return model


def tower(name: str, folder: Path) -> Any:
    """Save CLIP, SigLIP or Whisper (`_whole`: with its other half); returns Transformers' model."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    kind, _, whole = name.partition("_")
    if kind == "whisper":
        config = transformers.WhisperConfig(**_WHISPER)
        model = (transformers.WhisperForConditionalGeneration if whole else WhisperEncoder)(config)
        encoder = model.model.encoder if whole else model
        positions = encoder.embed_positions.weight.clone()
        oracle.randomize(model)
        encoder.embed_positions.weight.data.copy_(positions)
    else:
        title = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        if whole:
            config = getattr(transformers, f"{title}Config")(
                vision_config=_ENCODER, text_config=_TEXT
            )
            model = getattr(transformers, f"{title}Model")(config)
        else:
            more = {"vision_use_head": False} if kind == "siglip" else {}
            config = getattr(transformers, f"{title}VisionConfig")(**_ENCODER, **more)
            model = getattr(transformers, f"{title}VisionModel")(config)
        oracle.randomize(model)
    model.save_pretrained(folder)
    return model


def llava_next(folder: Path) -> Any:
    """Save a LLaVA-NeXT of a tiny CLIP and a tiny Mistral; returns Transformers' model."""
    import transformers

    text = _SHAPE | {"model_type": "mistral", "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    config = transformers.LlavaNextConfig(
        vision_config=_ENCODER | {"model_type": "clip_vision_model"},
        text_config=text | {"sliding_window": None},
        image_token_index=VOCABULARY - 1,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    oracle.randomize(model, std=0.1)
    model.save_pretrained(folder)
    return model
