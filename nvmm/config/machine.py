"""What a config asks of this machine: files that are there, weights that fit, space on the disk.

Everything is read from names, sizes and JSON, so that a refusal comes before torch.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvmm.config.parts import part_alone
from nvmm.config.problem import Problem, View

_TOKENIZERS = ("tokenizer*.json", "*.model", "vocab.*", "tekken.json")
_SHAPES = ("hidden_size", "ffn_hidden_size", "num_query_groups", "kv_channels")
"""Fields of a TransformerConfig that make a weight another shape whatever the other fields are."""


def missing_folders(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each of the keys whose local path is not there.

    `tokenizer.path` must be a folder with a tokenizer, `checkpoint.path` and `init_from` a
    checkpoint or a run with one.
    """
    for key in keys:
        value = View(config).get(key)
        if not isinstance(value, str):
            continue
        path = Path(value).expanduser()
        if not path.exists():
            yield Problem(key, value, "does not exist")
        elif key == "tokenizer.path" and not any(any(path.glob(each)) for each in _TOKENIZERS):
            yield Problem(
                key, value, "is no tokenizer's folder: no tokenizer.json, *.model, vocab.*"
            )
        elif key in ("checkpoint.path", "init_from") and newest_state(path) is None:
            yield Problem(key, value, "is neither a checkpoint nor a run directory with one")


def unmatched(key: str, patterns: str | Sequence[str] | None) -> Iterator[Problem]:
    """Yield a problem for each pattern of local files that none matches.

    Remote ones, and those with braces, are the index's to look for. A name that is there is no
    pattern, whatever brackets are in it.
    """
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        local = os.path.expanduser(pattern)
        if not set("{|:") & set(pattern) and not (os.path.exists(local) or glob.glob(local)):
            yield Problem(key, pattern, "matches no file")


def newest_state(path: Path) -> Path | None:
    """Return the folder of a checkpoint's state.json, of a run the one with most steps.

    It is what the config alone can tell; `nvmm.checkpoint.files.find` looks whether it is whole.
    """
    return next(iter(states(path)), None)


def states(path: Path) -> list[Path]:
    """Return the folders of a checkpoint's state.json, of a run all, that of most steps first."""
    if (path / "state.json").is_file():
        return [path]
    found = sorted(path.glob("checkpoints/step_*/state.json"), reverse=True)
    return [file.parent for file in found]


def misfits(
    saved: Mapping[str, Any], model: Mapping[str, Any], source: str, key: str = "model"
) -> Iterator[Problem]:
    """Yield the sizes of `model` at which the weights of a model `saved` have another shape.

    saved: the config of the model that `source` (init_from) was saved with; that of a language
    model or an encoder alone is compared with this part of `model`.
    """
    part = part_alone(saved) if key == "model" else None
    if part is not None and isinstance(model.get(part), Mapping):
        model, key = model[part], f"model.{part}"
    for name in saved.keys() & model.keys():
        before, now = saved[name], model[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from misfits(before, now, source, f"{key}.{name}")
        elif name == "padded_vocab_size" or (key.endswith("transformer") and name in _SHAPES):
            if isinstance(before, int) and isinstance(now, int) and before != now:
                yield Problem(f"{key}.{name}", now, f"must be {before} for init_from={source}")


def disk(config: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    """Yield a problem where a disk cannot hold the checkpoints that a config asks for.

    folder: the run's, which need not exist yet. Only weights and optimizer state of the decoder are
    counted, at their smallest, so that nothing is refused that would fit.
    """
    size = checkpoint_bytes(config)
    view = View(config)
    interval, steps = view.integer("checkpoint.save_interval"), view.integer("trainer.max_steps")
    kept = view.integer("checkpoint.keep_last")
    if not size or not steps:
        return
    names = [path.name.removeprefix("step_") for path in folder.glob("checkpoints/step_*")]
    there, done = len(names), max([int(name) for name in names if name.isdecimal()], default=0)
    if done >= steps:
        return  # a finished run writes nothing
    saves = -(-steps // interval) - done // interval if interval else 1
    # The next one is written before the oldest is removed.
    count = saves + there if kept is None else min(saves + there, kept + 1)
    folder /= "checkpoints"  # it may lead to another disk
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = max(count - there, 0) * size
    if needed > free:
        allowed = (
            f"makes {count} checkpoints of at least {size / 1e9:.0f} GB at a time, and {folder} has"
            f" {free / 1e9:.0f} GB free: use another run.dir, or keep fewer"
        )
        yield Problem("checkpoint.keep_last", kept, allowed)


def checkpoint_bytes(config: Mapping[str, Any]) -> int:
    """Return the fewest bytes of a checkpoint, 0 where the config does not tell."""
    view = View(config)
    prefix = "model.language" if view.get("model.language") else "model"
    sizes = {
        name: view.integer(f"{prefix}.transformer.{name}")
        for name in ("num_layers", "hidden_size", "ffn_hidden_size")
    }
    layers, hidden, ffn = sizes.values()
    vocabulary = view.integer(f"{prefix}.padded_vocab_size")
    if not (layers and hidden and ffn and vocabulary) or view.get("lora") is not None:
        return 0
    # Query and output projections, two linears of the MLP, and the embedding.
    parameters = layers * (2 * hidden * hidden + 2 * hidden * ffn) + vocabulary * hidden
    weight = 4 if view.get("precision.dtype") in ("fp32", "fp64") else 2
    # Frozen weights have no optimizer state, and patterns of names may freeze any.
    state = 0 if view.get("optim.freeze") else 4 + 2 * 2
    return parameters * (weight + state)
