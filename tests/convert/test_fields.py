"""Every field of each family's config.json, changed alone: our output changes as Transformers'
does, or the import is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.checkpoint.load import load_weights
from nvmm.convert.formats.all import FORMATS
from nvmm.parallel.setup import Parallel, Precision
from tests import oracle
from tests.convert import families
from tests.convert.test_families import imported

TOKENS = torch.arange(160)[None] * 37 % families.VOCABULARY
LLAMA3 = families._LLAMA3
ROPES: list[Any] = [
    {"rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    families.YARN | {"attention_factor": 1.5, "truncate": False},
    families.YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    families.YARN | {"mscale": 1.0},
    families.LONG,
    families.LONG | {"attention_factor": 1.5},
    families.LONG | {"factor": 2.0, "original_max_position_embeddings": 200},
    {"rope_type": "proportional"},
    {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0},
    LLAMA3,
    LLAMA3 | {"high_freq_factor": 2.0},
]
OTHERS: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.5],
    "original_max_position_embeddings": [64],
    **{key: [0.5] for key in ("rms_norm_eps", "layer_norm_eps", "norm_eps")},
    "head_dim": [32, None],
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "relu", "swish", "quick_gelu", "gelu_new"],
    "activation_function": ["relu", "gelu_new"],
    "layer_types": [["full_attention", "sliding_attention"], ["sliding_attention"] * 2],
    "sliding_window": [1, 7, 64],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1],
    "attention_bias": [True],
    "mlp_bias": [True],
    "num_key_value_heads": [1, 6],
    "norm_type": ["rms_norm"],
    "num_channels": [1],
    "logit_scale": [3.0],
    "attn_logit_softcapping": [5.0],
    "final_logit_softcapping": [5.0],
    "residual_multiplier": [3.0],
    "no_rope_layers": [[0, 1]],
    "use_qk_norm": [True],
    "query_pre_attn_scalar": [4],
    "per_layer_config": [{"0": {"hidden_act": "relu"}}],
    "quantization_config": [{"quant_method": "fp8"}],
    "a_field_of_tomorrow": [1, True, "x"],
}
"""Values to try where the type does not say enough, and fields that no class of today has."""
SHAPES = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "d_model"),
    *("num_attention_heads", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads"),
    *("num_mel_bins", "max_source_positions", "image_size", "patch_size"),
}
"""Fields that every other test varies."""
VISION = families._ENCODER | {"num_hidden_layers": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "qwen2": {},
    "qwen2 with windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 9},
    "nemotron": {"partial_rotary_factor": 0.4, "hidden_act": "relu2"},
    "opt": families.OPT | {"max_position_embeddings": 160},
    "clip_vision_model": VISION,
    "siglip_vision_model": VISION | {"vision_use_head": False},
    "whisper": families._WHISPER,
    "bert": {
        "vocab_size": families.VOCABULARY,
        "hidden_size": 60,
        "intermediate_size": 92,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
    },
}
for _kind in ("Llama", "Qwen2", "Mistral", "Nemotron"):
    BASES[f"{_kind.lower()} reward"] = BASES[_kind.lower()] | {
        "architectures": [f"{_kind}ForSequenceClassification"],
        "num_labels": 3,
        "problem_type": "regression",
        "pad_token_id": 3,
    }
FORMAT = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}


def values(name: str, old: Any) -> list[Any]:
    if name in OTHERS:
        return [value for value in OTHERS[name] if value != old]
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int | float):
        return [old * 2 or 2]
    return [f"{old}x"] if isinstance(old, str) else []


def theirs(kind: str, raw: dict[str, Any], folder: Path) -> tuple[Tensor, Any]:
    """Transformers' output with the same draws for every config, and its model; in `folder`."""
    import transformers

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if kind in ("clip_vision_model", "siglip_vision_model"):
        model = transformers.AutoModel.from_config(config)
        oracle.randomize(model)
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        with torch.no_grad():
            out = model(pixels).last_hidden_state
        return out[:, 1:] if kind == "clip_vision_model" else out, model
    if kind == "bert":
        model = transformers.AutoModel.from_config(config).eval()
        oracle.randomize(model)
        with torch.no_grad():
            return model(TOKENS).last_hidden_state, model
    if kind == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        model = WhisperEncoder(config)
        oracle.randomize(model)
        with torch.no_grad():
            return model(torch.randn(1, 7, 22, generator=generator)).last_hidden_state, model
    kinds = transformers.AutoModelForCausalLM
    if "num_labels" in raw:
        kinds = transformers.AutoModelForSequenceClassification
    model = kinds.from_config(config)
    oracle.randomize(model, std=0.1)
    with torch.no_grad():
        return model.eval()(TOKENS).logits, model


def ours(kind: str, raw: dict[str, Any], model: Any, folder: Path) -> Tensor:
    """Our output of the same input, with the weights of Transformers' model imported."""
    from nvmm.batch import Batch
    from tests.models.test_language import batch_of

    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.rmtree(folder / "ours", ignore_errors=True)
    derived = imported(folder, folder / "ours")
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(derived, _convert_="all")(chunk=chunk).eval()
    assert load_weights(folder / "ours", [module]) == []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if kind == "whisper":
            return module(torch.randn(1, 7, 22, generator=generator))
        if "vision" in kind:
            module.image_mean, module.image_std = [0.0] * 3, [1 / 255] * 3
            return module(torch.randn(1, 3, 16, 16, generator=generator))
        batch: Batch = batch_of(list(TOKENS))
        if kind == "bert":
            return module(batch, output="hidden").transpose(0, 1)
        return module(batch, output="score" if "num_labels" in raw else "logits")


def same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "mistral" else pytest.mark.slow) for n in BASES]
)
def test_a_changed_field_is_followed_or_refused(name: str, tmp_path: Path) -> None:
    import transformers

    kind = name.split()[0]
    shape = families._SHAPE if kind in ("llama", "qwen2", "qwen3", "mistral", "nemotron") else {}
    raw = {"model_type": kind, **shape, **BASES[name]}
    family = FORMATS[f"{kind}_reward" if name.endswith("reward") else FORMAT.get(kind, kind)]
    expected, _ = theirs(kind, raw, tmp_path / "base")
    plain = family.to_model(raw)
    defaults = transformers.AutoConfig.for_model(**raw).to_dict()
    silent, compared = [], 0
    for field in [*defaults, *(name for name in OTHERS if name not in defaults)]:
        if field in (*SHAPES, "model_type") or field.startswith(("decoder_", "id2", "label2")):
            continue
        for value in values(field, raw.get(field, defaults.get(field))):
            changed = raw | {field: value}
            try:
                model = family.to_model(changed)
            except ValueError as error:
                assert field in str(error), (field, error)
                continue
            try:
                there, module = theirs(kind, changed, tmp_path / "field")
            except Exception:
                continue  # Transformers has no such model
            if model == plain and same(there, expected):
                continue
            compared += 1
            found = ours(kind, changed, module, tmp_path / "field")
            if not same(found, there):
                silent.append(f"{field}={value!r}")
    assert silent == []
    assert compared > 0


WHOLE: dict[str, Any] = {
    "internvit": families.internvit_config(True),
    "nvlm_d": {
        "model_type": "NVLM_D",
        "llm_config": families._SHAPE | {"model_type": "qwen2"},
        "vision_config": families.internvit_config(True),
        "downsample_ratio": 0.5,
    },
    "llava_next": {
        "model_type": "llava_next",
        "text_config": families._SHAPE | {"model_type": "mistral"},
        "vision_config": VISION,
    },
    "nv_embed": {
        "model_type": "nvembed",
        "text_config": families._SHAPE | {"model_type": "mistral"},
        "latent_attention_config": {},
    },
    "mm_embed": {
        "model_type": "mm_embed",
        "text_config": families._SHAPE | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "latent_attention_config": {},
    },
    "audio_flamingo3": {
        "model_type": "audioflamingo3",
        "text_config": families._SHAPE | {"model_type": "qwen2"},
        "audio_config": {"model_type": "audioflamingo3_encoder", "hidden_size": 80},
    },
    "llava": {
        "model_type": "llava",
        "text_config": families._SHAPE | {"model_type": "llama"},
        "vision_config": VISION,
    },
    "vila": families._SHAPE
    | {
        "model_type": "llava_llama",
        "mm_vision_tower": "somebody/else",
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "vila15": {
        "model_type": "llava_llama",
        "llm_cfg": families._SHAPE | {"model_type": "llama"},
        "vision_tower_cfg": VISION | {"model_type": "siglip_vision_model"},
        "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
    },
    "siglip": {"model_type": "siglip", "vision_config": VISION, "text_config": {}},
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_field_that_nobody_reads_is_refused_in_every_part(name: str) -> None:
    to_model = FORMATS[name].to_model
    plain = to_model(WHOLE[name])
    assert to_model(WHOLE[name] | {"tomorrow": None}) == plain
    with pytest.raises(ValueError, match="tomorrow=1 would not be read"):
        to_model(WHOLE[name] | {"tomorrow": 1})
    for part, value in WHOLE[name].items():
        if isinstance(value, dict) and part != "text_config":
            with pytest.raises(ValueError, match="tomorrow='x' would not be read"):
                to_model(WHOLE[name] | {part: value | {"tomorrow": "x"}})


def test_only_what_a_folder_says_can_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the defaults of Transformers' class, which a newer one may have more of."""
    import transformers

    config = transformers.LlamaConfig
    to_dict = config.to_dict
    monkeypatch.setattr(config, "to_dict", lambda self: {**to_dict(self), "new_default": 3})
    completed = FORMATS["llama"].complete({"model_type": "llama"}, {})
    assert FORMATS["llama"].to_model(completed)["vocab_size"] == 32000
    with pytest.raises(ValueError, match="new_default=3 would not be read"):
        FORMATS["llama"].to_model({**completed, "new_default": 3})


def test_parts_of_llava_that_are_left_out_are_its_own() -> None:
    """CLIP-L at 336 pixels and Llama; a part that is given has its own class's defaults."""
    to_model = FORMATS["llava_next"].to_model
    plain = to_model({"model_type": "llava_next"})
    assert plain["vision"]["image_size"] == 336
    assert plain["vision"]["transformer"]["num_layers"] == 23
    assert plain["language"]["transformer"]["ffn_hidden_size"] == 11008
    # llava-hf's folders have vocab_size in both parts.
    given = {"vision_config": {"vocab_size": 32000}, "text_config": {"model_type": "mistral"}}
    model = to_model({"model_type": "llava_next", **given})
    assert model["vision"]["image_size"] == 224
    assert model["language"]["transformer"]["num_query_groups"] == 8


def test_an_embedder_s_window_limits_its_texts_where_it_has_no_causal_mask() -> None:
    text = families._SHAPE | {"model_type": "mistral", "sliding_window": 16}
    hf = WHOLE["nv_embed"] | {"text_config": text}
    for causal, longest in ((False, 16), (True, families._SHAPE["max_position_embeddings"])):
        model = FORMATS["nv_embed"].to_model(hf | {"causal": causal})
        assert model["max_sequence_length"] == longest
        assert ("window_size" in model["transformer"]) == causal


def test_what_a_vision_config_leaves_out_is_transformers_default() -> None:
    """In a whole CLIP's too, whose old vision_config_dict has the last word."""
    import transformers

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "patch_size": 8}
    for kind, title in (("clip", "CLIP"), ("siglip", "Siglip")):
        config = getattr(transformers, f"{title}VisionConfig")
        to_model, plain = FORMATS[kind].to_model, {"model_type": f"{kind}_vision_model"}
        assert to_model(plain) == to_model(config().to_dict())
        assert to_model(plain | sizes) == to_model(config(**sizes).to_dict())
    old = {
        "model_type": "clip",
        "vision_config_dict": sizes,
        "vision_config": VISION,
        "text_config": {},
    }
    merged = transformers.CLIPConfig.from_dict(old).vision_config.to_dict()
    assert FORMATS["clip"].to_model(old) == FORMATS["clip"].to_model(merged)


def test_switches_that_are_off_and_names_that_agree_are_taken() -> None:
    vision = families.internvit_config(True)
    to_model = FORMATS["internvit"].to_model
    assert to_model(vision | {"use_moe": False, "num_experts": 8}) == to_model(vision)
    with pytest.raises(ValueError, match="use_moe=True is not supported"):
        to_model(vision | {"use_moe": True})
    nemotron = {"model_type": "nemotron"} | families._SHAPE | BASES["nemotron"]
    to_model = FORMATS["nemotron"].to_model
    assert to_model(nemotron | {"kv_channels": 10}) == to_model(nemotron)
    with pytest.raises(ValueError, match="kv_channels=16 is not supported"):
        to_model(nemotron | {"kv_channels": 16})
