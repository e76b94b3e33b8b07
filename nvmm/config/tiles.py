"""How many tokens a tile becomes, asked of the connector's class without importing it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.config.signatures import class_attribute, value_of

ATTRIBUTE = "tokens_of_tile"
"""What a connector's class says of its tokens: GRID, or the name of the parameter that is their
number. A class that says nothing is asked by running it."""
GRID = "grid"
"""Each block of `downsample` x `downsample` features of the encoder's grid becomes one token."""


def of_grid(connector: Any) -> bool:
    """Return whether a connector makes its tokens of blocks of the grid, as MLPConnector does."""
    return _said(connector) == GRID


def counts(connector: Any) -> str | None:
    """Return the key of a connector that is its number of tokens, None where none is."""
    said = _said(connector)
    return None if said == GRID or not isinstance(said, str) else said


def tokens_per_tile(vision: Mapping[str, Any], connector: Mapping[str, Any]) -> int | None:
    """Return the tokens of a tile of the encoder's native size, None where only the class knows."""
    key = counts(connector)
    if key is not None:
        return _integer(connector, key)
    image, patch = _integer(vision, "image_size"), _integer(vision, "patch_size")
    factor = _integer(connector, "downsample")
    if not (of_grid(connector) and image and patch and factor):
        return None
    side = -(-(image // patch) // factor)  # an odd grid is padded
    return side * side


def require_tokens(vision: Mapping[str, Any], connector: Mapping[str, Any]) -> int:
    """Return `tokens_per_tile`. Raises ValueError for a class that does not say."""
    tokens = tokens_per_tile(vision, connector)
    if tokens is None:
        raise ValueError(
            f"{connector.get('_target_')} does not say how many tokens a tile becomes: give the"
            f" class an attribute {ATTRIBUTE}, the name of the parameter that is their number"
        )
    return tokens


def _said(connector: Any) -> Any:
    if not isinstance(connector, Mapping):
        return None
    return class_attribute(str(connector.get("_target_")), ATTRIBUTE)


def _integer(node: Mapping[str, Any], key: str) -> int | None:
    value = value_of(node, key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
