"""Every key and shape of the published models, by names alone."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from nvmm.config.check import config_dir
from nvmm.config.signatures import completed
from nvmm.convert.formats import mm_embed, nvlm_d
from nvmm.convert.formats.all import FORMATS
from nvmm.convert.formats.config import mismatches
from nvmm.convert.formats.modeling_mm_embed import MMEmbedConfig, MMEmbedModel
from nvmm.convert.importing import parameters
from nvmm.convert.table import ToOurs, ToTheirs
from tests.models.parameter_names import golden_path


class Names:
    """A source of shapes without values."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.spec = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        raise AssertionError("shapes are enough")


def golden(model: str) -> dict[str, list[int]]:
    lines = golden_path(model).read_text().splitlines()
    return {name: ast.literal_eval(shape) for name, shape in (x.split(" ", 1) for x in lines)}


def config_of(model: str) -> dict[str, Any]:
    group = "vision" if (config_dir() / "vision" / f"{model}.yaml").is_file() else "model"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(f"{group}/{model}")[group], resolve=True)  # type: ignore


def shapes_72b() -> dict[str, list[int]]:
    """nvidia/NVLM-D-72B: 80 layers of Qwen2-72B, 45 of InternViT-6B with 32 heads, a projector."""
    h, v = 8192, 3200
    shapes = {
        "vision_model.embeddings.class_embedding": [1, 1, v],
        "vision_model.embeddings.position_embedding": [1, 1025, v],
        "vision_model.embeddings.patch_embedding.weight": [v, 3, 14, 14],
        "vision_model.embeddings.patch_embedding.bias": [v],
        "mlp1.0.weight": [12800],
        "mlp1.0.bias": [12800],
        "mlp1.1.weight": [29568, 12800],
        "mlp1.3.weight": [h, 29568],
        "language_model.model.embed_tokens.weight": [152064, h],
        "language_model.lm_head.weight": [152064, h],
        "language_model.model.norm.weight": [h],
    }
    encoder = {
        "attn.qkv.weight": [12288, v],
        "attn.q_norm.weight": [4096],
        "attn.k_norm.weight": [4096],
        "attn.proj.weight": [v, 4096],
        "mlp.fc1.weight": [12800, v],
        "mlp.fc1.bias": [12800],
        "mlp.fc2.weight": [v, 12800],
        **{key: [v] for key in ("attn.proj.bias", "mlp.fc2.bias", "ls1", "ls2")},
        **{key: [v] for key in ("norm1.weight", "norm2.weight")},
    }
    decoder = {
        "self_attn.q_proj.weight": [h, h],
        "self_attn.q_proj.bias": [h],
        "self_attn.o_proj.weight": [h, h],
        "mlp.gate_proj.weight": [29568, h],
        "mlp.up_proj.weight": [29568, h],
        "mlp.down_proj.weight": [h, 29568],
        **{key: [1024, h] for key in ("self_attn.k_proj.weight", "self_attn.v_proj.weight")},
        **{key: [1024] for key in ("self_attn.k_proj.bias", "self_attn.v_proj.bias")},
        **{key: [h] for key in ("input_layernorm.weight", "post_attention_layernorm.weight")},
    }
    for i in range(45):
        shapes |= {f"vision_model.encoder.layers.{i}.{k}": s for k, s in encoder.items()}
    for i in range(80):
        shapes |= {f"language_model.model.layers.{i}.{k}": s for k, s in decoder.items()}
    return shapes


def converted(model: str, vocab_size: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The published layout of a model, and that layout under our names again."""
    ours = config_of(model)
    hf = nvlm_d.from_model(ours)
    hf["llm_config"]["vocab_size"] = vocab_size
    there = ToTheirs(Names(golden(model)), nvlm_d.table(ours, hf))
    theirs = {name: list(spec.shape) for name, spec in there.spec.items()}
    found = nvlm_d.complete(hf, there.spec)
    assert found["vision_config"]["num_dummy_heads"] == 7
    back = ToOurs(Names(theirs), nvlm_d.table(ours, found))
    return theirs, {name: list(spec.shape) for name, spec in back.spec.items()}


def test_nvlm_d_72b_is_the_published_layout() -> None:
    theirs, back = converted("nvlm_d_72b", 152064)
    assert theirs == shapes_72b()
    assert back == golden("nvlm_d_72b")
    assert sum(math.prod(shape) for shape in theirs.values()) == 79_379_593_344


@pytest.mark.parametrize(("model", "rows"), [("nvlm_d_34b", 64000), ("nvlm_d_7b", 152064)])
def test_every_key_has_its_place(model: str, rows: int) -> None:
    theirs, back = converted(model, rows)
    assert back == golden(model)
    assert len(theirs) > len(back)


# model -> format, parameters, and fields of the published config.json
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2_72b": (
        "qwen2",
        72_706_203_648,
        {"vocab_size": 152064, "num_key_value_heads": 8, "rope_theta": 1e6, "hidden_size": 8192},
    ),
    "yi_34b": (
        "yi",
        34_388_917_248,
        {"vocab_size": 64000, "num_attention_heads": 56, "rope_theta": 5e6, "rms_norm_eps": 1e-5},
    ),
    "llama3_8b": (
        "llama",
        8_030_261_248,
        {"vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": None},
    ),
    "llama3_70b": (
        "llama",
        70_553_706_496,
        {"vocab_size": 128256, "intermediate_size": 28672, "num_key_value_heads": 8},
    ),
    "llama3_70b_128k": ("llama", 70_553_706_496, {"rope_theta": 1.5e8, "rope_scaling": None}),
    "llama3_1_8b": (
        "llama",
        8_030_261_248,
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2_5_7b_128k": ("qwen2", 7_615_616_512, {"vocab_size": 152064}),
    "mistral_7b": (
        "mistral",
        7_241_732_096,
        {"vocab_size": 32000, "intermediate_size": 14336, "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    ),
    "nemotron4_15b": (
        "nemotron",
        12_483_047_424 + 3_145_728_000,
        {"hidden_size": 6144, "partial_rotary_factor": 0.5, "norm_eps": 1e-5},
    ),
    "nemotron4_340b": (
        "nemotron",
        331_592_011_776 + 9_437_184_000,
        {"hidden_size": 18432, "intermediate_size": 73728, "num_hidden_layers": 96},
    ),
    # Of 50272 published rows, and ours up to 50304.
    "opt_1_3b": (
        "opt",
        1_315_758_080 + 32 * 2048,
        {"vocab_size": 50272, "ffn_dim": 8192, "num_attention_heads": 32, "hidden_size": 2048},
    ),
    # What qwen2_7b/{dpo,rpo} train.
    "qwen2_7b": (
        "qwen2",
        7_615_616_512,
        {"vocab_size": 152064, "num_key_value_heads": 4, "rope_theta": 1e6, "hidden_size": 3584},
    ),
    # Reward models: a head without a bias in the place of the output layer.
    "llama3_8b_reward": (
        "llama_reward",
        8_030_261_248 - 128256 * 4096 + 4096,
        {"vocab_size": 128256, "num_labels": 1, "problem_type": "regression"},
    ),
    "qwen2_7b_reward": (
        "qwen2_reward",
        7_615_616_512 - 152064 * 3584 + 3584,
        {"vocab_size": 152064, "num_labels": 1, "problem_type": "regression"},
    ),
    "nemotron4_15b_reward": (
        "nemotron_reward",
        12_483_047_424 + 256_000 * 6144 + 9 * 6144,
        {"hidden_size": 6144, "num_labels": 9, "problem_type": "regression"},
    ),
    "nemotron4_340b_reward": (
        "nemotron_reward",
        331_592_011_776 + 256_000 * 18432 + 9 * 18432,
        {"hidden_size": 18432, "num_labels": 9, "num_hidden_layers": 96},
    ),
    "internvit_6b": (
        "internvit",
        5_536_496_000,
        {"hidden_size": 3200, "qk_normalization": True, "qkv_bias": False},
    ),
}


def transformers_shapes(kind: str, hf: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of Transformers' own model of a config, built without its bytes."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    kinds = AutoModelForSequenceClassification if kind.endswith("_reward") else AutoModelForCausalLM
    config = AutoConfig.for_model(**hf)
    with torch.device("meta"):
        model = kinds.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {n: list(value.shape) for n, value in model.state_dict().items() if n not in tied}


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_backbones_have_the_published_size_and_keys(model: str) -> None:
    """The graph on the meta device, its parameters counted; every key to Transformers' and back."""
    kind, count, fields = PUBLISHED[model]
    ours = config_of(model)
    family = FORMATS[kind]
    hf = family.from_model(ours)
    # A run keeps the constructors' defaults in its config.
    assert family.from_model(completed(ours)) == hf
    if "vocab_size" in fields:
        hf["vocab_size"] = fields["vocab_size"]
    assert {key: hf[key] for key in fields} == fields
    assert mismatches(family.to_model(hf), ours, "config.json", model) == []
    shapes = {
        name: list(spec.shape)
        for name, spec in parameters(instantiate(ours, _convert_="all")).items()
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    there = ToTheirs(Names(shapes), family.table(ours, hf))
    theirs = {name: list(spec.shape) for name, spec in there.spec.items()}
    back = ToOurs(Names(theirs), family.table(ours, family.complete(hf, there.spec)))
    assert {name: list(spec.shape) for name, spec in back.spec.items()} == shapes
    if kind != "internvit":
        assert theirs == transformers_shapes(kind, hf)


MM_EMBED = {
    "model_type": "llava_next",
    "architectures": ["NVMMEmbedModel"],
    "retriever": "nvidia/NV-Embed-v1",
    "global_image_patch_only": True,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
"""The released config.json, as far as its fields are known."""


def test_mm_embed_8b_is_the_released_layout() -> None:
    """Our modelling file has our names, and the release has them with a layer and a tensor more."""
    ours = config_of("mm_embed_8b")
    hf = mm_embed.from_model(ours)
    assert mm_embed.from_model(completed(ours)) == hf
    constructor = instantiate(ours, _convert_="all")
    shapes = {name: list(spec.shape) for name, spec in parameters(constructor).items()}
    there = ToTheirs(Names(shapes), mm_embed.table(ours, hf))
    theirs = {name: list(spec.shape) for name, spec in there.spec.items()}
    with torch.device("meta"):
        model = MMEmbedModel(MMEmbedConfig(**{k: v for k, v in hf.items() if k != "auto_map"}))
    assert theirs == {name: list(value.shape) for name, value in model.state_dict().items()}
    text = [n for n in theirs if n.startswith(("language_model.", "latent_attention_model."))]
    assert sum(math.prod(theirs[name]) for name in text) == 7_851_016_192

    layer = "vision_tower.vision_model.encoder.layers.22."
    last = {n.replace(".22.", ".23."): s for n, s in theirs.items() if n.startswith(layer)}
    names = Names({**theirs, **last, "image_newline": [4096]})
    tower = [s for n, s in {**theirs, **last}.items() if n.startswith("vision_tower.")]
    assert sum(map(math.prod, tower)) == 303_507_456, "CLIP ViT-L/14-336"
    released = mm_embed.complete(MM_EMBED, names.spec)
    assert mismatches(mm_embed.to_model(released), ours, "the release", "ours") == []
    back = ToOurs(names, mm_embed.table(ours, released))
    assert {name: list(spec.shape) for name, spec in back.spec.items()} == shapes
    assert set(back.dropped) == {*last, "image_newline"} | {
        f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")
    }


_CLIP = 303_507_456 - 12_596_224 - 2 * 1024
"""CLIP ViT-L/14-336 without its last layer and last norm."""
_SIGLIP = 26 * 15_239_504 + (3 * 14 * 14 + 1) * 1152 + 27 * 27 * 1152
"""SigLIP-so400m/14-384: 26 layers, the patch embedding, 27 x 27 positions."""
VILA = {
    "vila_7b": ("vila", _CLIP, (1024 + 1 + 4096 + 1) * 4096, 6_738_415_616 + 64 * 2 * 4096),
    "vila_13b": ("vila", _CLIP, (1024 + 1 + 5120 + 1) * 5120, 13_015_864_320 + 64 * 2 * 5120),
    "vila15_3b": ("vila15", _SIGLIP, 18_364_416, 2_701_560_320 + 64 * 2 * 2560),
    "vila15_8b": ("vila15", _SIGLIP, 35_668_992, 8_030_261_248),
}
"""model -> format, parameters of vision, connector and language with its rows for a placeholder."""


@pytest.mark.parametrize("model", sorted(VILA))
def test_vila_has_its_parts_sizes_and_a_place_for_every_key(model: str) -> None:
    kind, *counts = VILA[model]
    ours, family = config_of(model), FORMATS[kind]
    hf = family.from_model(ours)
    assert family.from_model(completed(ours)) == hf
    assert mismatches(family.to_model(hf), ours, "config.json", model) == []
    constructor = instantiate(ours, _convert_="all")
    shapes = {name: list(spec.shape) for name, spec in parameters(constructor).items()}
    for part, count in zip(("vision", "connector", "language"), counts, strict=True):
        of_part = [shape for name, shape in shapes.items() if name.startswith(f"{part}.")]
        assert sum(map(math.prod, of_part)) == count, part
    there = ToTheirs(Names(shapes), family.table(ours, hf))
    theirs = {name: list(spec.shape) for name, spec in there.spec.items()}
    back = ToOurs(Names(theirs), family.table(ours, family.complete(hf, there.spec)))
    assert {name: list(spec.shape) for name, spec in back.spec.items()} == shapes
    if kind == "vila":
        assert hf["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
        assert hf["mm_vision_select_layer"] == -2 and hf["mm_projector_type"] == "mlp2x_gelu"
        linear = {**ours, "connector": {**ours["connector"], "hidden_size": None}}
        assert family.from_model(linear)["mm_projector_type"] == "linear"
        assert FORMATS["llava"].from_model(ours)["image_seq_length"] == 576
    else:
        assert hf["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample"
        assert hf["vision_tower_cfg"]["num_hidden_layers"] == 26
