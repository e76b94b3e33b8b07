"""Rules of a config's precision: FP8's needs, and keys that would be ignored. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nvmm.config.problem import Problem, View
from nvmm.parallel.fp8_recipe import RECIPES, Fp8

FIELDS = tuple(Fp8().transformer_kwargs())
"""Fields of TransformerConfig that precision.fp8 decides."""
_DELAYED_DEFAULTS = {
    name: getattr(Fp8(), name) for name in ("margin", "amax_history_len", "amax_compute_algo")
}


def fp8(view: View) -> Iterator[Problem]:
    """Check the recipe's own fields, and refuse those that Transformer Engine cannot follow."""
    recipe = view.get("precision.fp8")
    if not isinstance(recipe, Mapping):
        return
    delayed = recipe.get("recipe", "delayed") == "delayed"
    length = view.integer("precision.fp8.amax_history_len")
    if length is not None and length < 1:
        yield Problem("precision.fp8.amax_history_len", length, "must be at least 1")
    if not delayed:
        for name, default in _DELAYED_DEFAULTS.items():
            if recipe.get(name, default) != default:
                yield Problem(
                    f"precision.fp8.{name}", recipe[name], f"is of recipe=delayed; use {default}"
                )
    ends = [f"precision.fp8.num_layers_at_{end}_in_bf16" for end in ("start", "end")]
    counts = {key: view.integer(key, 0) or 0 for key in ends}
    for key, count in counts.items():
        if count < 0:
            yield Problem(key, count, "must be at least 0")
        elif count and delayed and view.get("backend") == "transformer_engine":
            yield Problem(
                key, count, "must be 0 with recipe=delayed and backend=transformer_engine"
            )


def double(view: View) -> Iterator[Problem]:
    """Refuse double precision with another backend than the native one."""
    if view.get("precision.dtype") == "fp64" and view.get("backend") == "transformer_engine":
        yield Problem("precision.dtype", "fp64", "needs backend=native; use bf16")


def row_multiple(view: View) -> int:
    """Return the multiple of tokens that a rank must have where it quantises before a gather.

    The gather is over tensor-parallel ranks; without FP8 the multiple is 1.
    """
    if not isinstance(view.get("precision.fp8"), Mapping):
        return 1
    recipe = view.get("precision.fp8.recipe")
    return Fp8(recipe if recipe in RECIPES else Fp8.recipe).row_multiple(gathered=True)


RULES = (fp8, double)
