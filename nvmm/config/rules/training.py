"""Rules of a config's training: sizes, schedule, adapters, profile. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nvmm.config.batch_sizes import RAMP, BatchSizes, ramp_problems
from nvmm.config.problem import MISSING, Problem, View
from nvmm.config.signatures import class_attribute, default_of

_GROUP_KEYS = {"pattern", "learning_rate", "min_learning_rate", "weight_decay"}
_ENDING = ("cosine", "linear", "minus_sqrt", "exponential")
_COMPANIONS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "data.window": ("data.pack", lambda pack: pack is True, "true"),
    "data.max_bad_fraction": ("data.on_error", lambda what: what == "skip", "skip"),
    **{
        f"optim.{name}_{unit}": ("optim.schedule", lambda name: name in _ENDING, ", ".join(_ENDING))
        for name in ("decay", "cooldown")
        for unit in ("steps", "tokens")
    },
    "trainer.max_consecutive_skips": ("trainer.on_nonfinite", lambda do: do == "skip", "skip"),
    "trainer.max_skips": ("trainer.on_nonfinite", lambda do: do == "skip", "skip"),
    "objective.teacher_temperature": (
        "objective.distillation_weight",
        lambda weight: weight != 0,
        "above 0",
    ),
    "objective.sft_per_token": ("objective.sft_weight", lambda weight: weight != 0, "above 0"),
    "logger.wandb_project": ("logger.wandb", lambda wanted: wanted is True, "true"),
}
"""Key -> the key without which it does nothing, the values at which it acts, and their words."""


def _positive_sizes(view: View) -> Iterator[Problem]:
    for key in (
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.context_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.num_layers_in_first_pipeline_stage",
        "parallel.num_layers_in_last_pipeline_stage",
        "trainer.max_steps",
        "trainer.global_batch_size",
        "trainer.micro_batch_size",
        "trainer.log_interval",
        "trainer.validation_interval",
        "trainer.validation_batches",
        "trainer.max_consecutive_skips",
        "trainer.max_skips",
        "checkpoint.save_interval",
        "checkpoint.keep_last",
        "data.sequence_length",
        "data.window",
        "data.train.local_window",
        "optim.decay_steps",
        "optim.cooldown_steps",
        *(f"optim.{name}_tokens" for name in ("warmup", "decay", "cooldown")),
    ):
        value = view.integer(key)
        if value is not None and value < 1:
            yield Problem(key, value, "must be at least 1")
    patience, most = (view.number(k) for k in ("parallel.timeout_minutes", "trainer.max_minutes"))
    if patience is not None and patience <= 0:
        yield Problem("parallel.timeout_minutes", patience, "must be above 0")
    if most is not None and most < 0:
        yield Problem("trainer.max_minutes", most, "must be at least 0, which is one step")


def _companions(view: View) -> Iterator[Problem]:
    """Refuse what is given and would not be heard."""
    for key, (other, acts, word) in _COMPANIONS.items():
        parent, _, name = key.rpartition(".")
        node = view.get(parent)
        if not isinstance(node, Mapping) or node.get(name, MISSING) == MISSING:
            continue
        default = default_of(str(node.get("_target_")), name)
        if node[name] not in (None, default) and not acts(view.get(other)):
            yield Problem(key, node[name], f"needs {other} to be {word}; or leave it out")


def _seed(view: View) -> Iterator[Problem]:
    seed = view.get("seed")
    if seed is not None and (view.integer("seed") is None or seed < 0):
        yield Problem("seed", seed, "must be a whole number of at least 0")


def _schedule(view: View) -> Iterator[Problem]:
    groups = view.get("optim.groups")
    prefixes, optim = ["optim"], view.get("optim")
    flat = {"optim": optim if isinstance(optim, Mapping) else {}}
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, Mapping):
            prefixes.append(f"optim.groups[{index}]")
            flat[prefixes[-1]] = group
    for prefix in prefixes[1:]:
        for name in flat[prefix].keys() - _GROUP_KEYS:
            allowed = f"is unknown; use {', '.join(sorted(_GROUP_KEYS))}"
            yield Problem(f"{prefix}.{name}", flat[prefix][name], allowed)
        for name in sorted(flat[prefix].keys() & _GROUP_KEYS):
            value = flat[prefix][name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (isinstance(value, str) if name == "pattern" else number):
                what = "a pattern of names" if name == "pattern" else "a number"
                yield Problem(f"{prefix}.{name}", value, f"must be {what}")
    for prefix in prefixes:
        low, high = flat[prefix].get("min_learning_rate"), flat[prefix].get("learning_rate")
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            yield Problem(
                f"{prefix}.min_learning_rate", low, f"must be at most learning_rate={high}"
            )
    yield from _schedule_lengths(view)
    betas = view.get("optim.betas")
    if view.get("optim.moments_dtype") == "bf16" and isinstance(betas, list):
        if any(isinstance(beta, int | float) and beta > 0.99 for beta in betas):
            yield Problem(
                "optim.betas", betas, "must be at most 0.99 with optim.moments_dtype=bf16"
            )


def _schedule_lengths(view: View) -> Iterator[Problem]:
    """Refuse a warm-up, a decay and a cooldown that do not fit into one another or into the run."""
    names = ("warmup", "decay", "cooldown")
    given = {u: [view.integer(f"optim.{n}_{u}") for n in names] for u in ("steps", "tokens")}
    by_tokens = any(value is not None for value in given["tokens"])
    unit = "tokens" if by_tokens else "steps"
    for name, steps in zip(names, given["steps"], strict=True):
        if by_tokens and steps:
            yield Problem(f"optim.{name}_steps", steps, "must be left out beside lengths in tokens")
    warmup, decay, cooldown = given[unit]
    warmup = warmup or 0
    # 1. The schedule is no longer than the run.
    end, what = (
        view.integer("trainer.max_steps"),
        f"trainer.max_steps={view.get('trainer.max_steps')}",
    )
    if by_tokens:
        end, what = _tokens_of_run(view), f"the tokens of {what}"
    if end is not None and warmup > end:
        yield Problem(f"optim.warmup_{unit}", warmup, f"must be at most {what}")
    # 2. What comes before the end of the decay fits in front of it.
    if decay is not None and decay < warmup:
        yield Problem(
            f"optim.decay_{unit}", decay, f"must be at least optim.warmup_{unit}={warmup}"
        )
    room = None if (decay or end) is None else max(0, (decay or end or 0) - warmup)
    if cooldown is not None and room is not None and cooldown > room:
        allowed = f"must be at most the {room} {unit} from warm-up to the end of the decay"
        yield Problem(f"optim.cooldown_{unit}", cooldown, allowed)
    # 3. Two shapes have no value without a warm-up, or without a minimum.
    if view.get("optim.schedule") == "inverse_sqrt" and not warmup:
        allowed = "must be above 0 with optim.schedule=inverse_sqrt"
        yield Problem(f"optim.warmup_{unit}", warmup, allowed)
    if view.get("optim.schedule") == "exponential" and view.get("optim.min_learning_rate") == 0:
        allowed = "must be above 0 with optim.schedule=exponential"
        yield Problem("optim.min_learning_rate", 0, allowed)


def _tokens_of_run(view: View) -> int | None:
    """Return the tokens of trainer.max_steps steps; None where the config does not say them."""
    steps = view.integer("trainer.max_steps")
    try:
        return None if steps is None else BatchSizes.of_config(view.config).tokens_before(steps)
    except (KeyError, TypeError, ValueError):
        return None


def _batch_ramp(view: View) -> Iterator[Problem]:
    ramp = view.get(RAMP)
    yield from () if ramp is None else ramp_problems(ramp, view.integer("data.sequence_length"))


def _lora(view: View) -> Iterator[Problem]:
    lora = view.get("lora")
    if lora is None:
        return
    if not isinstance(lora, Mapping) or "_target_" not in lora:
        yield Problem("lora", lora, "must be one of its options; add lora=default")
        return
    for key in ("targets", "train"):
        patterns = lora.get(key)
        if isinstance(patterns, list) and not all(isinstance(p, str) for p in patterns):
            yield Problem(f"lora.{key}", patterns, "must be a list of patterns")
    if lora.get("targets") == []:
        yield Problem("lora.targets", [], "must name at least one linear")
    rank, alpha, dropout = (view.number(f"lora.{key}") for key in ("rank", "alpha", "dropout"))
    if rank is not None and rank < 1:
        yield Problem("lora.rank", rank, "must be at least 1")
    if alpha is not None and alpha <= 0:
        yield Problem("lora.alpha", alpha, "must be positive")
    if dropout is not None and not 0 <= dropout < 1:
        yield Problem("lora.dropout", dropout, "must be at least 0 and less than 1")
    if view.get("backend") == "transformer_engine":
        yield Problem("lora", lora["_target_"], "needs backend=native")


def _reference(view: View) -> Iterator[Problem]:
    """An objective that compares with the weights of the start does so without dropout."""
    objective = str(view.get("objective._target_"))
    if class_attribute(objective, "needs_reference") is not True:
        return
    parts = [f"{view.language}.transformer", "model.vision.transformer"]
    keys = [f"{part}.{kind}_dropout" for part in parts for kind in ("hidden", "attention")]
    for key in (*keys, "lora.dropout"):
        value = view.number(key)
        if value:
            yield Problem(
                key, value, f"must be 0: {objective} compares with a pass without dropout"
            )


def _profile(view: View) -> Iterator[Problem]:
    profile = view.get("trainer.profile")
    if profile is None:
        return
    steps = profile if isinstance(profile, list) and len(profile) == 2 else [1, 0]
    if not all(isinstance(s, int) for s in steps) or steps[0] >= steps[1]:
        yield Problem("trainer.profile", profile, "must be [start, stop], start < stop, or null")


def _parts(view: View) -> Iterator[Problem]:
    """Models and builders are made of parts, which a plain value is not."""
    language = f"{view.language or 'model'}.transformer"
    needed = (language, "model.vision.transformer", "data.train.build", "data.validation.build")
    for key in (*needed, "model.language", "model.vision", "model.connector", "model.pooling"):
        parent = view.get(key.rpartition(".")[0])
        value = view.get(key)
        if (
            not isinstance(parent, Mapping)
            or parent.get(key.rpartition(".")[2], MISSING) == MISSING
        ):
            continue
        if value is None and key not in needed:
            continue
        if not isinstance(value, Mapping):
            yield Problem(key, value, "must be a mapping with the _target_ of a part")


def _run(view: View) -> Iterator[Problem]:
    identity, name, folder = (view.get(f"run.{key}") for key in ("id", "name", "dir"))
    if isinstance(identity, str) and (
        identity.strip() in ("", ".", "..") or "/" in identity or not identity.isprintable()
    ):
        yield Problem("run.id", repr(identity), "must be the name of one folder, without /")
    if isinstance(name, str) and ({"", ".", ".."} & set(name.split("/")) or not name.isprintable()):
        yield Problem("run.name", repr(name), "must be folder names, joined by /")
    for key, value in (("run.dir", folder), ("init_from", view.get("init_from"))):
        if isinstance(value, str) and not value.strip():
            yield Problem(key, repr(value), "must name a folder; null for none")
    resume = view.config.get("resume", "auto")
    no_folder = ("", "none", "false", "true", "null", "latest")
    if resume is None or (isinstance(resume, str) and resume.lower() in no_folder):
        allowed = "must be auto, never, or the folder of a checkpoint or of a run"
        yield Problem("resume", "''" if resume == "" else resume, allowed)


def _validation(view: View) -> Iterator[Problem]:
    interval, data = view.get("trainer.validation_interval"), view.get("data")
    if interval is None or not isinstance(data, Mapping) or "_target_" not in data:
        return
    reads = "validation" in data or data["_target_"] == "nvmm.data.loader.Data"
    if reads and view.get("data.validation") is None and data.get("validation") != MISSING:
        yield Problem(
            "trainer.validation_interval",
            interval,
            "must be null where data.validation is null: give it a data set, or no interval",
        )


RULES = (
    _parts,
    _run,
    _validation,
    _positive_sizes,
    _companions,
    _seed,
    _schedule,
    _batch_ramp,
    _lora,
    _reference,
    _profile,
)
