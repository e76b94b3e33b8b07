"""Nested dicts: where two of them differ, one laid over another, and the leaves of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def differences(
    first: Any,
    second: Any,
    *,
    key: str = "",
    get: Callable[[Mapping[str, Any], str], Any] = lambda node, name: node.get(name),
    in_lists: bool = False,
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in `first`, value in `second`) of every leaf that differs.

    get: reads a name of a dict, absent ones too. in_lists: lists of one length are compared item
    by item, with keys like `groups[0].pattern`; without it a list is a leaf.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in sorted(first.keys() | second.keys()):
            path = f"{key}.{name}" if key else name
            values = get(first, name), get(second, name)
            yield from differences(*values, key=path, get=get, in_lists=in_lists)
    elif in_lists and isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            yield key, first, second
            return
        for index, values in enumerate(zip(first, second, strict=True)):
            yield from differences(*values, key=f"{key}[{index}]", get=get, in_lists=True)
    elif first != second:
        yield key, first, second


def merged(base: Any, changes: Any, drop: tuple[str, ...] = ()) -> Any:
    """Return `base` with `changes` laid over it, dict by dict; neither is altered.

    A dict inside them whose `_target_` is another one replaces that of `base`: its keys are others.

    drop: names of `base` that are left out of every dict that `changes` has too.
    """
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    remaining = {name: value for name, value in base.items() if name not in drop}
    return remaining | {
        name: value if _is_another(base.get(name), value) else merged(base.get(name), value, drop)
        for name, value in changes.items()
    }


def _is_another(base: Any, changes: Any) -> bool:
    """Return whether both name a constructor, and another one each."""
    targets = [node.get("_target_") for node in (base, changes) if isinstance(node, Mapping)]
    return len(targets) == 2 and None not in targets and targets[0] != targets[1]


def flat(value: Any, separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every leaf of nested dicts; the key joins the names leading to it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from flat(item, separator, f"{prefix}{separator}{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value
