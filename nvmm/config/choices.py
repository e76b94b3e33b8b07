"""Parameters that have one of a few values: their Literal is the one list of them.

`nvmm.config.check` reads it from the constructor's source, `require` from the type itself.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Backend = Literal["native", "transformer_engine"]
"""Whose modules a model is built of (nvmm.modules.specs)."""


def require(key: str, value: object, literal: Any) -> None:
    """Raise ValueError unless `value` is one of those that `literal` lists."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{key}={value} must be one of {', '.join(allowed)}")
