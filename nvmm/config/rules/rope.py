"""Rules of positions: rotary, scaled by `nvmm.modules.rope_scaling`, or learned. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nvmm.config.problem import Problem, View
from nvmm.config.signatures import default_of, value_of

ROOM = "nvmm.modules.rope_scaling."
KINDS = ("Linear", "Llama3", "YaRN", "DynamicNTK", "LongRoPE")


def faults(scaling: Mapping[str, Any], dim: int | None) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, value, what it must be) of each value that no model can have.

    scaling: with its `_target_`; values of another type are left to the check of types.
    dim: channels of a head that turn, where they are known.
    """
    kind = str(scaling["_target_"]).removeprefix(ROOM)

    def number(name: str) -> float | None:
        value = value_of(scaling, name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    if kind not in KINDS:
        yield "_target_", scaling["_target_"], f"must be {ROOM} with {', '.join(KINDS)}"
        return
    least = {"factor": 1, "original_max_position_embeddings": 2}
    for name, smallest in least.items():
        value = number(name)
        if value is not None and value < smallest:
            yield name, value, f"must be at least {smallest}"
    positive = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    for name in (*positive, "low_freq_factor", "high_freq_factor"):
        value = number(name)
        if value is not None and value <= 0:
            yield name, value, "must be above 0"
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        first, second = number(low), number(high)
        if first is not None and second is not None and first >= second:
            yield high, second, f"must be above {low}={first}"
    if kind == "YaRN":
        yield from _mscale(scaling)
    if kind == "DynamicNTK" and dim is not None and dim <= 2:
        yield "_target_", scaling["_target_"], f"needs more than the {dim} channels that turn"
    if kind == "LongRoPE":
        yield from _long(scaling, dim)


def _mscale(scaling: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """mscale and mscale_all_dim act together, and only without attention_factor."""
    names = ("mscale", "mscale_all_dim")
    first, second = (value_of(scaling, name) for name in names)
    if (first is None) != (second is None):
        name, other = names if first is not None else names[::-1]
        yield name, value_of(scaling, name), f"acts beside {other} alone; give both or none"
    elif first is not None and value_of(scaling, "attention_factor") is not None:
        yield "mscale", first, "would not be read beside attention_factor; leave one out"


def _long(scaling: Mapping[str, Any], dim: int | None) -> Iterator[tuple[str, Any, str]]:
    for name in ("short_factor", "long_factor"):
        values = value_of(scaling, name)
        if not isinstance(values, list):
            continue
        numbers = [x for x in values if isinstance(x, int | float) and x is not True and x > 0]
        if len(numbers) < len(values) or (dim is not None and len(values) != dim // 2):
            count = f"{dim // 2} " if dim is not None else ""
            yield name, values, f"must have {count}numbers above 0, one for each pair of channels"
    factor, attention = (value_of(scaling, name) for name in ("factor", "attention_factor"))
    if factor is None and attention is None:
        yield "factor", None, "must be given where attention_factor is not"
    elif factor is not None and attention is not None:
        yield "factor", factor, "would not be read beside attention_factor; leave one out"


def _scaling(view: View) -> Iterator[Problem]:
    key = f"{view.language}.rope_scaling"
    scaling = view.get(key) if view.language else None
    if not isinstance(scaling, Mapping) or "_target_" not in scaling:
        return
    base = view.number(f"{view.language}.rotary_base")
    if base is not None and base <= 1:
        yield Problem(f"{view.language}.rotary_base", base, f"must be above 1 with {key}")
    for name, value, allowed in faults(scaling, _turning(view)):
        yield Problem(f"{key}.{name}", value, allowed)


def _turning(view: View) -> int | None:
    """Return the channels of a head that turn, where the config says them."""
    prefix = f"{view.language}.transformer"
    channels, heads = (
        view.integer(f"{prefix}.{n}") for n in ("kv_channels", "num_attention_heads")
    )
    hidden, share = (
        view.integer(f"{prefix}.hidden_size"),
        view.number(f"{view.language}.rotary_percent"),
    )
    if channels is None and heads and hidden:
        channels = hidden // heads
    return None if channels is None else int(channels * (1.0 if share is None else share))


def learned(view: View) -> bool:
    """Return True where the language model has learned positions and turns nothing."""
    return view.get(f"{view.language}.position_embedding_type") == "learned_absolute"


def _learned(view: View) -> Iterator[Problem]:
    """Refuse keys that the model's kind of positions would not read."""
    if view.language is None:
        return
    offset_key = f"{view.language}.position_offset"
    offset = view.integer(offset_key, 0) or 0
    if offset < 0:
        yield Problem(offset_key, offset, "must be at least 0")
    kind = f"{view.language}.position_embedding_type"
    if not learned(view):
        if offset > 0:
            yield Problem(offset_key, offset, f"needs {kind}=learned_absolute; use 0")
        return
    target = str(view.get(f"{view.language}._target_"))
    keys = {name: default_of(target, name) for name in ("rotary_base", "rotary_percent")}
    keys |= {"rope_scaling": None, "transformer.no_rope_freq": None}
    for name, default in keys.items():
        value = view.get(f"{view.language}.{name}")
        if value != default and value is not None:
            yield Problem(
                f"{view.language}.{name}",
                value,
                f"would not be read with {kind}=learned_absolute; leave it out",
            )


RULES = (_scaling, _learned)
