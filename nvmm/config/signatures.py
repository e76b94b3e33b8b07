"""Constructor signatures read from source with `ast`: nothing is imported.

A config names classes by dotted path (`_target_`). Importing them to learn what they accept would
import torch and megatron.core (seconds) and run foreign code before the config has been checked.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib.machinery
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bases that add no constructor parameter; some of them exist only in C.
_PLAIN_BASES = {"object", "ABC", "Generic", "Protocol"}
_DEPTH = 30
# Types that a name may stand for in an annotation.
_ALIASED = {"Literal", "Mapping", "Sequence"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor.

    annotation: its type as written, or None; a name of a Literal is replaced by the Literal.
    required: it has no default.
    nullable: its default is None, whatever the annotation says.
    positional: it can be filled from `_args_`.
    default: as written, a name of a module's constant replaced by the constant; None without one.
    """

    name: str
    annotation: ast.expr | None
    required: bool
    nullable: bool
    positional: bool
    default: ast.expr | None = None


@dataclass(frozen=True)
class Signature:
    """Parameters of a callable, in order.

    any_keyword: unknown keywords are accepted (`**kwargs`).
    any_positional: any number of positional arguments is accepted (`*args`).
    """

    parameters: dict[str, Parameter]
    any_keyword: bool = False
    any_positional: bool = False


UNREADABLE = Signature({}, any_keyword=True, any_positional=True)
"""The signature of a target that has no Python source to read (an extension, a lazy module)."""


class UnknownTargetError(ValueError):
    """A `_target_` that names nothing.

    missing: the name that does not exist. within: the last thing that does; names: its members.
    """

    def __init__(self, missing: str, within: str, names: list[str]) -> None:
        super().__init__(f"{within} has no {missing!r}" if within else f"no module {missing!r}")
        self.missing = missing
        self.within = within
        self.names = names


@dataclass(frozen=True, eq=False)
class _Module:
    name: str
    package: str
    locations: tuple[str, ...]
    tree: ast.Module | None

    @functools.cached_property
    def bindings(self) -> dict[str, list[ast.stmt]]:
        """The statements that bind each name at module level, the last one first."""
        by_name: dict[str, list[ast.stmt]] = {}
        for statement in _statements(self.tree.body if self.tree else []):
            for name in _bound_names(statement):
                by_name.setdefault(name, []).insert(0, statement)
        return by_name

    @functools.cached_property
    def lazy(self) -> bool:
        """True where names appear at run time: no source, `__getattr__`, or a replaced module."""
        if self.tree is None:
            return not self.locations
        return "__getattr__" in self.bindings or any(
            isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "sys.modules[__name__]"
            for s in _statements(self.tree.body)
        )


@dataclass(frozen=True, eq=False)
class _Definition:
    """A class or function in its module; `bound` when the first parameter is filled already."""

    module: _Module
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bound: bool = False


class _Opaque:
    """Something that exists but cannot be read from source."""


_OPAQUE = _Opaque()
_Found = _Module | _Definition | _Opaque


@functools.cache
def signature(target: str) -> Signature:
    """Return the parameters of the class or function at dotted path `target`.

    Raises UnknownTargetError when there is none. No module is imported.
    """
    located = _locate(target)
    if isinstance(located, _Module):
        raise UnknownTargetError(target.rpartition(".")[2], f"the class or function {target}", [])
    if isinstance(located, _Opaque):
        return UNREADABLE
    if isinstance(located.node, ast.ClassDef):
        return _class_signature(located.module, located.node) or Signature({})
    return _function_signature(located.module, located.node, drop_first=located.bound)


def _locate(target: str) -> _Found:
    first, *rest = target.split(".")
    module = _load(first)
    if module is None:
        raise UnknownTargetError(first, "", ["nvmm", "megatron", "torch", "hydra"])
    current: _Found = module
    path = first
    for part in rest:
        if isinstance(current, _Opaque):
            return current
        if isinstance(current, _Module):
            following = _attribute(current, part)
        else:
            following = _member(current, part)
        if following is None:
            raise UnknownTargetError(part, path, _names(current))
        current, path = following, f"{path}.{part}"
    return current


def _names(owner: _Module | _Definition) -> list[str]:
    """Return the names that a class or a module has, its submodules included."""
    if isinstance(owner, _Definition):
        return [name for statement in owner.node.body for name in _bound_names(statement)]
    return [*owner.bindings, *(info.name for info in pkgutil.iter_modules(owner.locations))]


@functools.cache
def _load(name: str) -> _Module | None:
    """Find and parse module `name` without importing it or its parents."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:
        return None
    full = first
    for part in rest:
        full = f"{full}.{part}"
        if spec is None or spec.submodule_search_locations is None:
            return None
        # find_spec of a submodule would import its parent; PathFinder only looks at folders.
        spec = importlib.machinery.PathFinder.find_spec(full, list(spec.submodule_search_locations))
    if spec is None:
        return None
    locations = tuple(spec.submodule_search_locations or ())
    package = name if locations else name.rpartition(".")[0]
    tree = None
    if spec.origin and spec.origin.endswith(".py"):
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    return _Module(name, package, locations, tree)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield module-level statements in order, those inside if, try and with included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, name, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _bound_names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ClassDef(name=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [] if "overload" in _decorators(statement) else [name]
        case ast.Import(names=aliases):
            return [a.asname or a.name.partition(".")[0] for a in aliases]
        case ast.ImportFrom(names=aliases):
            return [a.asname or a.name for a in aliases]
        case ast.Assign(targets=targets):
            return [t.id for t in targets if isinstance(t, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return [name]
    return []


def _decorators(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    names = set()
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.add(ast.unparse(called).rpartition(".")[2])
    return names


def _attribute(module: _Module, name: str, depth: int = 0) -> _Found | None:
    """Resolve `module.name` through re-exports, aliases and submodules; None when there is none."""
    if depth > _DEPTH:
        return _OPAQUE
    for statement in module.bindings.get(name, []):
        resolved = _binding(module, statement, name, depth)
        if resolved is not None:
            return resolved
    for statement in module.bindings.get("*", []):
        if isinstance(statement, ast.ImportFrom):
            source = _load(_source(module, statement))
            resolved = _attribute(source, name, depth + 1) if source else None
            if resolved is not None:
                return resolved
    submodule = _load(f"{module.name}.{name}") if module.locations else None
    if submodule is not None:
        return submodule
    return _OPAQUE if module.lazy else None


def _binding(module: _Module, statement: ast.stmt, name: str, depth: int) -> _Found | None:
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return _Definition(module, statement)
        case ast.ImportFrom(names=aliases):
            original = next(a.name for a in aliases if (a.asname or a.name) == name)
            source = _load(_source(module, statement))
            if source is None:
                return None
            if source is module:  # `from . import name` in the package itself
                return _load(f"{module.name}.{original}")
            return _attribute(source, original, depth + 1)
        case ast.Import(names=aliases):
            alias = next(a for a in aliases if (a.asname or a.name.partition(".")[0]) == name)
            return _load(alias.name if alias.asname else name)
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            if isinstance(value, ast.Name | ast.Attribute):
                return _expression(module, value, depth + 1)
            # `X = None` is the other arm of a failed import; anything else is made at run time.
            return None if isinstance(value, ast.Constant) else _OPAQUE
    return None


def _source(module: _Module, statement: ast.ImportFrom) -> str:
    """Return the absolute name of the module that `from ... import` names."""
    if not statement.level:
        return statement.module or ""
    base = module.package.split(".")
    base = base[: len(base) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _expression(module: _Module, node: ast.expr, depth: int = 0) -> _Found | None:
    """Resolve a name, a dotted name or a subscripted one in `module`."""
    if isinstance(node, ast.Subscript):
        return _expression(module, node.value, depth)
    if isinstance(node, ast.Name):
        return _attribute(module, node.id, depth)
    if isinstance(node, ast.Attribute):
        owner = _expression(module, node.value, depth)
        if isinstance(owner, _Module):
            return _attribute(owner, node.attr, depth + 1)
        if isinstance(owner, _Definition):
            return _member(owner, node.attr)
        return owner
    return _OPAQUE


def _member(owner: _Definition, name: str) -> _Found | None:
    """Resolve a method or nested class of a class, an inherited one too; None without one."""
    if not isinstance(owner.node, ast.ClassDef):
        return None
    for statement in owner.node.body:
        if name not in _bound_names(statement):
            continue
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            return _Definition(owner.module, statement, "classmethod" in _decorators(statement))
        if isinstance(statement, ast.ClassDef):
            return _Definition(owner.module, statement)
        return _OPAQUE
    for base in owner.node.bases:
        parent = _expression(owner.module, base)
        member = _member(parent, name) if isinstance(parent, _Definition) else parent
        if member is not None:
            return _OPAQUE if isinstance(member, _Module) else member
    return None


def default_of(target: str, name: str) -> Any:
    """Return the default of parameter `name` of the constructor at `target`, as a config says it.

    Tuples are lists. Returns None where the default cannot be read from source.
    """
    try:
        parameter = signature(target).parameters.get(name)
    except UnknownTargetError:
        return None
    try:
        value = ast.literal_eval(parameter.default) if parameter and parameter.default else None
    except ValueError:
        return None
    return list(value) if isinstance(value, tuple) else value


def class_attribute(target: str, name: str) -> Any:
    """Return the plain value or frozenset that a class at `target` or a base of it gives `name`.

    None where there is no such attribute, or source does not give it as a plain value.
    """
    try:
        owner: _Found | None = _locate(target)
    except UnknownTargetError:
        return None
    while isinstance(owner, _Definition) and isinstance(owner.node, ast.ClassDef):
        for statement in owner.node.body:
            if name in _bound_names(statement):
                value = getattr(statement, "value", None)
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "frozenset":
                    return frozenset(ast.literal_eval(value.args[0]) if value.args else ())
                return ast.literal_eval(value) if isinstance(value, ast.Constant) else None
        bases = owner.node.bases
        owner = _expression(owner.module, bases[0]) if bases else None
    return None


def completed(config: Any) -> Any:
    """Return a copy of a plain config that states the defaults of nvmm's constructors.

    A run keeps this copy: a default that changes later does not change what was trained. Left out
    are defaults that source does not give as plain values.
    """
    if isinstance(config, list):
        return [completed(item) for item in config]
    if not isinstance(config, Mapping):
        return config
    stated = {key: completed(value) for key, value in config.items()}
    target = str(config.get("_target_", ""))
    if target.startswith("nvmm."):
        for parameter in signature(target).parameters.values():
            if parameter.name in stated or not parameter.positional or parameter.default is None:
                continue
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(parameter.default)
                stated[parameter.name] = list(value) if isinstance(value, tuple) else value
    return stated


def value_of(node: Mapping[str, Any], name: str) -> Any:
    """Return the value of `name` in a mapping of a config, or its constructor's default."""
    return node[name] if name in node else default_of(str(node.get("_target_", "")), name)


class _Constants(ast.NodeTransformer):
    """A transformer that puts a module's Literals and constants in the place of their names."""

    def __init__(self, module: _Module) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _constant(self.module, node.id) or node


def _constant(module: _Module, name: str, depth: int = 0) -> ast.expr | None:
    """Return what `name = Literal[...]`, `name = Mapping[...]` or `name = 1` binds in `module`.

    The name may be imported from another module of the package. Returns None for every other name.
    """
    for statement in module.bindings.get(name, []):
        match statement:
            case ast.Assign(value=ast.Subscript(value=head) as value):
                return value if ast.unparse(head).rpartition(".")[2] in _ALIASED else None
            case ast.Assign(value=ast.Constant() | ast.Tuple() | ast.UnaryOp() as value):
                return value
            case ast.ImportFrom(names=aliases) if depth < _DEPTH:
                original = next(a.name for a in aliases if (a.asname or a.name) == name)
                path = _source(module, statement)
                if path.partition(".")[0] == module.name.partition(".")[0]:
                    source = _load(path)
                    return _constant(source, original, depth + 1) if source else None
    return None


def _resolved(module: _Module, node: ast.expr | None) -> ast.expr | None:
    return None if node is None else _Constants(module).visit(copy.deepcopy(node))


def _function_signature(
    module: _Module, node: ast.FunctionDef | ast.AsyncFunctionDef, *, drop_first: bool
) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    pairs = [(a, d, True) for a, d in zip(positional, defaults, strict=True)]
    if drop_first:
        pairs = pairs[1:]
    pairs += [
        (a, d, False) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    parameters = {
        a.arg: Parameter(
            a.arg,
            _resolved(module, a.annotation),
            d is None,
            _is_none(d),
            by_position,
            _resolved(module, d),
        )
        for a, d, by_position in pairs
    }
    return Signature(parameters, arguments.kwarg is not None, arguments.vararg is not None)


def _class_signature(module: _Module, node: ast.ClassDef, depth: int = 0) -> Signature | None:
    """Return the constructor's parameters; None when neither the class nor a base defines one."""
    methods = {s.name: s for s in node.body if isinstance(s, ast.FunctionDef) and _bound_names(s)}
    if "__init__" in methods:
        return _function_signature(module, methods["__init__"], drop_first=True)
    decorators = _decorators(node)
    if decorators & {"define", "frozen", "attrs", "s"}:
        return UNREADABLE
    if _dataclass_option(node, "init"):
        return Signature({f.name: f for f in _fields(module, node, depth).values()})
    if "__new__" in methods:
        return _function_signature(module, methods["__new__"], drop_first=True)
    for base in node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        last = name.rpartition(".")[2]
        if last in _PLAIN_BASES:
            continue
        if last == "NamedTuple":
            return Signature(_annotated(module, node, kw_only=False))
        parent = _expression(module, base)
        if depth > _DEPTH or not isinstance(parent, _Definition):
            return UNREADABLE
        if isinstance(parent.node, ast.ClassDef):
            inherited = _class_signature(parent.module, parent.node, depth + 1)
            if inherited is not None:
                return inherited
    return None


def _dataclass_option(node: ast.ClassDef, option: str) -> bool:
    """Return True for a dataclass that has `option` (init: on by default, kw_only: off)."""
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(called).rpartition(".")[2] != "dataclass":
            continue
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        options = {k.arg: ast.unparse(k.value) == "True" for k in keywords}
        return options.get(option, option == "init")
    return False


def _fields(module: _Module, node: ast.ClassDef, depth: int) -> dict[str, Parameter]:
    """Return the constructor parameters that a dataclass and its bases declare, in order."""
    parameters: dict[str, Parameter] = {}
    for base in reversed(node.bases):
        definition = _expression(module, base)
        if isinstance(definition, _Definition) and isinstance(definition.node, ast.ClassDef):
            if depth < _DEPTH:
                parameters |= _fields(definition.module, definition.node, depth + 1)
    if "dataclass" in _decorators(node):
        parameters |= _annotated(module, node, kw_only=_dataclass_option(node, "kw_only"))
        for statement in node.body:
            if _field_option(statement, "init") == "False":
                for name in _bound_names(statement):
                    parameters.pop(name, None)
    return parameters


def _annotated(module: _Module, node: ast.ClassDef, *, kw_only: bool) -> dict[str, Parameter]:
    parameters = {}
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation = ast.unparse(statement.annotation).strip("'\"")
        kind = annotation.partition("[")[0].rpartition(".")[2]
        if kind == "KW_ONLY":
            kw_only = True
        if kind in ("KW_ONLY", "ClassVar"):
            continue
        default: ast.expr | None = statement.value
        required = default is None
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            keywords = {k.arg: k.value for k in default.keywords}
            required = not keywords.keys() & {"default", "default_factory"}
            by_keyword = kw_only or _field_option(statement, "kw_only") == "True"
            default = keywords.get("default")
        else:
            by_keyword = kw_only
        name = statement.target.id
        parameters[name] = Parameter(
            name,
            _resolved(module, statement.annotation),
            required,
            _is_none(default),
            not by_keyword,
            _resolved(module, default),
        )
    return parameters


def _field_option(statement: ast.stmt, option: str) -> str | None:
    """Return the source text of keyword `option` in `name: type = field(...)`."""
    value = statement.value if isinstance(statement, ast.AnnAssign) else None
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        return next((ast.unparse(k.value) for k in value.keywords if k.arg == option), None)
    return None


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
