"""The projectors of LLaVA-1.5's code and VILA's by their `mm_projector_type`.

    linear                    Linear
    mlp2x_gelu                Linear, GELU, Linear
    mlp_downsample            2 x 2 blocks, LayerNorm, Linear, GELU, Linear (VILA 1.5)
    mlp_downsample_2x2_fix    the same with the blocks row by row

An odd grid is padded with zeros. `mlp_downsample` swaps rows and columns on its way and does not
swap them back (NVLabs/VILA, base_projector.py, `flat_square`): its blocks come column by column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats import decoder
from nvmm.convert.formats.config import GELU, only, whole
from nvmm.convert.mapping import Row

TYPE = "mm_projector_type"
_DOWNSAMPLING = {"mlp_downsample": "columns", "mlp_downsample_2x2_fix": "rows"}
TYPES = ("mlp2x_gelu", "linear", *_DOWNSAMPLING)


def to_model(kind: str, width: int) -> dict[str, Any]:
    """Return our connector's config. width: the decoder's hidden size.

    Raises ValueError for a kind that is not in TYPES.
    """
    only({TYPE: kind}, TYPE, *TYPES)
    plain = {
        "_target_": "nvmm.modules.connector.MLPConnector",
        "_partial_": True,
        "downsample": 1,
        "hidden_size": None if kind == "linear" else width,
        "layernorm": False,
        "bias": True,
        "activation_func": GELU,
    }
    if kind not in _DOWNSAMPLING:
        return plain
    return plain | {
        "downsample": 2,
        "layernorm": True,
        "layernorm_epsilon": 1e-5,
        "pad_grid": True,
        "token_order": _DOWNSAMPLING[kind],
    }


def type_of(connector: Mapping[str, Any], width: int, family: str) -> str:
    """Return their name of our connector; ValueError where it has none."""
    full = whole(connector)
    kind = "linear" if full["hidden_size"] is None else "mlp2x_gelu"
    if full["downsample"] > 1:
        kind = next(k for k, order in _DOWNSAMPLING.items() if order == full["token_order"])
    decoder.expressible(connector, to_model(kind, width), family)
    return kind


def table(kind: str) -> list[Row]:
    """Return the rows of a kind, theirs as the modules of one Sequential."""
    rows = []
    numbers = {"linear": {"linear_fc1": ""}, "mlp2x_gelu": {"linear_fc1": "0.", "linear_fc2": "2."}}
    linears = numbers.get(kind, {"linear_fc1": "2.", "linear_fc2": "4."})
    for part in ("weight", "bias"):
        if kind in _DOWNSAMPLING:
            rows.append(Row(f"linear_fc1.layer_norm_{part}", (f"1.{part}",)))
        rows += [Row(f"{ours}.{part}", (f"{theirs}{part}",)) for ours, theirs in linears.items()]
    return rows
