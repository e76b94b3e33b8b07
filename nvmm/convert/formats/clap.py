"""CLAP's audio encoder (HTS-AT), from a folder of the encoder alone or of the whole model.

Folders have Transformers' names, in which LAION publishes its models; its own files and Microsoft's
are read by `nvmm.convert.clap_files`. The norm over mel bins comes with its statistics. The count
of batches that it saw, which changes nothing, is written as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import is_htsat, known, need, only, whole
from nvmm.convert.formats.standard import standard
from nvmm.convert.mapping import Constant, Drop, Reshape, Row

PREFIX, PROJECTION, LEFT_OUT = "tower_prefix", "tower_projection", "tower_left_out"
"""Keys that no config.json has: `complete` finds their values in the names."""
_KINDS = ("weight", "bias")
_OTHER_BRANCH = ("text_model.", "text_projection.", "logit_scale_")
COMPLETED = (PREFIX, PROJECTION, LEFT_OUT)
_FIELDS = (
    *("num_mel_bins", "spec_size", "patch_size", "patch_stride", "patch_embeds_hidden_size"),
    *("depths", "num_attention_heads", "window_size", "mlp_ratio", "qkv_bias", "layer_norm_eps"),
    *("hidden_size", "projection_dim", "projection_hidden_act", "hidden_act", "enable_fusion"),
    *("patch_embed_input_channels", "flatten_patch_embeds", "enable_patch_layer_norm"),
    # Of a head for classes, of fusion, which must be off, and of training.
    *("num_classes", "num_hidden_layers", "fusion_type", "aff_block_r", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", *COMPLETED),
)
_WHOLE = (
    *("audio_config", "text_config", "projection_dim", "projection_hidden_act"),
    *("logit_scale_init_value", "hidden_size", "num_hidden_layers", *COMPLETED),
)


def to_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Turn config.json into our model config; a whole model has a projection.

    ClapCap's projection is in Microsoft's own file alone, and no config.json names it.
    """
    alone = need(hf, "model_type") == "clap_audio_model"
    projection = hf.get(PROJECTION, "none" if alone else "laion")
    if alone:
        known(hf, *_FIELDS)
        hf = standard(hf)
    else:
        known(hf, *_WHOLE)
        known(hf.get("audio_config") or {}, *_FIELDS)
        hf = standard(hf)["audio_config"]
    # 1. What the encoder does in one way alone.
    only(hf, "hidden_act", "gelu")
    only(hf, "enable_fusion", False)
    only(hf, "patch_embed_input_channels", 1)
    only(hf, "flatten_patch_embeds", True)
    only(hf, "enable_patch_layer_norm", True)
    patch, width, depths = (hf[n] for n in ("patch_size", "patch_embeds_hidden_size", "depths"))
    only(hf, "patch_stride", patch, [patch, patch], (patch, patch))
    only(hf, "hidden_size", width * 2 ** (len(depths) - 1))
    if projection == "laion":
        only(hf, "projection_hidden_act", "relu")
    # 2. Its sizes.
    return {
        "_target_": "nvmm.modules.encoders.htsat.HTSAT",
        "_partial_": True,
        "num_mel_bins": hf["num_mel_bins"],
        "picture": hf["spec_size"],
        "patch_size": patch,
        "hidden_size": width,
        "depths": list(depths),
        "num_heads": list(hf["num_attention_heads"]),
        "window_size": hf["window_size"],
        "ffn_ratio": hf["mlp_ratio"],
        "qkv_bias": hf["qkv_bias"],
        "layernorm_epsilon": hf["layer_norm_eps"],
        "projection": projection,
        "projection_size": hf["projection_dim"],
    }


def from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Turn our model config into config.json of the encoder alone.

    Raises ValueError for ClapCap's projection, which Transformers has not.
    """
    if not is_htsat(model):
        raise ValueError("--format clap is CLAP's audio encoder, not this model")
    full = whole(model)
    if full["projection"] == "clapcap":
        raise ValueError(
            "--format clap cannot express this model: Transformers' CLAP has LAION's projection or"
            " none, not projection=clapcap (linear, GELU, linear, added, and a norm)"
        )
    projected = full["projection"] == "laion"
    hf = {
        "architectures": ["ClapAudioModelWithProjection" if projected else "ClapAudioModel"],
        "model_type": "clap_audio_model",
        "num_mel_bins": full["num_mel_bins"],
        "spec_size": full["picture"],
        "patch_size": full["patch_size"],
        "patch_stride": [full["patch_size"]] * 2,
        "patch_embeds_hidden_size": full["hidden_size"],
        "hidden_size": full["hidden_size"] * 2 ** (len(full["depths"]) - 1),
        "depths": list(full["depths"]),
        "num_attention_heads": list(full["num_heads"]),
        "num_hidden_layers": len(full["depths"]),
        "window_size": full["window_size"],
        "mlp_ratio": full["ffn_ratio"],
        "qkv_bias": full["qkv_bias"],
        "layer_norm_eps": full["layernorm_epsilon"],
        "projection_dim": full["projection_size"],
        "hidden_act": "gelu",
        "projection_hidden_act": "relu",
        "enable_fusion": False,
    }
    decoder.expressible(model, to_model(hf | {PROJECTION: full["projection"]}), "clap")
    return hf


def complete(hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add to config.json what the names say: prefix, projection, and the text branch's tensors."""
    suffix = "audio_encoder.patch_embed.proj.weight"
    prefix = next((n.removesuffix(suffix) for n in spec if n.endswith(suffix)), "")
    projection = "laion" if "audio_projection.linear1.weight" in spec else "none"
    if "audio_projection.layer_norm.weight" in spec:
        projection = "clapcap"
    left_out = [name for name in spec if name.startswith(_OTHER_BRANCH)]
    return {**hf, PREFIX: prefix, PROJECTION: projection, LEFT_OUT: left_out}


def table(model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the encoder; the text branch of a whole CLAP is left out."""
    full = whole(model)
    projected = full["projection"] == "laion"
    start = hf.get(PREFIX, "audio_model." if projected else "")
    encoder = f"{start}audio_encoder."
    p, width = full["patch_size"], full["hidden_size"]
    # 1. The norm over bins, and the patches.
    norm = f"{encoder}batch_norm."
    rows = [
        Row("bin_norm.mean", (f"{norm}running_mean",)),
        Row("bin_norm.variance", (f"{norm}running_var",)),
        Row(None, (f"{norm}num_batches_tracked",), Constant(lambda: torch.tensor(0))),
        Row(
            "patches.weight",
            (f"{encoder}patch_embed.proj.weight",),
            Reshape((width, p * p), (width, 1, p, p)),
        ),
        Row("patches.bias", (f"{encoder}patch_embed.proj.bias",)),
    ]
    rows += _both("bin_norm", f"{encoder}batch_norm")
    rows += _both("patch_norm", f"{encoder}patch_embed.norm")
    rows += _both("norm", f"{encoder}norm")
    # 2. Stages and their layers.
    for number, depth in enumerate(full["depths"]):
        theirs = f"{encoder}layers.{number}."
        for layer in range(depth):
            ours = f"stages.{number}.layers.{layer}."
            rows += _layer(ours, f"{theirs}blocks.{layer}.", full["window_size"], full["qkv_bias"])
        if number < len(full["depths"]) - 1:
            rows += _both(f"stages.{number}.merge_norm", f"{theirs}downsample.norm")
            merge = f"{theirs}downsample.reduction.weight"
            rows.append(Row(f"stages.{number}.merge.weight", (merge,)))
    # 3. The projection, and what is left out.
    if full["projection"] == "laion":
        for name in ("linear1", "linear2"):
            rows += _both(f"projection.{name}", f"audio_projection.{name}")
    elif full["projection"] == "clapcap":
        for name in ("linear1", "linear2"):
            linear = f"audio_projection.{name}.weight"
            rows.append(Row(f"projection.{name}.weight", (linear,)))
        rows += _both("projection.layernorm", "audio_projection.layer_norm")
    return rows + [Row(None, (name,), Drop()) for name in hf.get(LEFT_OUT, ())]


def _both(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a weight and a bias."""
    return [Row(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in _KINDS]


def _layer(ours: str, theirs: str, window: int, qkv_bias: bool) -> list[Row]:
    """Return the rows of one Swin layer."""
    attention = f"{theirs}attention.self."
    rows = [
        Row(f"{ours}position_bias", (f"{attention}relative_position_bias_table",)),
        Row(None, (f"{attention}relative_position_index",), Constant(lambda: _index(window))),
    ]
    for name in ("query", "key", "value"):
        both = _both(f"{ours}{name}", f"{attention}{name}")
        rows += both if qkv_bias else both[:1]
    rows += _both(f"{ours}input_norm", f"{theirs}layernorm_before")
    rows += _both(f"{ours}ffn_norm", f"{theirs}layernorm_after")
    rows += _both(f"{ours}proj", f"{theirs}attention.output.dense")
    rows += _both(f"{ours}fc1", f"{theirs}intermediate.dense")
    return rows + _both(f"{ours}fc2", f"{theirs}output.dense")


def _index(window: int) -> Tensor:
    """Return the row of the position biases of each pair, int64 [window^2, window^2].

    A pair's row is (rows apart, columns apart), each from -(window - 1) on, in row-major order.
    """
    side = torch.arange(window)
    apart = side[:, None] - side + window - 1
    rows = apart[:, None, :, None] * (2 * window - 1) + apart[None, :, None, :]
    return rows.reshape(window**2, window**2)
