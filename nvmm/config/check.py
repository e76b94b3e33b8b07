"""Check a composed config before torch or megatron.core is imported.

`check` compares every `_target_` with its constructor's signature (nvmm.config.signatures), lists
every `???`, and applies the cross-field rules (nvmm.config.rules): all problems at once.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nvmm.config.blends import with_whole_builders
from nvmm.config.problem import MISSING, Problem, View, nearest
from nvmm.config.rules.all import violations
from nvmm.config.signatures import Parameter, Signature, UnknownTargetError, signature

_SPECIAL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_LOOKUPS = {f"hydra.utils.get_{kind}" for kind in ("class", "method", "object", "static_method")}

# Words that users of other trainers know -> ours.
_SYNONYMS = {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "max_lr": "learning_rate",
    "max_grad_norm": "clip_grad",
    "grad_clip": "clip_grad",
    "lr_scheduler_type": "schedule",
    "warmup": "warmup_steps",
    "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "logging_steps": "log_interval",
    "eval_steps": "validation_interval",
    "save_steps": "save_interval",
    "save_total_limit": "keep_last",
    "resume_from_checkpoint": "resume",
    "output_dir": "dir",
    "seq_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "sp": "sequence_parallel",
}


# The types of the keys that no constructor has, for each command.
_ASKING = {
    "checkpoint.path": "str",
    "tokenizer.path": "str | None",
    "base": "str | None",
    "backend": "Literal['native', 'transformer_engine'] | None",
    "kernels": "dict | None",
    "sequence_length": "int | None",
    "max_new_tokens": "int | None",
    "temperature": "float",
    "top_p": "float",
    "use_cache": "bool",
    "seed": "int",
    "trust_config": "bool",
}
_TYPES: dict[str, dict[str, str]] = {
    "train": {
        "seed": "int",
        "backend": "Literal['native', 'transformer_engine']",
        "resume": "str | None",
        "init_from": "str | None",
        **{f"run.{name}": "str | None" for name in ("name", "id", "dir", "note")},
    },
    "evaluate": {
        **_ASKING,
        **{"batch_size": "int", "num_samples": "int | None", "output": "str | None"},
    },
    "job": {**_ASKING, **{"checkpoint.path": "str | None", "output": "str"}},
    "generate": {
        **_ASKING,
        **{"prompt": "str", "system": "str | None", "image": "str | list[str] | None"},
    },
}
OmegaConf.register_new_resolver(
    "nvmm.given", lambda key, value: None if key is None else value, replace=True
)

_OPEN_NUMBERS = ("sequence_length", "max_steps", "global_batch_size")
_NUMBER_PLACEHOLDER = 65_536  # The usual sizes divide it, so that no rule refuses it.


def config_dir() -> Path:
    """Return the folder of the YAML files: beside the package in a checkout, else inside it."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def option(group: str, name: str) -> dict[str, Any]:
    """Return one option of a config group, as its YAML has it, without defaults."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{name}.yaml"))
    return plain


def check(
    config: DictConfig | Mapping[str, Any], *, entry: str = "train", world_size: int | None = None
) -> list[Problem]:
    """Return every problem of `config`, as `configs/<entry>.yaml` composes it.

    world_size: number of ranks; None leaves out the rules that need it.
    """
    # 1. Values that are not set, and interpolations that lead nowhere.
    plain, problems = resolve(config)
    # 2. Keys outside any constructor, which only the primary YAML may name.
    schema = _schema(entry)
    problems += _unknown_keys(plain, schema, "", f"configs/{entry}.yaml")
    problems += [Problem(k, None, "is missing; leave out the ~") for k in schema.keys() - plain]
    # 3. Every `_target_` against its constructor's signature.
    for key, value in plain.items():
        problems += _check_node(value, key)
        if isinstance(schema.get(key), Mapping) and not isinstance(value, Mapping):
            problems.append(Problem(key, value, f"must be a mapping, as in configs/{entry}.yaml"))
        if schema.get(key) == MISSING and isinstance(value, Mapping) and "_target_" not in value:
            problems.append(Problem(f"{key}._target_", None, "must name a class or function"))
    for name, parameter in _types(entry).items():
        for value in _values_at(plain, name):
            problems += _check_type(parameter, value, name)
    problems += _not_finite(plain)
    # 4. The rules between keys, which tolerate values that the steps before have reported.
    return problems + violations(plain, world_size)


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` resolved, as dicts and lists. Raises ValueError when something is not set."""
    plain, problems = resolve(config)
    if problems:
        raise ValueError("\n".join(str(p) for p in problems))
    return plain


def fill_unset(config: DictConfig) -> list[str]:
    """Put a placeholder at every `???` but whole groups that were not chosen; return the keys."""
    keys = [problem.key for problem in resolve(config)[1] if problem.value == MISSING]
    keys = [key for key in keys if not (config_dir() / key).is_dir()]
    longest = View(resolve(config)[0]).max_sequence_length or _NUMBER_PLACEHOLDER
    for key in keys:
        number = key.rpartition(".")[2] in _OPEN_NUMBERS
        value: int | str = _NUMBER_PLACEHOLDER if number else "synthetic"
        if key == "data.sequence_length":
            value = min(longest, _NUMBER_PLACEHOLDER)
        OmegaConf.update(config, key, value)
    return keys


def digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a resolved config, independent of the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def resolve(config: DictConfig | Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Follow every interpolation; return the plain config and a problem for each that is bad.

    A value that is not set stays `???` and is a problem too. Builders of a blend become whole ones
    (`nvmm.config.blends`).
    """
    problems: list[Problem] = []

    def plain(node: Any, key: str) -> Any:
        if isinstance(node, DictConfig) and not node._is_none():
            return {str(name): child(node, name, f"{key}.{name!s}".lstrip(".")) for name in node}
        if isinstance(node, ListConfig) and not node._is_none():
            return [child(node, i, f"{key}[{i}]") for i in range(len(node))]
        return None if isinstance(node, DictConfig | ListConfig) else node

    def child(node: Any, name: Any, key: str) -> Any:
        if not OmegaConf.is_interpolation(node, name) and OmegaConf.is_missing(node, name):
            # A key of the top level is a group, which is chosen, but for init_from.
            unset = f"is not set; add {key}=... to the command"
            if key == "init_from":
                unset += ": a checkpoint or run folder, or null to start from the seed"
            elif "." not in key and "trainer" in config:
                unset = f"is not chosen; add experiment=... or {key}=... to the command"
                unset += " (--help lists both)"
            problems.append(Problem(key, MISSING, unset))
            return MISSING
        try:
            return plain(node[name], key)
        except InterpolationToMissingValueError:
            return MISSING  # the key it refers to is reported
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node, resolve=False)
            text = raw[name]  # type: ignore[index,call-overload]
            first_line = str(error).strip().partition("\n")[0]
            problems.append(Problem(key, text, f"cannot be resolved: {first_line}"))
            return MISSING

    if not isinstance(config, DictConfig):
        config = OmegaConf.create(dict(config))
    return with_whole_builders(plain(config, "")), problems


def suggestion(key: str, config: DictConfig | Mapping[str, Any]) -> str | None:
    """Return the key most like `key` that `config` or the constructor it belongs to has."""
    node: Any = resolve(config)[0]
    done: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return ".".join(done) or None
        names = {str(name) for name in node} - _SPECIAL
        names |= {p.name for p in _parameters(node).values()}
        if part not in node:
            closest = _closest(part, names)
            return ".".join([*done, closest]) if closest else None
        done.append(part)
        node = node[part]
    return None


def accepts(key: str, config: DictConfig | Mapping[str, Any]) -> bool:
    """Return True when `config`, which lacks `key`, may have it.

    It may when some constructor has that parameter, or has a mapping of any keys there.
    """
    node: Any = resolve(config)[0]
    inside = False
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        if not isinstance(node, Mapping):
            return False
        if part in node:
            inside = inside or "_target_" in node
            node = node[part]
            continue
        if "_target_" not in node:
            return inside or (depth > 1 and not node)  # {} takes any key
        parameter = _parameters(node).get(part)
        if parameter is None:
            return _signature(node).any_keyword
        kinds = None if parameter.annotation is None else _allowed(parameter.annotation)
        return depth == len(parts) or "a mapping" in (kinds or ())
    return True


def restore_text(config: DictConfig, entry: str, key: str, text: str) -> None:
    """Put an override's own characters where Hydra read a number, and the key wants text.

    `run.id=007` is the text 007, `1e5` and `1_000` are themselves, and so is `Null`; `null` is null
    where the key may be null.
    """
    parameter = _types(entry).get(key)
    plain = resolve(config)[0]
    if parameter is None:
        *path, name = key.split(".")
        parent = next(_values_at(plain, ".".join(path)), None) if path else plain
        if isinstance(parent, Mapping) and "_target_" in parent:
            parameter = _parameters(parent).get(name)
        elif path:  # a value of a constructor's mapping of texts
            *path, field = path
            owner = next(_values_at(plain, ".".join(path)), None) if path else plain
            of_mapping = _parameters(owner).get(field) if isinstance(owner, Mapping) else None
            item = None if of_mapping is None else _item(of_mapping.annotation, parent)
            parameter = None if item is None else Parameter(name, item, False, False, True)
    if parameter is None or parameter.annotation is None:
        return
    kinds = _allowed(parameter.annotation) or []
    for value in _values_at(plain, key):
        fits = any(_fits(value, kind) for kind in kinds)
        if value is None:
            fits = text == "null"
        if not fits and ("str" in kinds or (text,) in kinds):
            OmegaConf.update(config, key, text)


@functools.cache
def _types(entry: str) -> dict[str, Parameter]:
    return {
        key: Parameter(key, ast.parse(text, mode="eval").body, False, False, True)
        for key, text in _TYPES.get(entry, {}).items()
    }


def _values_at(plain: Mapping[str, Any], key: str) -> Iterator[Any]:
    """Yield the value at a dotted key, if there is that key."""
    node: Any = plain
    for part in key.split(".") if key else ():
        if not isinstance(node, Mapping) or part not in node:
            return
        node = node[part]
    yield node


def _not_finite(node: Any, key: str = "") -> Iterator[Problem]:
    """Yield a problem for every number that is nan or infinite: no comparison refuses a nan."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _not_finite(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _not_finite(value, f"{key}[{index}]")
    elif isinstance(node, float) and not math.isfinite(node):
        yield Problem(key, node, "must be a finite number")


@functools.cache
def _schema(entry: str) -> dict[str, Any]:
    schema = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{entry}.yaml"), resolve=False)
    items = schema.items() if isinstance(schema, dict) else ()
    return {str(key): value for key, value in items if key not in ("defaults", "hydra")}


def _unknown_keys(
    node: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, where: str
) -> Iterator[Problem]:
    """Yield a problem for each key outside any constructor that the primary config has not."""
    for key, value in node.items():
        if key not in schema:
            yield Problem(prefix + key, value, _unknown(f"a key of {where}", key, schema))
        elif isinstance(schema[key], Mapping) and "_target_" not in schema[key]:
            if isinstance(value, Mapping) and schema[key]:  # {} takes any key
                yield from _unknown_keys(value, schema[key], f"{prefix}{key}.", where)


def _check_node(node: Any, key: str) -> Iterator[Problem]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _check_node(item, f"{key}[{index}]")
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        yield from _check_target(node, key)
    for name, value in node.items():
        yield from _check_node(value, f"{key}.{name}")


def _check_target(node: Mapping[str, Any], key: str) -> Iterator[Problem]:
    target = str(node["_target_"])
    # 1. The constructor exists, and so does the function that a look-up of Hydra's names.
    try:
        accepted = signature(target)
    except UnknownTargetError as error:
        yield Problem(f"{key}._target_", target, _not_found(error))
        return
    if target in _LOOKUPS and isinstance(node.get("path"), str):
        try:
            signature(node["path"])
        except UnknownTargetError as error:
            yield Problem(f"{key}.path", node["path"], _not_found(error))
    # 2. There are not more values by position than it takes.
    values = list(node.get("_args_") or [])
    by_position = [p.name for p in accepted.parameters.values() if p.positional]
    if len(values) > len(by_position) and not accepted.any_positional:
        yield Problem(
            f"{key}._args_", values, f"must have at most {len(by_position)} values for {target}"
        )
    filled = set(by_position[: len(values)])
    # 3. Every key is a parameter that a config may give, with a value of its type.
    for name, value in node.items():
        if name in _SPECIAL:
            continue
        parameter = accepted.parameters.get(name)
        if parameter is not None and _given_by_code(parameter, node):
            yield Problem(f"{key}.{name}", value, "must not be given: nvmm itself gives it")
        elif parameter is not None:
            yield from _check_type(parameter, value, f"{key}.{name}")
            if target.startswith("nvmm."):
                yield from _check_part(parameter, value, f"{key}.{name}")
        elif not accepted.any_keyword:
            allowed = _unknown(f"a parameter of {target}", name, accepted.parameters)
            yield Problem(f"{key}.{name}", value, allowed)
    # 4. Nothing required is absent, but what code adds later: nvmm to its own partials, and the
    # caller to any foreign partial.
    foreign_partial = bool(node.get("_partial_")) and not target.startswith("nvmm.")
    for parameter in accepted.parameters.values():
        if parameter.name in node or parameter.name in filled or not parameter.required:
            continue
        if not foreign_partial and not _given_by_code(parameter, node):
            yield Problem(f"{key}.{parameter.name}", None, f"must be given: {target} requires it")


def _given_by_code(parameter: Parameter, node: Mapping[str, Any]) -> bool:
    """Return True for a keyword-only parameter of nvmm's own partials: nvmm completes them."""
    is_ours = str(node["_target_"]).startswith("nvmm.")
    return bool(node.get("_partial_")) and is_ours and not parameter.positional


def _signature(node: Mapping[str, Any]) -> Signature:
    try:
        return signature(str(node["_target_"])) if "_target_" in node else Signature({})
    except UnknownTargetError:
        return Signature({})


def _parameters(node: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters that a config may give to the constructor of `node`."""
    parameters = _signature(node).parameters.values()
    return {p.name: p for p in parameters if not _given_by_code(p, node)}


def _not_found(error: UnknownTargetError) -> str:
    closest = nearest(error.missing, error.names)
    return f"does not exist: {error}" + (f"; did you mean {closest}?" if closest else "")


def _unknown(what: str, name: str, names: Mapping[str, Any]) -> str:
    closest = _closest(name, names)
    hint = f"; did you mean {closest}?" if closest else f"; use one of {', '.join(sorted(names))}"
    return f"is not {what}" + (hint if names else "")


def _closest(name: str, names: Any) -> str | None:
    known = _SYNONYMS.get(name)
    return known if known in names else nearest(name, names)


def _check_type(parameter: Parameter, value: Any, key: str) -> Iterator[Problem]:
    if value == MISSING or parameter.annotation is None:
        return
    if value is None and parameter.nullable:
        return
    if isinstance(value, Mapping) and "_target_" in value:
        return
    allowed = _allowed(parameter.annotation)
    if not allowed:
        return
    if any(_fits(value, kind) for kind in allowed):
        item = _item(parameter.annotation, value)
        if item is not None:
            of_item = Parameter(parameter.name, item, False, False, True)
            for place, child in _children(value):
                yield from _check_type(of_item, child, f"{key}{place}")
        return
    names = [kind if isinstance(kind, str) else str(kind[0]) for kind in allowed]
    if isinstance(allowed[0], tuple):
        yield Problem(key, value, f"must be one of {', '.join(names)}")
    else:
        shown = repr(value) if isinstance(value, str) else value
        yield Problem(key, shown, f"must be {' or '.join(names)}")


def _check_part(parameter: Parameter, value: Any, key: str) -> Iterator[Problem]:
    """Yield a problem for a plain value where one of our constructors takes an object."""
    node = parameter.annotation
    optional = parameter.nullable
    while isinstance(node, ast.BinOp):  # `Dataset | None`; other unions are left alone
        if not (isinstance(node.right, ast.Constant) and node.right.value is None):
            return
        node, optional = node.left, True
    head = node.value if isinstance(node, ast.Subscript) else node
    name = ast.unparse(head).rpartition(".")[2] if head is not None else ""
    if not name[:1].isupper() or name in _KINDS or name in ("Any", "Callable", "Literal", "Path"):
        return
    if value == MISSING or (value is None and optional):
        return
    if not isinstance(value, Mapping) or "_target_" not in value:
        yield Problem(key, value, f"must be a mapping with the _target_ of a {name}")


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f".{name}", child) for name, child in value.items())
    elif isinstance(value, list):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))


def _item(node: ast.expr | None, value: Any) -> ast.expr | None:
    """Return the annotation of what a list or a mapping holds, None where none says it."""
    match node:
        case ast.Constant(value=str(text)):
            return _item(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _item(left, value) or _item(right, value)
        case ast.Subscript(value=head, slice=inner):
            name = ast.unparse(head).rpartition(".")[2]
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if name in ("Optional", "Union"):
                return next((item for i in items if (item := _item(i, value))), None)
            kinds = _KINDS.get(name, [])
            if kinds == ["a list"] and isinstance(value, list):
                # tuple[int, str] has a type for each place, which is left to its constructor.
                alike = len(items) == 1 or ast.unparse(items[-1]) == "..."
                return items[0] if alike else None
            if kinds == ["a mapping"] and isinstance(value, Mapping) and len(items) == 2:
                return items[1]
    return None


def _allowed(node: ast.expr) -> list[str | tuple[Any]] | None:
    """Return the kinds of value that an annotation admits, a literal as a tuple of its value.

    Returns None when the annotation says too little.
    """
    match node:
        case ast.Constant(value=None):
            return ["null"]
        case ast.Constant(value=str(text)):
            return _allowed(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([left, right])
        case ast.Subscript(value=value, slice=inner):
            name = ast.unparse(value).rpartition(".")[2]
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if name == "Optional":
                return _union([*items, ast.Constant(None)])
            if name == "Union":
                return _union(items)
            if name == "Literal":
                return [(item.value,) for item in items if isinstance(item, ast.Constant)]
            return _allowed(value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _KINDS.get(name)
    return None


def _union(nodes: list[ast.expr]) -> list[str | tuple[Any]] | None:
    kinds = [_allowed(node) for node in nodes]
    return None if None in kinds else [kind for part in kinds if part for kind in part]


_KINDS: dict[str, list[str | tuple[Any]]] = {
    **{name: [name] for name in ("int", "float", "bool", "str")},
    **{name: ["a list"] for name in ("list", "tuple", "List", "Tuple", "Sequence")},
    **{name: ["a mapping"] for name in ("dict", "Dict", "Mapping")},
}


def _fits(value: Any, kind: str | tuple[Any]) -> bool:
    if isinstance(kind, tuple):
        return bool(value == kind[0])
    if isinstance(value, bool):
        return kind == "bool"
    return {
        "null": value is None,
        "int": isinstance(value, int),
        "float": isinstance(value, int | float),
        "bool": False,
        "str": isinstance(value, str),
        "a list": isinstance(value, list),
        "a mapping": isinstance(value, Mapping),
    }[kind]
