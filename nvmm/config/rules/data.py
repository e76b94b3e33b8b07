"""Rules of a config's data: its images must fit the model, its blend must add up. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nvmm.config import tiles
from nvmm.config.problem import Problem, View, divisors
from nvmm.config.signatures import class_attribute

_NESTED_KEYS = ("name", "weight", "temperature", "blend")
_DATASET_KEYS = (
    *("name", "weight", "passes", "repeat", "epochs", "samples"),
    *("shards", "build", "local_window", "index_dir", "storage"),
)


def vision(view: View) -> Iterator[Problem]:
    image, patch = view.integer("model.vision.image_size"), view.integer("model.vision.patch_size")
    if not image or not patch:
        return
    if image < patch:
        allowed = f"must be at least model.vision.patch_size={patch}"
        yield Problem("model.vision.image_size", image, allowed)
        return
    connector = view.get("model.connector")
    per_tile: int | None = None
    named = isinstance(connector, Mapping) and "_target_" in connector
    if not named or tiles.of_grid(connector):
        grid, downsample = image // patch, view.integer("model.connector.downsample", 1) or 1
        if view.get("model.connector.pad_grid") is True:
            grid = -(-grid // downsample) * downsample
        if grid % downsample:
            yield Problem(
                "model.connector.downsample",
                downsample,
                f"must divide the ViT grid ({grid}x{grid}); use one of {divisors(grid)}, or"
                " model.connector.pad_grid=true",
            )
            return
        per_tile = (grid // downsample) ** 2
    elif (key := tiles.counts(connector)) is not None:
        per_tile = view.integer(f"model.connector.{key}")
    length = view.integer("data.sequence_length")
    for split in ("train", "validation"):
        build = f"data.{split}.build"
        size = view.integer(f"{build}.tile_size")
        if size is not None and size != image:
            yield Problem(f"{build}.tile_size", size, f"must equal model.vision.image_size={image}")
        tokens = view.integer(f"{build}.tokens_per_tile")
        if None not in (tokens, per_tile) and tokens != per_tile:
            yield Problem(
                f"{build}.tokens_per_tile",
                tokens,
                f"must be {per_tile}, what model.vision and model.connector make of a tile",
            )
        most = view.integer(f"{build}.max_tiles")
        least = view.integer(f"{build}.min_tiles")
        if most is None:
            continue
        if least is not None and least > most:
            yield Problem(f"{build}.min_tiles", least, f"must be at most max_tiles={most}")
        thumbnail = most > 1 and view.get(f"{build}.use_thumbnail") is not False
        count = most + thumbnail
        attended = view.get(f"{build}.attended")
        placed = 0 if attended == "all" else 1 if attended == "regular" else count
        tagged = view.get(f"{build}.tags.variant") != "none"
        # A tag has at least one token, and one target must follow the image.
        each = per_tile or tokens or 0  # what only the class knows, the data say
        needed = placed * each + (placed or count) * tagged + 1
        if length is not None and length < needed:
            yield Problem(
                "data.sequence_length",
                length,
                f"must hold an image of {count} tiles ({build}.max_tiles={most}), {placed} of them"
                f" x {each} tokens, their tags and text: at least {needed}, or fewer tiles",
            )


def attended(view: View) -> Iterator[Problem]:
    """Check that the data leave tiles to cross-attention exactly where the model has it."""
    if view.get("model.vision") is None:
        return
    attends = view.get("model.cross_attention") is not None
    for split in ("train", "validation"):
        build = view.get(f"data.{split}.build")
        if not isinstance(build, Mapping) or "tokens_per_tile" not in build:
            continue
        key, value = f"data.{split}.build.attended", build.get("attended") or "none"
        if attends and value == "none":
            yield Problem(key, value, "must be all (NVLM-X) or regular (NVLM-H) with this model")
        if not attends and value != "none":
            yield Problem(key, value, "must be none: the model has no model.cross_attention")
    if attends and view.size("pipeline") > 1:
        key = "parallel.variable_seq_lengths"
        if view.get(key) is False:
            yield Problem(key, False, "must be true: what a stage sends depends on the tiles")


def validation(view: View) -> Iterator[Problem]:
    """Check that validation, which reads its samples once in the files' order, is not blended."""
    key = "data.validation.local_window"
    if view.get(key) is not None:
        yield Problem(key, view.get(key), "must be null: validation is not shuffled")


def extras(view: View) -> Iterator[Problem]:
    """The data give what the objective needs, and nothing that nobody reads."""
    objective, model = (str(view.get(f"{part}._target_")) for part in ("objective", "model"))
    # A model with encoders reads the extras of its language model.
    reader = str(view.get(f"{view.language or 'model'}._target_"))
    needed, read = class_attribute(objective, "extras"), class_attribute(reader, "extras")
    if needed is not None and view.get("objective.reference") == "data":
        needed |= {"reference"}
    entries = view.get("data.blend")
    builders = [f"data.{split}.build" for split in ("train", "validation")]
    targets = {key: view.get(f"{key}._target_") for key in builders}
    scored = {key: view.get(f"{key}.reference") for key in builders}
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        build = entry.get("build") if isinstance(entry, Mapping) else None
        if isinstance(build, Mapping):
            key = f"data.blend[{index}].build"
            targets[key], scored[key] = build.get("_target_"), build.get("reference")
    for key, target in targets.items():
        given = class_attribute(str(target), "extras") if target else None
        if given is None or needed is None or read is None:
            continue  # not from source: the first batch shows it
        if scored[key] is not None:
            given |= {"reference"}
            if "chosen" in given and "reference" not in needed | read:
                allowed = "needs objective.reference=data: the step would run the reference again"
                yield Problem(f"{key}.reference", scored[key], allowed)
                continue
        elif given - {"reference"} >= needed - {"reference"} and "reference" in needed - given:
            allowed = "must name the output of job=score, as objective.reference=data"
            yield Problem(f"{key}.reference", None, allowed)
            continue
        name = f"{key}._target_"
        if needed - given:
            missing = ", ".join(sorted(needed - given))
            yield Problem(name, target, f"gives no {missing}, which objective={objective} needs")
        elif given - needed - read:
            unread = ", ".join(sorted(given - needed - read))
            yield Problem(
                name, target, f"gives {unread}, which neither {objective} nor {model} reads"
            )


def blend(view: View) -> Iterator[Problem]:
    fraction = view.number("data.max_bad_fraction")
    if fraction is not None and not 0 <= fraction <= 1:
        yield Problem("data.max_bad_fraction", fraction, "must be in [0, 1]")
    entries = view.get("data.blend")
    shards = view.get("data.train.shards")
    if entries is not None:
        if shards is not None:
            yield Problem("data.train.shards", shards, "must be null where data.blend is given")
        yield from _blend_entries(entries, "data.blend")
    elif isinstance(train := view.get("data.train"), Mapping):
        named = "shards" in train or "blend" in view.get("data")
        if named and train.get("shards") in (None, []):
            yield Problem("data.train.shards", shards, "must name files, or give data.blend")


def _blend_entries(entries: Any, key: str) -> Iterator[Problem]:
    if not isinstance(entries, list) or not entries:
        yield Problem(key, entries, "must be a list of datasets, or null")
        return
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        if not isinstance(entry, Mapping):
            yield Problem(where, entry, "must be a mapping: {name: ..., weight: ..., shards: ...}")
            continue
        nested = entry.get("blend") is not None
        known = _NESTED_KEYS if nested else _DATASET_KEYS
        for name in entry.keys() - known:
            yield Problem(f"{where}.{name}", entry[name], f"must be one of {', '.join(known)}")
        if nested:
            yield from _blend_entries(entry["blend"], f"{where}.blend")
        elif entry.get("shards") is None:
            yield Problem(f"{where}.shards", None, "must name files, or give a nested blend")
        build = entry.get("build")
        if build is not None and not (isinstance(build, Mapping) and "_target_" in build):
            allowed = "must be a whole builder, as data.train.build: it needs a _target_"
            yield Problem(f"{where}.build", build, allowed)
        for name in ("weight", "passes", "temperature", "repeat", "samples", "local_window"):
            value = entry.get(name)
            if isinstance(value, int | float) and not 0 < value < math.inf:  # nor NaN
                yield Problem(f"{where}.{name}", value, "must be greater than 0 and finite")
        epochs = entry.get("epochs")
        if epochs is not None and not (isinstance(epochs, int) and epochs >= 0):
            yield Problem(f"{where}.epochs", epochs, "must be a whole number, 0 or more, or null")
    weighted = [isinstance(e, Mapping) and e.get("weight") is not None for e in entries]
    if any(weighted) and not all(weighted):
        where = f"{key}[{weighted.index(False)}].weight"
        yield Problem(where, None, "must be given: other datasets of this list have a weight")
    yield from _passes(entries, key)


def _passes(entries: list[Any], key: str) -> Iterator[Problem]:
    """Check that all entries of the whole blend have passes where one has, and no other share."""
    given = [isinstance(entry, Mapping) and entry.get("passes") is not None for entry in entries]
    if not any(given):
        return
    if key != "data.blend":
        where, first = f"{key}[{given.index(True)}].passes", entries[given.index(True)]["passes"]
        yield Problem(where, first, "must stand in data.blend itself: nested lists share a weight")
    elif not all(given):
        where = f"{key}[{given.index(False)}].passes"
        yield Problem(where, None, "must be given: other datasets of data.blend have passes")
    for index, entry in enumerate(entries):
        if not given[index]:
            continue
        if isinstance(entry["passes"], bool) or not isinstance(entry["passes"], int | float):
            yield Problem(f"{key}[{index}].passes", entry["passes"], "must be a number above 0")
        for other in ("weight", "repeat", "epochs"):
            if entry.get(other) is not None:
                where = f"{key}[{index}].{other}"
                yield Problem(where, entry[other], "must be left out beside passes, which say it")


def asking(view: View) -> Iterator[Problem]:
    """Options of evaluation and generation."""
    for key in ("batch_size", "num_samples", "max_new_tokens", "benchmark.max_new_tokens"):
        value = view.integer(key)
        if value is not None and value < 1:
            yield Problem(key, value, "must be at least 1")
    fraction, temperature = view.number("max_bad_fraction"), view.number("temperature")
    if fraction is not None and not 0 <= fraction <= 1:
        yield Problem("max_bad_fraction", fraction, "must be in [0, 1]")
    if temperature is not None and not 0 <= temperature < float("inf"):
        yield Problem("temperature", temperature, "must be 0 (greedy) or more")
    top_p = view.number("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        yield Problem("top_p", top_p, "must be above 0 and at most 1")
    elif top_p is not None and top_p < 1 and temperature == 0:
        yield Problem("top_p", top_p, "needs temperature > 0: a greedy answer draws nothing")


def longest(view: View) -> Iterator[Problem]:
    """Refuse sequences longer than the model's longest."""
    length, limit = view.integer("data.sequence_length"), view.max_sequence_length
    if length is not None and limit is not None and length > limit:
        key = f"{view.language}.max_sequence_length"
        yield Problem("data.sequence_length", length, f"must be at most {key}={limit}")


RULES = (vision, attended, validation, extras, blend, asking, longest)
