"""CLAP's audio encoder in the files of its makers: LAION's `.pt` and Microsoft's `.pth`; read only.

Both hold HTS-AT under one set of names, with fused queries, keys and values, a projection of their
own, the other tower, and no config: the tensors' shapes say all sizes. Here they get the names that
Transformers has for them, so that the rest is `formats.clap`'s. Names were checked against the
packages laion_clap 1.1.7 and msclap 1.3.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.convert.files import is_local
from nvmm.convert.pickles import load

SUFFIXES = (".pt", ".pth", ".ckpt")
_CONTAINERS = ("state_dict", "model")
"""Where LAION's and Microsoft's files have their tensors."""
_FIRST = "patch_embed.proj.weight"
_NAMES = (
    (r"^bn0\.", "batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative", ".attention.self.relative"),
    (r"\.attn\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""Their names within the encoder -> Transformers'."""
_PROJECTIONS = {
    "laion": {"0": "linear1", "2": "linear2"},
    "clapcap": {"linear1": "linear1", "linear2": "linear2", "layer_norm": "layer_norm"},
}
_UNUSED = re.compile(
    r"(spectrogram_extractor|logmel_extractor|tscam_conv|head)\."
    r"|.*\.(attn_mask|relative_position_index)$"
)
"""The front end, which `nvmm.data.samples.sounds` has, the head for classes, and what follows from
the sizes."""


class ClapFile:
    """The tensors of a file under Transformers' names, and config.json's fields of their sizes.

    config: of a `clap_audio_model`. left_out: names in the file that are not read.

    Raises ValueError for a file that holds no HTS-AT, or one that fuses windows.
    """

    def __init__(self, path: Path) -> None:
        if not is_local(path):
            raise ValueError(f"{path}: copy it to a local disk first, the file is mapped")
        tensors = _tensors(load(path, mmap=True), path)
        stem = next((n.removesuffix(_FIRST) for n in tensors if n.endswith(_FIRST)), None)
        kind, projection = _kind(stem)
        if stem is None or kind is None:
            raise ValueError(
                f"{path} has no HTS-AT of LAION-CLAP (audio_branch.{_FIRST}) or of Microsoft's"
                f" CLAP (audio_encoder.base.htsat.{_FIRST}, clap.base.htsat.{_FIRST})"
            )
        encoder = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        if fusing := [n for n in encoder if "fusion_model" in n or n.startswith("mel_conv")]:
            raise ValueError(f"{path}: {fusing[0]}: fusion is not supported; take a model without")
        self.config = _sizes(encoder, path)
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in encoder.items():
            if not _UNUSED.match(name):
                self.tensors |= _renamed(name, tensor)
        read = {stem + name for name in encoder if not _UNUSED.match(name)}
        for theirs, ours in _PROJECTIONS[kind].items():
            for part in ("weight", "bias"):
                name = f"{projection}{theirs}.{part}"
                if name in tensors:
                    self.tensors[f"audio_projection.{ours}.{part}"] = tensors[name]
                    read.add(name)
        last = self.tensors.get("audio_projection.linear2.weight")
        if last is None:
            raise ValueError(f"{path} has no projection ({projection}...)")
        self.config["projection_dim"] = last.shape[0]
        self.left_out = sorted(tensors.keys() - read)
        self.spec = {name: tensor.to("meta") for name, tensor in self.tensors.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor."""
        yield self.tensors[name]


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, without the prefix that DistributedDataParallel gives them."""
    state = next((content[key] for key in _CONTAINERS if key in content), content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} where its tensors should be")
    return {
        name.removeprefix("module."): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _kind(stem: str | None) -> tuple[str | None, str]:
    """Return the projection that an encoder of this prefix has, and the prefix of its names."""
    if stem is not None and stem.endswith("base.htsat."):
        return "clapcap", stem.removesuffix("base.htsat.") + "projection."
    if stem is not None and stem.endswith("audio_branch."):
        return "laion", stem.removesuffix("audio_branch.") + "audio_projection."
    return None, ""


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return an encoder's tensor under Transformers' name, or its thirds where it is fused."""
    if ".attn.qkv." in name:
        thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        parts = {name.replace(".qkv.", f".{part}."): third for part, third in thirds}
        return {k: v for n, part in parts.items() for k, v in _renamed(n, part).items()}
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return {f"audio_encoder.{name}": tensor}


def _sizes(encoder: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return config.json's fields of an encoder's sizes."""

    def shape(name: str, axes: int) -> torch.Size:
        if name not in encoder:
            raise ValueError(f"{path} has no {name} in its HTS-AT, which says a size")
        if encoder[name].dim() != axes:
            found = list(encoder[name].shape)
            raise ValueError(f"{path}: {name} has shape {found}, must have {axes} axes")
        return encoder[name].shape

    width, _, _, patch = shape(_FIRST, 4)
    blocks: dict[int, int] = {}
    for name in encoder:
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = map(int, match.groups())
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    depths = [blocks[stage] for stage in sorted(blocks)]
    tables = [
        shape(f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(len(depths))
    ]
    # Of the first stage's shifted windows there are (picture / patch / window)^2.
    windows, tokens, _ = shape("layers.0.blocks.1.attn_mask", 3)
    side = math.isqrt(tokens)
    return {
        "model_type": "clap_audio_model",
        "num_mel_bins": shape("bn0.weight", 1)[0],
        "spec_size": math.isqrt(windows) * side * patch,
        "patch_size": patch,
        "patch_stride": [patch, patch],
        "patch_embeds_hidden_size": width,
        "hidden_size": width * 2 ** (len(depths) - 1),
        "depths": depths,
        "num_hidden_layers": len(depths),
        "num_attention_heads": [heads for _, heads in tables],
        "window_size": side,
        "mlp_ratio": shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in encoder,
        "enable_fusion": False,
    }
