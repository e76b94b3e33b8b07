"""Parameters that have one of a few values, which a Literal lists in one place.

`nvmm.config.check` reads the Literal from the constructor's source, `require` from the type.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Backend = Literal["native", "transformer_engine"]
"""The package whose modules a model is built of (nvmm.modules.specs)."""


def require(key: str, value: object, literal: Any) -> None:
    """Raise ValueError unless `value` is one of those that `literal` lists."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{key}={value} must be one of {', '.join(allowed)}")
