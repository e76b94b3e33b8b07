"""Rules of a config's precision: what FP8 needs, and what would be ignored. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nvmm.config.problem import Problem, View
from nvmm.parallel.fp8_recipe import RECIPES, Fp8

FIELDS = tuple(Fp8().transformer_kwargs())
"""TransformerConfig's, which precision.fp8 decides."""
_OF_DELAYED = {
    name: getattr(Fp8(), name) for name in ("margin", "amax_history_len", "amax_compute_algo")
}


def fp8(view: View) -> Iterator[Problem]:
    """The recipe's own fields, and what Transformer Engine cannot do."""
    given = view.get("precision.fp8")
    if not isinstance(given, Mapping):
        return
    length = view.integer("precision.fp8.amax_history_len")
    if length is not None and length < 1:
        yield Problem("precision.fp8.amax_history_len", length, "must be at least 1")
    if given.get("recipe", "delayed") != "delayed":
        for name, default in _OF_DELAYED.items():
            if given.get(name, default) != default:
                yield Problem(
                    f"precision.fp8.{name}", given[name], f"is of recipe=delayed; use {default}"
                )
    ends = [f"precision.fp8.num_layers_at_{end}_in_bf16" for end in ("start", "end")]
    counts = {key: view.integer(key, 0) or 0 for key in ends}
    for key, count in counts.items():
        if count < 0:
            yield Problem(key, count, "must be at least 0")
        elif count and view.get("backend") == "transformer_engine":
            if given.get("recipe", "delayed") == "delayed":
                yield Problem(
                    key, count, "must be 0 with recipe=delayed and backend=transformer_engine"
                )


def double(view: View) -> Iterator[Problem]:
    """Double precision is for the native backend."""
    if view.get("precision.dtype") == "fp64" and view.get("backend") == "transformer_engine":
        yield Problem("precision.dtype", "fp64", "needs backend=native; use bf16")


def row_multiple(view: View) -> int:
    """Tokens of a rank that FP8 quantises before they are gathered over tensor-parallel ranks."""
    if not isinstance(view.get("precision.fp8"), Mapping):
        return 1
    recipe = view.get("precision.fp8.recipe")
    return Fp8(recipe if recipe in RECIPES else Fp8.recipe).row_multiple(gathered=True)


RULES = (fp8, double)
