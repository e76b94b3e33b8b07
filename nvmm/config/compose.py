"""Compose an entry point's config with Hydra, check it, and refuse a bad one.

Nothing here imports torch or megatron.core: --help, --cfg and every refusal come without them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nvmm.config import check, folders
from nvmm.config.moved import MOVED, renamed
from nvmm.config.problem import Problem, nearest
from nvmm.config.signatures import completed
from nvmm.parallel.environment import SWEEP_JOB, launch_problem, local_rank, rank, world_size
from nvmm.version import line

BAD_CONFIG = 2
"""Exit code of a refused config: starting again cannot help."""
FAILED = 1
"""Exit code of a run that failed: once the cause is gone, the same command goes on."""
INTERRUPTED = 130
"""Exit code after Ctrl-C where there was nothing to save, or no patience to."""
_FIRST_SPEAKS = 5.0
"""Seconds."""
NO_LORA = "lora=null"
"""Takes away an experiment's adapters, options and all. Hydra has no override that leaves out a
group which an experiment chose."""
_FAILURES = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


@dataclass(frozen=True)
class Job:
    """One composed and checked run.

    config: resolved and plain; overrides: as typed, behind the options that say where other
    configs are; placeholders: keys that were left open and got a value that no one reads.
    """

    config: dict[str, Any]
    overrides: list[str]
    placeholders: list[str] = field(default_factory=list)


def load(entry: str, *, ranks: int | None = None, placeholders: bool = False) -> Job | None:
    """Compose `configs/<entry>.yaml` with the command line and check it.

    Args:
        ranks: with placeholders, the world size to check for; None leaves its rules out.
        placeholders: give every `???` a value that no one reads, instead of refusing it.

    Returns None when the command line asked for something else, which is then done: --help,
    --cfg, --info, or --multirun (each job in a process of its own). Exits with BAD_CONFIG, every
    problem printed to stderr, when the config is bad.
    """
    folders.register()
    typed, accepted = [sys.argv[0], *_options_first(sys.argv[1:])], set[str]()
    if "--version" in typed:  # Hydra would print its own
        print(line())
        return None
    swept = _swept_texts(typed[1:])
    # Hydra then raises what goes wrong instead of printing it and leaving with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    jobs: list[Job] = []

    def collect(composed: DictConfig) -> None:
        # 1. The overrides as the user typed them, without the ++ that this function added.
        task: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = [text[2:] if _key(text) in accepted else text for text in task]
        overrides = [swept.get(text, text) for text in overrides]
        for text in overrides:
            if (value := _plain_value(text)) is not None:
                check.restore_text(composed, entry, _key(text), value)
        overrides += [NO_LORA] * (NO_LORA in typed)
        overrides = [*_sources(typed[1:]), *overrides]
        multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        # 2. Old constructor names work, and the user is told the new ones.
        for old in sorted(_rename_targets(composed)):
            if rank() == 0:
                print(f"nvmm.{entry}: {old} is now {MOVED[old]}", file=sys.stderr)
        # 3. All problems are collected, so that one run shows them all.
        problems: list[object] = [*_without_lora(composed, overrides)]
        filled = check.fill_unset(composed) if placeholders else []
        size = ranks if placeholders else world_size()
        problems += check.check(composed, entry=entry, world_size=size)
        launch = None if placeholders else launch_problem()
        if launch is not None:
            problems.append(launch)
        if multirun and world_size() > 1:
            problems.append(
                Problem("--multirun", "", "runs one process a job; start torchrun once per job")
            )
        if problems:
            refuse(entry, problems)
        # 4. A sweep runs each job in a process of its own: process groups live once a process.
        if multirun:
            command = [sys.executable, "-m", f"nvmm.{entry}", *overrides]
            number = {SWEEP_JOB: str(HydraConfig.get().job.num)}
            status = subprocess.run(command, check=False, env=os.environ | number).returncode
            if status:
                sys.exit(status)
            return
        plain = completed(check.to_plain(composed))
        if "run" in plain and plain["run"]["name"] is None:
            plain["run"]["name"] = HydraConfig.get().runtime.choices.get("experiment") or entry
        jobs.append(Job(plain, overrides, filled))

    command = hydra.main(
        version_base="1.3", config_path=str(check.config_dir()), config_name=entry
    )(collect)
    arguments = [text for text in typed if text != NO_LORA]
    if arguments != typed and {"--cfg", "-c"} & set(typed):
        print(f"nvmm.{entry}: Hydra shows adapters that {NO_LORA} leaves out", file=sys.stderr)
    try:
        try:
            sys.argv = arguments
            command()
        except _FAILURES as error:
            # Hydra refuses a key that is in no YAML. One that a constructor has is tried again
            # with ++, which adds it.
            problems, unwritten = _explain(entry, error)
            if problems:
                refuse(entry, problems)
            accepted |= {_key(text) for text in unwritten}
            sys.argv = [f"++{text}" if text in unwritten else text for text in arguments]
            command()
    except _FAILURES as error:
        refuse(entry, [_message(error)])
    finally:
        sys.argv = typed
    return jobs[0] if jobs else None


def composed(entry: str, overrides: Sequence[str] = (), folder: str | None = None) -> DictConfig:
    """Compose `configs/<entry>.yaml` with overrides as the command line takes them.

    folder: more groups, as of --config-dir.

    Raises ValueError naming the overrides that have no place.
    """
    folders.register()
    with hydra.initialize_config_dir(str(check.config_dir()), version_base="1.3"):
        given = [text for text in overrides if text != NO_LORA]
        if folder is not None:
            given.append(f"hydra.searchpath=[file://{os.path.abspath(folder)}]")
        config, _, problems = _place(entry, given)
    if config is not None:
        problems += _without_lora(config, overrides)
    if config is None or problems:
        raise ValueError("\n".join(map(str, problems)))
    return config


def _without_lora(composed: DictConfig, overrides: Sequence[str]) -> list[Problem]:
    """Take the adapters away if `NO_LORA` says so; return the overrides that ask for some."""
    if NO_LORA not in overrides:
        return []
    composed.lora = None
    others = [text for text in overrides if text != NO_LORA and re.match(r"[+~]*lora\b", text)]
    allowed = f"contradicts {NO_LORA}; give one of them"
    return [Problem(_key(text), text.partition("=")[2], allowed) for text in others]


def _rename_targets(node: DictConfig | ListConfig) -> set[str]:
    """Exchange every old `_target_` below `node` for its new name; return the old ones."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return set()
    old_names: set[str] = set()
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child: Any = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            old_names |= _rename_targets(child)
        elif key == "_target_" and child._value() in MOVED:
            old_names.add(child._value())
            node[key] = MOVED[child._value()]
    if isinstance(node, DictConfig) and old_names and node.get("_target_") in MOVED.values():
        # Some constructors have other keys now, too.
        plain = OmegaConf.to_container(node, resolve=False)
        new = renamed(plain)
        if new != plain:
            with open_dict(node):
                for key in list(node):
                    del node[key]
                node.update(new)
    return old_names


def refuse(entry: str, problems: Sequence[object]) -> NoReturn:
    """Print what is wrong with the config, one line each, and exit with BAD_CONFIG."""
    plural = "problem" if len(problems) == 1 else "problems"
    if rank() == 0:
        lines = [f"nvmm.{entry}: {len(problems)} {plural} in the config", *problems]
        print("\n  ".join(str(line) for line in lines), file=sys.stderr)
    else:
        _wait_for_first()
        print(f"nvmm.{entry}: rank {rank()}: config refused: {problems[0]}", file=sys.stderr)
    sys.exit(BAD_CONFIG)


def _wait_for_first() -> None:
    """Let the first rank of this machine say what all of them would say.

    Its launcher then ends the others. A rank that is still there was refused for itself.
    """
    if local_rank() > 0:
        time.sleep(_FIRST_SPEAKS)


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn a ValueError, also one behind Hydra's, into the exit that a bad config gets."""
    from hydra.errors import InstantiationException

    try:
        yield
    except ValueError as error:
        refuse(name, [error])
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        refuse(name, [error.__cause__])


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """Turn what input, environment or disk did wrong into a sentence and an exit code.

    name: of the command ("train", "nvmm shard"). docs/troubleshooting.md lists the codes. What else
    is raised is a fault of the program, and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end(name, "interrupted", INTERRUPTED)
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ValueError) and _ours(error):
            _end(name, message, BAD_CONFIG)
        of_input = (ValueError, TypeError, AssertionError, ImportError, OSError)
        if "InstantiationException" in kinds and isinstance(error.__cause__, of_input):
            _end(name, " ".join(message.split()), BAD_CONFIG)  # it names the key and the target
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("nvmm"):
            extras = "nvmm doctor lists nvmm's extras"
            _end(name, f"{message}: install the package that has it ({extras})", BAD_CONFIG)
        if "OutOfMemoryError" in kinds:
            first = message.partition("\n")[0]
            _end(name, f"out of memory: {first}; try a smaller micro-batch or more ranks", FAILED)
        if "DataLoader worker" in message:
            _end(name, f"a loader process died ({message}); try fewer data.num_workers", FAILED)
        if isinstance(error, OSError) and error.filename is not None:
            path = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
            refused = isinstance(error, (*path, PermissionError)) or error.errno == errno.EROFS
            code = BAD_CONFIG if refused else FAILED
            _end(name, f"{error.filename}: {error.strerror}", code)
        if isinstance(error, OSError | FloatingPointError) or kinds & {"DistError"}:
            _end(name, message, FAILED)
        raise


def _ours(error: BaseException) -> bool:
    """Return whether nvmm's own code or a tool raised an error, not a library below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(__file__).resolve().parents[1]
    folders = (str(package), str(package.parent / "tools"))
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(folders)


def _end(name: str, message: str, code: int) -> NoReturn:
    where = f"rank {rank()}: " if world_size() > 1 else ""
    if code == BAD_CONFIG:
        _wait_for_first()
    command = name if name.startswith("nvmm ") else f"nvmm.{name}"
    print(f"{command}: {where}{message}", file=sys.stderr)
    sys.exit(code)


def instantiate(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")


def argument(text: str) -> str:
    """Return `checkpoint=DIR` or `tokenizer=DIR` with the key it means; alone it names a group."""
    return re.sub(r"^(checkpoint|tokenizer)=", r"\1.path=", text)


def log_to_stderr() -> None:
    """Log nvmm's messages to stderr, without logger names or timestamps."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nvmm").setLevel(logging.INFO)


def _explain(entry: str, error: Exception) -> tuple[list[object], list[str]]:
    """Explain Hydra's refusal by every override that it cannot place, with the nearest that it can.

    Returns (problems, overrides whose key is in no YAML, but in a constructor).
    """
    if isinstance(error, OverrideParseException):
        return [f"{error.override!r} is no override: {_message(error)} (no spaces around =)"], []
    arguments = get_args_parser().parse_args()
    overrides = list(arguments.overrides)
    if arguments.config_dir:
        overrides.append(f"hydra.searchpath=[file://{os.path.abspath(arguments.config_dir)}]")
    with hydra.initialize_config_dir(str(check.config_dir()), version_base="1.3"):
        config, unwritten, problems = _place(arguments.config_name or entry, overrides)
    if config is not None and problems:
        problems += check.check(config, entry=entry, world_size=world_size())
    return problems or ([] if unwritten else [_message(error)]), unwritten


def _place(name: str, overrides: list[str]) -> tuple[DictConfig | None, list[str], list[object]]:
    """Compose with all of the overrides that have a place.

    Returns (the config, None where an option is unknown; the overrides whose key is in no YAML, but
    in a constructor; what is wrong with the others).
    """
    loader = GlobalHydra.instance().config_loader()
    placed = {_first(text): text for text in overrides}
    unknown: dict[str, str] = {}
    unwritten: list[str] = []
    problems: list[object] = []
    groups = False
    for text in overrides:
        if (value := _plain_value(text)) is not None and loader.get_group_options(_key(text)):
            return None, [], [_unknown_option(f"{_key(text)}={value}", (), loader)]
    # Hydra stops at the first override that it cannot place. That one is set aside and the rest is
    # composed again, until all have a place; then constructors may know the keys set aside.
    while True:
        try:
            config = hydra.compose(name, list(placed))
        except _FAILURES as failure:
            culprit = _culprit(failure, list(placed))
            if culprit is None:
                return None, unwritten, [*problems, _message(failure)]
            if isinstance(failure, MissingConfigException):
                groups = True
                problems.append(_unknown_option(culprit, failure.options or (), loader))
                del placed[culprit]
            else:
                unknown[culprit] = placed.pop(culprit)
            continue
        known = [t for t in unknown if t[0] not in "+~" and check.accepts(_key(t), config)]
        if not known:
            break
        for text in known:
            unwritten.append(unknown[text])
            placed[f"++{text}"] = unknown.pop(text)
    problems += [_unknown_key(text, config, loader) for text in unknown]
    return None if groups else config, unwritten, problems


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _plain_value(override: str) -> str | None:
    """Return the characters of an override's value where Hydra reads no text there, else None."""
    if override.startswith("~") or "=" not in override:
        return None
    value = OverridesParser.create().parse_override(override).value()
    if isinstance(value, bool | int | float) or value is None:
        return override.partition("=")[2].strip()
    return None


def _swept_texts(arguments: Sequence[str]) -> dict[str, str]:
    """Map the overrides that Hydra makes of `key=a,b` for single jobs to what was typed.

    Hydra writes 007 as 7 there. A list with brackets or quotes keeps its characters by itself.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "," not in value or set(value) & set("[](){}'\""):
            continue
        with contextlib.suppress(HydraException):
            override = OverridesParser.create().parse_override(argument)
            if override.is_choice_sweep():
                jobs = override.sweep_string_iterator()
                for job, text in zip(jobs, value.split(","), strict=True):
                    texts[f"{key}={job}"] = f"{key}={text.strip()}"
    return texts


def _options_first(arguments: Sequence[str]) -> list[str]:
    """Return a command line with its options before the overrides, as Hydra's parser wants it."""
    actions = get_args_parser()._option_string_actions
    words, options, others = list(arguments), list[str](), list[str]()
    while words:
        word = words.pop(0)
        (options if word.startswith("-") else others).append(word)
        action = actions.get(word)
        if action is None or not words:
            continue
        if action.nargs is None or (action.nargs == "?" and words[0] in (action.choices or ())):
            options.append(words.pop(0))
    return [*options, *others]


def _sources(arguments: Sequence[str]) -> list[str]:
    """Return what of a command line says where configs are: --config-dir and its like."""
    parsed = get_args_parser().parse_args(list(arguments))
    options = {"--config-dir": parsed.config_dir, "--config-name": parsed.config_name}
    found = [f"{name}={value}" for name, value in options.items() if value is not None]
    return found + [text for text in parsed.overrides if _key(text) == "hydra.searchpath"]


def _first(override: str) -> str:
    """Return the first job's part of an override that `--multirun` would go through."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{override.partition('=')[0]}={next(iter(parsed.sweep_string_iterator()))}"


def _culprit(error: Exception, overrides: list[str]) -> str | None:
    """Return the override that `error` is about, None for an error about none of them."""
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        missing = getattr(error, "missing_cfg_file", None)
        if missing and missing == f"{override.key_or_group}/{override.value()}":
            return text
        named = re.search(r"'([^']+)'", str(error))
        if named and str(error).startswith("Could not override"):
            if named[1] in (override.key_or_group, override.get_key_element().lstrip("+~")):
                return text
    return None


def _unknown_option(override: str, known: Sequence[str], loader: ConfigLoader) -> Problem:
    group, _, option = override.lstrip("+~").partition("=")
    options = sorted({*known, *_options(loader, group.partition("@")[0])})
    closest = nearest(option, options)
    hint = f"; did you mean {closest}?" if closest else ""
    return Problem(group, option, f"does not exist{hint} (there are {', '.join(options)})")


def _unknown_key(override: str, composed: DictConfig, loader: ConfigLoader) -> Problem:
    key, _, value = override.lstrip("+~").partition("=")
    if "=" in override and not override.startswith(("+", "~")):
        names = {str(name) for name in composed} | set(loader.list_groups(""))
        closest = check.suggestion(key, composed) or nearest(key, names)
        hint = f"; did you mean {closest}?" if closest else ""
        return Problem(key, value, f"does not exist{hint}")
    return Problem(key, value, "does not exist")


def _options(loader: ConfigLoader, group: str) -> list[str]:
    options = loader.get_group_options(group, ObjectType.CONFIG)
    for name in loader.get_group_options(group, ObjectType.GROUP):
        options += [f"{name}/{option}" for option in _options(loader, f"{group}/{name}")]
    return options


def _message(error: BaseException) -> str:
    """Return an error's own words on one line, with those of its cause."""
    texts = [str(e).split("\nConfig search path")[0] for e in (error, error.__cause__) if e]
    if texts[-1] in texts[0]:
        texts = texts[:1]  # it has its cause's words in its own
    return "; ".join(" ".join(text.split()) for text in texts if text.strip())
