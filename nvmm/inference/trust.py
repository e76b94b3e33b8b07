"""The constructors that a checkpoint's config may name: opening one runs nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TRUSTED = (
    *(
        "nvmm.models.",
        "nvmm.modules.",
        "nvmm.data.",
        "nvmm.parallel.setup.",
        "nvmm.parallel.fp8_recipe.",
    ),
    *("nvmm.kernels.library.", "megatron.core."),
)


# Functions of torch say that they live in one of these.
_TRUSTED_FUNCTIONS = ("torch", "torch.nn.functional", "torch._C._nn")
_FUNCTIONAL = "torch.nn.functional."


_GET_METHOD = "hydra.utils.get_method"


_ADVICE = "if you trust whoever wrote it, add trust_config=true (nvmm convert: --trust-config)"


def require_trusted(config: Any, path: Path, advice: str = _ADVICE) -> None:
    """Raise ValueError for a config that would run more than nvmm's and mcore's constructors.

    The error names every such `_target_`, and every interpolation: a saved config is resolved and
    has none. advice: what to do about it, where the command has no such option.
    """
    foreign = sorted(set(_foreign(config)))
    if foreign:
        raise ValueError(f"{path}: its config would run {', '.join(foreign)}; {advice}")


def _foreign(node: Any) -> Iterator[str]:
    """Yield everything in a config that would run other code."""
    if isinstance(node, str) and "${" in node:
        yield node
    if isinstance(node, list):
        for item in node:
            yield from _foreign(item)
    if not isinstance(node, Mapping):
        return
    for value in node.values():
        yield from _foreign(value)
    target = str(node.get("_target_", ""))
    if target == _GET_METHOD:
        if _home(str(node.get("path")), ("torch.",)) not in _TRUSTED_FUNCTIONS:
            yield f"{_GET_METHOD}({node.get('path')})"
    elif node.get("_partial_") is True and _home(target, (_FUNCTIONAL,)) in _TRUSTED_FUNCTIONS[1:]:
        return  # an activation with options, which only a model's layers call
    elif target and not f"{_home(target, _TRUSTED)}.".startswith(_TRUSTED):
        yield target


def _home(name: str, prefixes: tuple[str, ...]) -> str:
    """Return the module that defines `name`'s function, empty where it has none of the prefixes.

    A name alone says little: `torch.nn.functional.torch.os.system` is os.system.
    """
    if not name.startswith(prefixes):
        return ""
    module, _, rest = name.partition(".")
    value: Any = importlib.import_module(module)
    path = module
    for attribute in rest.split("."):
        path = f"{path}.{attribute}"
        if not hasattr(value, attribute):
            try:
                importlib.import_module(path)
            except ImportError:
                return ""
        value = getattr(value, attribute, None)
    return str(getattr(value, "__module__", "")) if callable(value) else ""
