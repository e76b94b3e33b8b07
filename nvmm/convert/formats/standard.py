"""The fields of a config.json as Transformers reads them, whatever their spelling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from nvmm.convert.formats.config import need

_ROPE_SPELLINGS = ("rope_scaling", "rope_theta", "partial_rotary_factor")
"""Fields that Transformers moves into rope_parameters."""


def standard(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with everything that Transformers' class of its model_type fills in.

    Fields that are left out have that class's defaults, in nested configs too. The base, the type
    and the partial factor of RoPE are in `rope_parameters` alone. A second call changes nothing.

    Raises ValueError for a model_type without a class, and for values that the class refuses.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = need(hf, "model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"config.json: Transformers has no class of model_type={model_type!r}")
    try:
        filled = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(hf))).to_dict()
    except Exception as error:  # Each class has errors of its own.
        raise ValueError(f"config.json: Transformers refuses it: {error}") from error
    of_every_class = PreTrainedConfig().to_dict()
    given = {key: value for key, value in hf.items() if key not in _ROPE_SPELLINGS}
    return given | {key: value for key, value in filled.items() if key not in of_every_class}
